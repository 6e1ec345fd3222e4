"""Accuracy under attack: per sample the worst case, never the smallest mean."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from surestep.activations import with_a_way_through
from surestep.attacks.core import misclassified, round_up, share_of
from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.attacks.lending import attacking, device_of, forked_rng, seed_everything
from surestep.data import Batches, Images, as_images, as_pair, as_pixels, some
from surestep.devices import autocast, exact, memory_for
from surestep.errors import SurestepWarning, UserError
from surestep.evaluation import _doubts, suite
from surestep.evaluation._state import State, digest, model_digest
from surestep.evaluation._substitute import substitute
from surestep.evaluation.adapt import Adapted
from surestep.evaluation.suite import Found
from surestep.threat import ThreatModel
from surestep.threat import check as check_threat

FORMAT, VERSION = "surestep-evaluation", 1
_ASKED_ABOUT = 1000  # images that a substitute is trained on
_FEW = 20  # images that may be of one class by chance
_ROUNDED = 0.01  # share of images on which machines may differ


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. Accuracies are shares in [0, 1].

    Attributes:
        clean_accuracy: share of images classified right as they are.
        robust_accuracy: by attack, the share right both clean and under that attack.
        worst_case_accuracy: share that no attack of the suite broke, taken per image.
        n: number of images.
        seed: of the random starts.
        intervals: 95% Wilson intervals of these accuracies by name.
        seconds: wall time of the whole.
        attack_seconds: wall time by attack.
        threat: norm, eps and data range in words.
        attacks: by attack, its ``scope`` ("all" that are right clean, or the "survivors" of the
            other attacks: its accuracy is then theirs together), accuracy, seconds, and
            ``by_step``: for an iterative attack the share still right after each point tried,
            ``by_part``: for AutoAttack the share still right after each of its parts.
        per_class: per label, its number of images, clean and worst-case accuracy.
        curve: accuracies at other radii, if these were asked for.
        right: (n,) each, which images were right "clean", by attack and in the "worst case"; not
            part of ``to_dict``.
        precision: in which the perturbations were made.
        doubts: signs that the worst case is too high, in words; none where none was looked for.
    """

    clean_accuracy: float
    robust_accuracy: dict[str, float]
    worst_case_accuracy: float
    n: int
    seed: int
    intervals: dict[str, tuple[float, float]]
    seconds: float
    attack_seconds: dict[str, float]
    threat: dict[str, Any]
    attacks: list[dict[str, Any]]
    per_class: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    right: dict[str, Tensor] = field(repr=False, compare=False)
    precision: str = "float32"
    doubts: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, as written by ``--json``."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "right"}
        values["intervals"] = {k: list(v) for k, v in self.intervals.items()}
        return {"format": FORMAT, "version": VERSION, **values}


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share (95% by default)."""
    if n == 0:
        return (0.0, 1.0)
    p, z2 = right / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


def evaluate(
    model: nn.Module,
    data: Images | tuple[Tensor, Tensor] | Dataset | DataLoader,
    threat: ThreatModel,
    attacks: Sequence[str] | Mapping[str, suite.Attack] | None = None,
    *,
    budget: str = "standard",
    batch_size: int = 500,
    n: int | None = None,
    seed: int = 0,
    eps: Sequence[float] = (),
    precision: torch.dtype = torch.float32,
    preprocess: nn.Module | None = None,
    sources: Sequence[nn.Module] = (),
    state: str | Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    tell: Callable[[str], None] | None = None,
    doubt: bool = True,
) -> Evaluation:
    """Measure clean accuracy and accuracy under each attack.

    The model is judged in eval mode and left as it was found. An image counts as robust to an
    attack when it is right clean and at the attack's point. Only images that are right clean are
    attacked, cheap attacks first; AutoAttack only attacks what the others left, which cannot
    change the worst case. The global random state is left as it was.

    Args:
        model: returns logits (N, K) for images in the threat model's range; alone, or first in a
            tuple, or as "logits" in a dict.
        data: a pair of tensors (x, y), a Dataset or a DataLoader of such pairs.
        threat: norm, radius and data range.
        attacks: names, see ``surestep.evaluation.suite``, or ``suite.Attack`` by name; by default
            those of the budget. Where layers know a way straight through them (MeanSparse), each
            name that follows the gradient runs a second time as "NAME-bpda".
        budget: "quick", "standard" or "thorough"; without ``attacks``.
        batch_size: of the attacks.
        n: only n images: the first ones; of tensors that are sorted by class, and of a Dataset,
            n drawn from all, always the same. All by default. Warns where a DataLoader's first n
            images share one class.
        seed: of the random starts.
        eps: further radii, for the curve of accuracy against eps.
        precision: bfloat16 or float16 crafts the perturbations under autocast. Whether a point is
            misclassified is decided in float32 in any case.
        preprocess: what the model needs done to the pixels first, such as ``models.Normalize``.
        sources: models whose points the "transfer" attack tries, which take the same pixels (what
            normalises is inside); without any, a small one is trained on the model's own answers.
        state: progress file; given again after a stop, the evaluation continues from there and
            ends with the same numbers.
        progress: called after each batch with images done, images in all (0 if unknown) and the
            worst-case accuracy so far.
        tell: called with a few words when an attack begins on a batch.
        doubt: look for signs that gradients say little of this model, at the price of a few passes
            over 96 images, and warn of them unless nothing is left.

    Raises:
        UserError: unknown attack or budget, no data, a state of another evaluation, or images,
            labels or model that cannot be judged.
    """
    check_threat(threat)
    attacks = [attacks] if isinstance(attacks, str) else attacks
    if isinstance(attacks, Mapping) and (taken := {"clean", "worst case"} & set(attacks)):
        raise UserError(f"{min(taken)!r} is what is found without attacks, and of all: rename it")
    if isinstance(attacks, Mapping) and eps:
        raise UserError("eps takes attacks by name: an Attack is made for one radius")
    names = suite.budget(budget) if attacks is None else attacks
    if not isinstance(names, Mapping) and with_a_way_through(model):
        names = suite.and_through(names)
    radii = [threat.with_eps(e) for e in eps]
    device, start = device_of(model), time.perf_counter()
    given = list(sources)  # a substitute follows from the rest, but for the last digits
    judged = Adapted(model, preprocess)
    advice = f"lower batch_size ({batch_size})"
    if "transfer" in names and not isinstance(names, Mapping) and not sources:
        with forked_rng(device), memory_for("the substitute", advice):
            sources = _stand_in(judged, data, batch_size, threat, seed)

    def at(radius: ThreatModel, place: str | Path | None) -> Evaluation:
        by_name = (
            dict(names) if isinstance(names, Mapping) else suite.parse_all(names, radius, sources)
        )
        settings = {
            "version": 2,
            "attacks": list(by_name),
            "threat": radius.to_dict(),
            "batch_size": batch_size,
            "n": n,
            "seed": seed,
            "precision": str(precision),
        }
        if place is not None:
            settings |= _digests(model, preprocess, given)
        judge = _Judge(judged, radius, by_name, seed, precision, State(place, settings), tell)
        with (
            contextlib.closing(judge.state),
            attacking(judged),
            forked_rng(device),
            memory_for("an attack", advice),
        ):
            seed_everything(seed)
            batches, total = batches_of(data, batch_size, n, device, radius.bounds)
            for x, y in batches:
                judge.batch(x, y)
                if progress:
                    progress(judge.done, total, judge.survivors / judge.done)
            if doubt and radius is threat:
                judge.look(given if "transfer" in names else [], batch_size)
        return judge.result()

    whole = at(threat, state)
    if whole.doubts and whole.worst_case_accuracy > 0:
        warnings.warn(
            f"the worst case of {whole.worst_case_accuracy:.1%} may be too high: "
            f"{'; '.join(whole.doubts)}. An audit looks closer",
            SurestepWarning,
            stacklevel=2,
        )
    if n is not None:
        warn_of_one_class({row["label"]: row["n"] for row in whole.per_class}, stacklevel=2)
    curve = []
    for radius in radii:
        place = None if state is None else f"{state}.eps-{radius.eps:g}"
        curve.append(_row(radius, whole if radius.eps == threat.eps else at(radius, place)))
    return replace(whole, curve=curve, seconds=time.perf_counter() - start)


def _stand_in(
    model: nn.Module, data: Any, batch_size: int, threat: ThreatModel, seed: int
) -> list[nn.Module]:
    """Train a substitute on what the model answers to the first images; none without any."""
    seed_everything(seed)
    batches, _ = batches_of(data, batch_size, _ASKED_ABOUT, device_of(model), threat.bounds)
    shown = [x for x, _ in batches]
    return [substitute(model, torch.cat(shown), threat, seed)] if shown else []


def _digests(
    model: nn.Module, preprocess: nn.Module | None, sources: Sequence[nn.Module]
) -> dict[str, Any]:
    """Tell the models of an evaluation from others, for its state."""
    return {
        "model": model_digest(model),
        "preprocess": "none" if preprocess is None else model_digest(preprocess),
        "sources": [model_digest(source) for source in sources],
    }


def _row(threat: ThreatModel, found: Evaluation) -> dict[str, Any]:
    kept = ("clean_accuracy", "robust_accuracy", "worst_case_accuracy", "n")
    return {"eps": threat.eps, **{name: getattr(found, name) for name in kept}}


class _Judge:
    """Attacks batch after batch and counts."""

    def __init__(
        self,
        model: nn.Module,
        threat: ThreatModel,
        attacks: dict[str, suite.Attack],
        seed: int,
        precision: torch.dtype,
        state: State,
        tell: Callable[[str], None] | None,
    ) -> None:
        self.model, self.threat, self.attacks, self.tell = model, threat, attacks, tell
        self.seed, self.precision, self.state = seed, precision, state
        # Cheapest first: what they break, those on survivors need not attack.
        self.order = sorted(attacks, key=lambda k: (attacks[k].survivors, attacks[k].passes))
        self.right: dict[str, list[Tensor]] = {name: [] for name in ("clean", *attacks)}
        self.first_wrong: dict[str, list[Tensor]] = {
            name: [] for name, attack in attacks.items() if attack.looks
        }
        self.parts = {
            name: dict.fromkeys(attack.run, 0)
            for name, attack in attacks.items()
            if isinstance(attack.run, Mapping)
        }
        self.seconds = dict.fromkeys(attacks, 0.0)
        self.labels: list[Tensor] = []
        self.worst: list[Tensor] = []
        self.done = self.survivors = self.number = 0
        self.some: list[tuple[Tensor, Tensor]] = []
        self.doubts: list[str] | None = None

    def batch(self, x: Tensor, y: Tensor) -> None:
        """Run every attack on a batch, but those that the state already knows."""
        check_inputs(self.model, x, y, self.threat)
        clean = self._clean(x, y)
        worst = clean.clone()
        for name in self.order:
            known = self.state.get(self.number, name)
            if known is None:
                targets = worst if self.attacks[name].survivors else clean
                known = self._attack(name, x, y, targets)
                self.state.put(self.number, name, **known)
            broken = torch.tensor(known["broken"], dtype=torch.int64)
            ok = (worst if self.attacks[name].survivors else clean).clone()
            ok[broken] = False
            self.right[name].append(ok)
            if name in self.first_wrong:
                steps = torch.full((len(x),), -1)
                steps[broken] = torch.tensor(known["steps"], dtype=torch.int64)
                self.first_wrong[name].append(steps)
            for part, count in known.get("parts", {}).items():
                self.parts[name][part] += count
            worst &= ok
            self.seconds[name] += known["seconds"]
        self._keep_some(x, y, clean)
        self.right["clean"].append(clean)
        self.worst.append(worst)
        self.labels.append(y.cpu())
        self.done += len(x)
        self.survivors += int(worst.sum())
        self.number += 1

    def _keep_some(self, x: Tensor, y: Tensor, clean: Tensor) -> None:
        """Keep the first images that are right, for ``look``."""
        wanted = _doubts.LOOKED_AT - sum(len(labels) for _, labels in self.some)
        same = not self.some or self.some[0][0].shape[1:] == x.shape[1:]
        if wanted > 0 and same and clean.any():
            rows = clean.nonzero().squeeze(1)[:wanted].to(x.device)
            self.some.append((x[rows], y[rows]))

    def look(self, sources: Sequence[nn.Module], batch_size: int) -> None:
        """Look for what may blind attacks, on some of the images that are right."""
        self.doubts = []
        if self.some:
            x, y = (torch.cat(parts) for parts in zip(*self.some, strict=True))
            with self._seeded("doubts", x.device):
                self.doubts += _doubts.of_model(
                    self.model, x, y, self.threat, list(self.attacks), batch_size
                )
                self.doubts += _doubts.of_sources(sources, x, y, batch_size)

    def _clean(self, x: Tensor, y: Tensor) -> Tensor:
        fingerprint = digest(x, y) if self.state.kept else ""
        known = self.state.get(self.number, "clean")
        if known is None:
            with self._seeded("clean", x.device):
                clean = self._right(x, y)
            wrong = (~clean).nonzero().squeeze(1).tolist()
            self.state.put(self.number, "clean", wrong=wrong, data=fingerprint)
            return clean
        if known["data"] != fingerprint:
            raise UserError(
                f"batch {self.number} differs from the one that the state file was written for: "
                "give the same data in the same order, or another state file"
            )
        clean = torch.ones(len(x), dtype=torch.bool)
        clean[torch.tensor(known["wrong"], dtype=torch.int64)] = False
        if self.number == 0:
            with self._seeded("clean", x.device):
                again, once_more = self._right(x, y), self._right(x, y)
            # Another machine may round an image or two to the other side; a random model that has
            # its own generator draws anew.
            other = int((again != clean).sum())
            if other > max(2, _ROUNDED * len(x)) and again.equal(once_more):
                raise UserError(
                    f"the model answers otherwise on {other} of {len(x)} images than when the "
                    "state file was written, though its weights are the same: give the code that "
                    "it was then, or another state file"
                )
        return clean

    def _attack(self, name: str, x: Tensor, y: Tensor, targets: Tensor) -> dict[str, Any]:
        """Run one attack, part by part if it has some, on the images ``targets`` (N,) of a batch.

        Returns:
            The images that it ``broke``, after how many ``steps`` each (of an iterative attack),
            how many each of its ``parts`` broke, and the ``seconds`` that all took.
        """
        attack = self.attacks[name]
        if not isinstance(attack.run, Mapping):
            return self._run(name, attack.run, attack.looks, x, y, targets)
        broken: list[int] = []
        parts, seconds, left = {}, 0.0, targets.clone()
        for part, run in attack.run.items():
            label = f"{name}: {part}"
            known = self.state.get(self.number, label)
            if known is None:
                known = self._run(label, run, None, x, y, left)
                self.state.put(self.number, label, **known)
            left[known["broken"]] = False
            broken += known["broken"]
            parts[part] = len(known["broken"])
            seconds += known["seconds"]
        return {"broken": sorted(broken), "steps": [], "parts": parts, "seconds": seconds}

    def _run(
        self,
        name: str,
        run: suite.Run,
        looks: int | None,
        x: Tensor,
        y: Tensor,
        targets: Tensor,
    ) -> dict[str, Any]:
        """Run an attack, or a part of one, on the images ``targets`` (N,) of a batch."""
        if self.tell:
            self.tell(f"{name} on images {self.done + 1:,} to {self.done + len(x):,}")
        begin = time.perf_counter()
        broken: list[int] = []
        steps: list[int] = []
        # The targets; others only to fill up to a batch size met before.
        attacked = round_up(int(targets.sum()), len(x))
        rows = targets.int().argsort(descending=True, stable=True)[:attacked]
        if len(rows):
            at = rows.to(x.device)
            with self._seeded(name, x.device):
                with autocast(x.device, self.precision):
                    found = run(self.model, x[at], y[at])
                found = Found(found) if isinstance(found, Tensor) else found
                # Whatever an attack returns, only a point of the threat model counts.
                x_adv = torch.where(found.x_adv.isfinite(), found.x_adv, x[at])
                wrong = targets[rows] & ~self._right(self.threat.project(x_adv, x[at]), y[at])
            broken = rows[wrong].tolist()
            if found.first_wrong is not None:
                # Crafted in low precision, broken in full: by the last point then.
                last = (looks or 1) - 1
                first = found.first_wrong.cpu()[wrong]
                steps = torch.where(first < 0, last, first).tolist()
        return {"broken": broken, "steps": steps, "seconds": time.perf_counter() - begin}

    @contextlib.contextmanager
    def _seeded(self, name: str, device: torch.device) -> Iterator[None]:
        """Seed what is random, so that the same is found whatever ran before, or was resumed.

        The state is as before afterwards: data may be drawn at random between the attacks.
        """
        with forked_rng(device):
            seed_everything(zlib.crc32(f"{self.seed}/{self.number}/{name}".encode()))
            yield

    @torch.no_grad()
    def _right(self, x: Tensor, y: Tensor) -> Tensor:
        # Whatever precision the caller's code runs in.
        with exact(x.device):
            return ~misclassified(forward_logits(self.model, x), y).cpu()

    def result(self) -> Evaluation:
        """Count; the time that all took is for the caller to say.

        Raises:
            UserError: there was no image.
        """
        if not self.done:
            raise UserError("there is no image to evaluate on")
        n = self.done
        right = {name: torch.cat(parts) for name, parts in self.right.items()}
        counts = {name: int(mask.sum()) for name, mask in right.items()}
        counts["worst case"] = self.survivors
        labels, worst, clean = torch.cat(self.labels), torch.cat(self.worst), right["clean"]
        per_class = []
        for label in labels.unique().tolist():
            of = labels == label
            per_class.append(
                {
                    "label": label,
                    "n": int(of.sum()),
                    "clean_accuracy": share_of(clean[of]),
                    "worst_case_accuracy": share_of(worst[of]),
                }
            )
        return Evaluation(
            clean_accuracy=counts["clean"] / n,
            robust_accuracy={name: counts[name] / n for name in self.attacks},
            worst_case_accuracy=self.survivors / n,
            n=n,
            seed=self.seed,
            intervals={name: wilson_interval(c, n) for name, c in counts.items()},
            seconds=sum(self.seconds.values()),
            attack_seconds=self.seconds,
            threat=self.threat.to_dict(),
            attacks=[
                {
                    "name": name,
                    "scope": "survivors" if attack.survivors else "all",
                    "accuracy": counts[name] / n,
                    "seconds": self.seconds[name],
                    "by_step": self._by_step(name, counts["clean"]),
                    "by_part": self._by_part(name, counts[name]),
                }
                for name, attack in self.attacks.items()
            ],
            per_class=per_class,
            curve=[],
            precision=str(self.precision).removeprefix("torch."),
            doubts=self._doubts(right),
            right={**right, "worst case": worst},
        )

    def _doubts(self, right: Mapping[str, Tensor]) -> list[str]:
        if self.doubts is None:
            return []
        # What saw only what others left says nothing of them.
        left = {k: v for k, v in right.items() if k == "clean" or not self.attacks[k].survivors}
        parts = [self.parts[name] for name in self.order if name in self.parts]
        # Of the last: an earlier one may not have gone straight through layers as this did.
        square = [some["square"] for some in parts if "square" in some]
        return self.doubts + _doubts.of_results(left, square[-1] if square else None)

    def _by_step(self, name: str, clean: int) -> list[float] | None:
        looks = self.attacks[name].looks
        if looks is None:
            return None
        steps = torch.cat(self.first_wrong[name])
        broken = torch.bincount(steps[steps >= 0], minlength=looks).cumsum(0)
        return [(clean - b) / self.done for b in broken.tolist()]

    def _by_part(self, name: str, right: int) -> dict[str, float] | None:
        if name not in self.parts:
            return None
        left, after = right + sum(self.parts[name].values()), {}
        for part, broken in self.parts[name].items():
            left -= broken
            after[part] = left / self.done
        return after


def batches_of(
    data: Any,
    batch_size: int,
    n: int | None,
    device: torch.device,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    """Return the batches on the device, and the number of images if it is known (else 0).

    Raises:
        UserError: data that are none, or tensors that are no float32 images where the data range
            is another than [0, 1].
    """
    if isinstance(data, Dataset):
        streams = isinstance(data, IterableDataset) or not isinstance(data, Sized)
        whole = 0 if streams else len(cast(Sized, data))
        data = Subset(data, some(whole, n).tolist()) if n is not None and n < whole else data
        data = DataLoader(data, batch_size)
    if isinstance(data, DataLoader):
        return _first(data, n, device, bounds), n or 0
    images = as_images(data) if bounds == (0.0, 1.0) else _in_range(data, bounds)
    images = images if n is None else images.first(n)
    if bool((images.y < 0).any()):
        raise UserError(f"{images.name} has images without a label (y of -1): leave them out")
    source = Batches(images, batch_size, shuffle=False, device=device)
    return ((x, y) for x, y, _ in source.epoch(0)), len(images)


def _in_range(data: Any, bounds: tuple[float, float]) -> Images:
    """Take tensors in another data range as they are; each batch is checked against the range."""
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor):
        x, y = data
        if x.dtype == torch.float32 and isinstance(y, Tensor):
            return Images(x, y)
    raise UserError(
        f"for the data range {bounds} give float32 tensors (x, y) in it, or a DataLoader; other "
        "data are pixels in [0, 1]"
    )


def warn_of_one_class(counts: Mapping[int, int], stacklevel: int) -> None:
    """Say that a part of data sorted by class was judged, where all are images of one label."""
    ((label, n), *others) = counts.items()
    if not others and n >= _FEW:
        warnings.warn(
            f"the first {n:,} images are all of class {label}: if the data are "
            "sorted by class, shuffle them, or judge all (n=None)",
            SurestepWarning,
            stacklevel=stacklevel + 1,
        )


def _first(
    loader: Iterable[Any], n: int | None, device: torch.device, bounds: tuple[float, float]
) -> Iterator[tuple[Tensor, Tensor]]:
    left = math.inf if n is None else n
    for batch in loader:
        if left <= 0:
            return
        x, y = as_pair(batch)
        take = int(min(left, len(x)))
        left -= take
        x = x[:take]
        # Before it is moved: Apple's GPUs have no float64. Of half an image's digits a ball in l2
        # has next to no room: all its points are rounded.
        x = x.float() if x.is_floating_point() else x
        yield as_pixels(x.to(device), bounds), y[:take].to(device)
