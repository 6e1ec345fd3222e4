"""Attacks batch after batch, and counts: per sample the worst case, never the smallest mean."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surestep.attacks.core import misclassified, round_up, share_of
from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.attacks.lending import forked_rng, seed_everything
from surestep.devices import autocast, exact
from surestep.errors import UserError
from surestep.evaluation import doubts, suite
from surestep.evaluation._state import State, digest
from surestep.evaluation.result import Evaluation, wilson_interval
from surestep.evaluation.suite import Found
from surestep.threat import ThreatModel

_ROUNDED = 0.01  # share of images on which machines may differ


class Judge:
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
        wanted = doubts.LOOKED_AT - sum(len(labels) for _, labels in self.some)
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
                self.doubts += doubts.of_model(
                    self.model, x, y, self.threat, list(self.attacks), batch_size
                )
                self.doubts += doubts.of_sources(sources, x, y, batch_size)

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
        # An attack on survivors cannot be compared with those that were run on all.
        left = {k: v for k, v in right.items() if k == "clean" or not self.attacks[k].survivors}
        parts = [self.parts[name] for name in self.order if name in self.parts]
        # The last AutoAttack's Square: with "-bpda" in the suite only that one had whole gradients.
        square = [some["square"] for some in parts if "square" in some]
        return self.doubts + doubts.of_results(left, square[-1] if square else None)

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
