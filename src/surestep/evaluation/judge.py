"""Attacks batch after batch, and counts: per sample the worst case, never the smallest mean."""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from surestep.attacks.ascent import round_up
from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.attacks.outcomes import misclassified, passes_agree, share_of
from surestep.data import mixed
from surestep.devices import autocast, exact
from surestep.errors import UserError
from surestep.evaluation import doubts, suite
from surestep.evaluation._state import State
from surestep.evaluation.result import Evaluation, wilson_interval
from surestep.evaluation.suite import AttackResult
from surestep.files import digest
from surestep.randomness import forked_rng, seed_everything
from surestep.threat import ThreatModel

_TURNED = 0.01  # share of images that rounding on another machine may misclassify
_KEPT = 16  # images of the first batch whose logits the state keeps


class Outcome(NamedTuple):
    """What an attack, or a part of one, did to a batch, as the state keeps it.

    Attributes:
        broken: positions of the images that it broke, ascending.
        steps: the number of steps that each of these took, -1 where it is not known; empty if the
            attack does not tell.
        parts: how many each part of the attack broke; empty if it has no parts.
        seconds: wall time.
    """

    broken: list[int]
    steps: list[int]
    parts: dict[str, int]
    seconds: float


class Judge:
    """Attacks batch after batch and counts.

    Args:
        model: pixels in, logits out, in eval mode.
        threat: norm, radius and data range.
        attacks: what to run, by name.
        seed: of everything that attacks draw at random.
        precision: dtype in which the perturbations are crafted.
        state: keeps what each attack found on each batch.
        tell: called with a few words when an attack begins on a batch.
        progress: called before each attack and after each batch, as ``evaluate`` says.
    """

    def __init__(
        self,
        model: nn.Module,
        threat: ThreatModel,
        attacks: dict[str, suite.Attack],
        seed: int,
        precision: torch.dtype,
        state: State,
        tell: Callable[[str], None] | None = None,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self.model, self.threat, self.attacks = model, threat, attacks
        self.tell, self.progress = tell, progress
        self.seed, self.precision, self.state = seed, precision, state
        # Cheapest first: what they break, those on survivors need not attack.
        self.order = sorted(attacks, key=lambda k: (attacks[k].survivors_only, attacks[k].passes))
        self.right: dict[str, list[Tensor]] = {name: [] for name in ("clean", *attacks)}
        self.first_wrong: dict[str, list[Tensor]] = {
            name: [] for name, attack in attacks.items() if attack.points_tried
        }
        self.parts = {
            name: dict.fromkeys(attack.run, 0)
            for name, attack in attacks.items()
            if isinstance(attack.run, Mapping)
        }
        self.seconds = dict.fromkeys(attacks, 0.0)
        self.labels: list[Tensor] = []
        self.worst: list[Tensor] = []
        self.n_done = self.n_robust = self.batch_index = 0
        self.worst_case = 1.0  # of the images so far, for ``progress`` and ``tell``
        self.total = 0  # 0: unknown
        self.kept_images: list[tuple[Tensor, Tensor]] = []
        self.signs: list[str] | None = None  # that attacks are misled; None: not looked for

    def run_batch(self, x: Tensor, y: Tensor) -> None:
        """Run every attack on a batch, except those whose results the state holds."""
        check_inputs(self.model, x, y, self.threat)
        clean = self._clean(x, y)
        worst = clean.clone()
        todo = sum(attack.passes for attack in self.attacks.values()) or 1
        spent = 0.0
        for name in self.order:
            self.worst_case = (self.n_robust + int(worst.sum())) / (self.n_done + len(x))
            if self.progress:
                done = self.n_done + int(spent / todo * len(x))
                self.progress(done, self.total, self.worst_case)
            attack = self.attacks[name]
            spent += attack.passes
            targets = worst if attack.survivors_only else clean
            run = partial(self._attack, name, x, y, targets)
            worst &= self._count(name, self._known_or_run(name, run), targets)
        self._keep_some(x, y, clean)
        self.right["clean"].append(clean)
        self.worst.append(worst)
        self.labels.append(y.cpu())
        self.n_done += len(x)
        self.n_robust += int(worst.sum())
        self.batch_index += 1
        if self.progress:
            self.progress(self.n_done, self.total, self.n_robust / self.n_done)

    def _known_or_run(self, label: str, run: Callable[[], Outcome]) -> Outcome:
        """Return the outcome on this batch that the state holds; if none, run and store it."""
        known = self.state.get(self.batch_index, label)
        if known is not None:
            return Outcome(
                known["broken"], known["steps"], known.get("parts", {}), known["seconds"]
            )
        outcome = run()
        self.state.put(self.batch_index, label, **outcome._asdict())
        return outcome

    def _count(self, name: str, outcome: Outcome, targets: Tensor) -> Tensor:
        """Count what an attack did; return which of its targets (N,) withstood it."""
        broken = torch.tensor(outcome.broken, dtype=torch.int64)
        ok = targets.clone()
        ok[broken] = False
        self.right[name].append(ok)
        if name in self.first_wrong:
            steps = torch.full((len(targets),), -1)
            # Without a number, or wrong in full precision alone: broken by its last step.
            told = torch.tensor(outcome.steps or -1)
            steps[broken] = torch.where(told < 0, self.attacks[name].last_step, told)
            self.first_wrong[name].append(steps)
        for part, count in outcome.parts.items():
            self.parts[name][part] += count
        self.seconds[name] += outcome.seconds
        return ok

    def _keep_some(self, x: Tensor, y: Tensor, clean: Tensor) -> None:
        """Keep some correctly classified images for ``look_for_doubts``.

        Images are taken from all batches, since the data may be sorted by class; a shortfall in one
        is made up from the next.
        """
        so_far = (self.n_done + len(x)) / self.total if self.total else 1.0
        quota = min(doubts.LOOKED_AT, math.ceil(doubts.LOOKED_AT * so_far))
        wanted = quota - sum(len(labels) for _, labels in self.kept_images)
        kept = self.kept_images
        same = not kept or kept[0][0].shape[1:] == x.shape[1:]
        if wanted > 0 and same and clean.any():
            rows = clean.nonzero().squeeze(1)
            rows = rows[mixed(len(rows))[:wanted]].to(x.device)
            kept.append((x[rows], y[rows]))

    def look_for_doubts(self, sources: Sequence[nn.Module], batch_size: int) -> None:
        """Look for what may mislead attacks, on the images that were kept for this."""
        self.signs = []
        if self.kept_images:
            x, y = (torch.cat(parts) for parts in zip(*self.kept_images, strict=True))
            with self._seeded("doubts", x.device):
                self.signs += doubts.of_model(
                    self.model, x, y, self.threat, self.attacks.values(), batch_size
                )
                self.signs += doubts.of_sources(sources, x, y, batch_size)
                self.signs += doubts.of_precision(self.model, x, self.precision, batch_size)

    def _clean(self, x: Tensor, y: Tensor) -> Tensor:
        fingerprint = digest(x, y) if self.state.kept else ""
        known = self.state.get(self.batch_index, "clean")
        if known is None:
            with self._seeded("clean", x.device):
                out = self._logits(x)
            clean = ~misclassified(out, y).cpu()
            wrong = (~clean).nonzero().squeeze(1).tolist()
            some = {"logits": _rounded(out[:_KEPT])} if self.batch_index == 0 else {}
            self.state.put(self.batch_index, "clean", wrong=wrong, data=fingerprint, **some)
            return clean
        if known["data"] != fingerprint:
            raise UserError(
                f"batch {self.batch_index} differs from the one that the state file was written "
                "for: give the same data in the same order, or another state file"
            )
        clean = torch.ones(len(x), dtype=torch.bool)
        clean[torch.tensor(known["wrong"], dtype=torch.int64)] = False
        if self.batch_index == 0:
            self._check_model(x, y, clean, torch.tensor(known["logits"]))
        return clean

    def _check_model(self, x: Tensor, y: Tensor, clean: Tensor, kept: Tensor) -> None:
        """Refuse a model whose code or attributes changed since the state file was written.

        Args:
            x: the images (N, ...) of the first batch.
            y: their labels (N,).
            clean: which of them (N,) were right.
            kept: logits of the first of them.

        Raises:
            UserError: the model gives other logits, or misclassifies other images.
        """
        with self._seeded("clean", x.device):
            out, again = self._logits(x), self._logits(x)
        now, limit = out[: len(kept)].cpu(), doubts.rounding_of(self.model)
        moved = len(kept)
        if kept.shape == now.shape:
            moved = int(doubts.differing_rows(kept.to(now.dtype), now, limit).sum())
        turned = int((clean != ~misclassified(out, y).cpu()).sum())
        # Another machine may round an image or two to the other side of a boundary or a threshold.
        # A random model that has its own generator draws anew: its passes differ from each other.
        if passes_agree(out, again) and (
            moved > len(kept) // 8 or turned > max(2, _TURNED * len(x))
        ):
            told = (
                f"it classifies {turned} of {len(x)} images differently"
                if turned
                else f"its logits differ on {moved} of {len(kept)} images"
            )
            raise UserError(
                f"the model changed since the state file was written, though its weights are the "
                f"same ({told}): restore its code and attributes, or give another state file"
            )

    def _attack(self, name: str, x: Tensor, y: Tensor, targets: Tensor) -> Outcome:
        """Run one attack, part by part if it has parts.

        Args:
            name: of the attack.
            x: the images (N, ...) of a batch.
            y: their labels (N,).
            targets: which of them (N,) to attack.
        """
        attack = self.attacks[name]
        if not isinstance(attack.run, Mapping):
            return self._run(name, attack.run, x, y, targets)
        broken: list[int] = []
        parts, seconds, left = {}, 0.0, targets.clone()
        for part, run in attack.run.items():
            label = f"{name}: {part}"
            outcome = self._known_or_run(label, partial(self._run, label, run, x, y, left))
            left[outcome.broken] = False
            broken += outcome.broken
            parts[part] = len(outcome.broken)
            seconds += outcome.seconds
        return Outcome(sorted(broken), [], parts, seconds)

    def _run(
        self, name: str, run: suite.AttackFn, x: Tensor, y: Tensor, targets: Tensor
    ) -> Outcome:
        """Run an attack, or a part of one; arguments as for ``_attack``."""
        if self.tell:
            of = f" of {self.total:,}" if self.total else ""
            images = f"{self.n_done + 1:,} to {self.n_done + len(x):,}{of}"
            self.tell(f"{name} on images {images}; worst case {self.worst_case:.1%} so far")
        begin = time.perf_counter()
        broken: list[int] = []
        steps: list[int] = []
        # The targets, padded with other images to a common batch size (see round_up).
        attacked = round_up(int(targets.sum()), len(x))
        rows = targets.int().argsort(descending=True, stable=True)[:attacked]
        if len(rows):
            at = rows.to(x.device)
            with self._seeded(name, x.device):
                found = self._points(name, run, x[at], y[at])
                wrong = targets[rows] & ~self._right(found.x_adv, y[at])
            broken = rows[wrong].tolist()
            if found.first_wrong is not None:
                steps = found.first_wrong.cpu()[wrong].tolist()
        return Outcome(broken, steps, {}, time.perf_counter() - begin)

    def _points(self, name: str, run: suite.AttackFn, x: Tensor, y: Tensor) -> AttackResult:
        """Return what an attack found, in the ball: only a point of the threat model counts."""
        with autocast(x.device, self.precision):
            found = run(self.model, x.clone(), y)  # it may write into its images
        found = AttackResult(found) if isinstance(found, Tensor) else found
        if not isinstance(found, AttackResult) or found.x_adv.shape != x.shape:
            what = (
                f"points of shape {tuple(found.x_adv.shape)}"
                if isinstance(found, AttackResult)
                else f"a {type(found).__name__}"
            )
            raise UserError(
                f"the attack {name!r} returned {what}, expected a tensor x_adv of shape "
                f"{tuple(x.shape)}: return one point for each image"
            )
        x_adv = torch.where(found.x_adv.isfinite(), found.x_adv, x)
        return replace(found, x_adv=self.threat.project(x_adv, x))

    @contextlib.contextmanager
    def _seeded(self, name: str, device: torch.device) -> Iterator[None]:
        """Seed all generators, so that results depend neither on what ran before nor on resuming.

        The random state is restored afterwards, since data may be drawn at random between attacks.
        """
        with forked_rng(device):
            seed_everything(zlib.crc32(f"{self.seed}/{self.batch_index}/{name}".encode()))
            yield

    def _right(self, x: Tensor, y: Tensor) -> Tensor:
        return ~misclassified(self._logits(x), y).cpu()

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        # Whatever precision the caller's code runs in.
        with exact(x.device):
            return forward_logits(self.model, x)

    def result(self) -> Evaluation:
        """Return the counts; ``seconds`` is that of the attacks, for the caller to replace.

        Raises:
            UserError: there was no image.
        """
        if not self.n_done:
            raise UserError("there is no image to evaluate on")
        n = self.n_done
        right = {name: torch.cat(parts) for name, parts in self.right.items()}
        counts = {name: int(mask.sum()) for name, mask in right.items()}
        counts["worst case"] = self.n_robust
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
            worst_case_accuracy=self.n_robust / n,
            n=n,
            seed=self.seed,
            intervals={name: wilson_interval(c, n) for name, c in counts.items()},
            seconds=sum(self.seconds.values()),
            attack_seconds=self.seconds,
            threat=self.threat.to_dict(),
            attacks=[
                {
                    "name": name,
                    "scope": "survivors" if attack.survivors_only else "all",
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

    def _doubts(self, right: Mapping[str, Tensor]) -> list[str] | None:
        if self.signs is None:
            return None
        # An attack on the survivors cannot be compared with those that ran on all images.
        on_all = {k: attack for k, attack in self.attacks.items() if not attack.survivors_only}
        left = {name: right[name] for name in ("clean", *on_all)}
        parts = [self.parts[name] for name in self.order if name in self.parts]
        # Use Square of the last AutoAttack: if the -bpda variant also ran, only its gradient
        # attacks saw usable gradients.
        square = [some["square"] for some in parts if "square" in some]
        return self.signs + doubts.of_results(left, on_all, square[-1] if square else None)

    def _by_step(self, name: str, clean: int) -> list[float] | None:
        points = self.attacks[name].points_tried
        if points is None:
            return None
        steps = torch.cat(self.first_wrong[name])
        broken = torch.bincount(steps[steps >= 0], minlength=points).cumsum(0)
        return [(clean - b) / self.n_done for b in broken.tolist()]

    def _by_part(self, name: str, right: int) -> dict[str, float] | None:
        if name not in self.parts:
            return None
        left, after = right + sum(self.parts[name].values()), {}
        for part, broken in self.parts[name].items():
            left -= broken
            after[part] = left / self.n_done
        return after


def _rounded(out: Tensor) -> list[list[float]]:
    """Return logits (N, K) with about float32's digits, for JSON."""
    return [[float(f"{value:.7g}") for value in row] for row in out.tolist()]
