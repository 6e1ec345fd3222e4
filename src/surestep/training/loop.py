"""The one training loop, for all methods and any number of processes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from surestep import files, processes
from surestep.attacks.lending import attacking, forked_rng
from surestep.errors import UserError
from surestep.methods import StepResult
from surestep.training import checkpoint
from surestep.training.course import follow
from surestep.training.display import Display
from surestep.training.preparing import Job
from surestep.training.randomness import RandomStates
from surestep.training.resuming import Checkpoints
from surestep.training.run_folder import RunFolder
from surestep.training.source import Batch, generators_of
from surestep.training.state import RunState, Sums
from surestep.training.stopping import Asked, StopRequest
from surestep.training.validating import find_masking, validate


class TrainingDiverged(UserError):
    """The loss or the weights are no longer finite."""


class Trainer:
    """The loop over a job's epochs and steps.

    Args:
        job: the prepared run.
        run: the folder to write to; None writes nothing.
        quiet: show nothing.
        on_epoch: see ``fit``.
    """

    def __init__(
        self,
        job: Job,
        run: RunFolder | None,
        *,
        quiet: bool = False,
        on_epoch: Callable[[dict[str, Any], nn.Module], None] | None = None,
    ) -> None:
        first = processes.rank() == 0
        self.job, self.run = job, run
        self.on_epoch = on_epoch if first else None
        self.at = RunState()
        self.stop = StopRequest()
        self.display = Display(job.total, quiet=quiet or not first)
        self.random = RandomStates(job.device, job.config.seed, lambda: generators_of(job.source))
        self.checkpoints = Checkpoints(job, run, self.random, self.display.say) if run else None
        self._epoch_rng: list[dict[str, Any]] = []
        self._began = 0.0
        self._best: dict[str, Tensor] = {}

    def train(self, *, resume: bool, differences: list[str]) -> RunState:
        """Train to the end, and leave the selected weights in the model.

        Args:
            resume: continue from the newest checkpoint.
            differences: how the environment differs from the one the run was started in.
        """
        job = self.job
        if job.config.tensorboard:
            job.accelerator.init_trackers("tensorboard")
        with self.display:
            if job.pick:
                self.display.say(str(job.pick))
            for difference in differences:
                self.display.say(f"results may differ in the last digits: {difference}")
            restored = None
            if resume:
                assert self.checkpoints is not None
                self.at, restored = self.checkpoints.restore()
                processes.check_alike("finished steps", self.at.step, job.device)
                if restored and self.at.step == min(
                    job.total, self.at.epoch * job.source.steps_per_epoch
                ):
                    self._keep()  # in case the run ended right after this checkpoint
            # Without a folder there is nothing to resume: signals keep their usual effect.
            with self.stop.heard() if self.run else nullcontext():
                while self.at.epoch < math.ceil(job.total / job.source.steps_per_epoch):
                    self._epoch(restored)
                    restored = None
        self._finish()
        if self.stop.number:  # received when there was nothing left to stop
            self.stop.leave()
        return self.at

    def _epoch(self, restored: dict[str, Any] | None) -> None:
        """Train one epoch (the rest of it after a restored checkpoint), validate and save."""
        job, steps = self.job, self.job.source.steps_per_epoch
        # If the run was stopped during validation, all steps of the epoch are already done.
        skip = self.at.step - steps * self.at.epoch
        # The last epoch may be partial.
        left = min(steps - skip, job.total - self.at.step)
        sums = Sums(job.device)
        if restored:
            parts, n = restored["sums"], processes.world_size()
            same = len(parts) == n
            sums.load_state_dict(parts[processes.rank()] if same else Sums.shared_out(parts, n))
        self._began = time.perf_counter() - self.at.train_seconds
        for x, y, index in self._batches(skip, left, restored):
            follow(job, self.at.step)
            result = self._step(x, y, index)
            self.at.step += 1
            # An image without a label never counts as a hit, so average over the labelled ones.
            hits = (result.logits.argmax(1) == y).float().mean() / job.labelled
            values = {"loss": result.loss, **result.terms, "adv_accuracy": hits}
            sums.add(self.at.step, len(x), values)
            # Of several processes only the first shows anything.
            if self.display.due() and processes.rank() == 0:
                self._show(sums)
            self._pause(sums)
        self._check_finite(sums, weights=True)
        self._share_buffers()
        speed = self._speed(sums)
        self.at.epoch += 1
        row = {
            "epoch": self.at.epoch,
            "step": self.at.step,
            "lr": job.optimizer.param_groups[0]["lr"],
            **sums.means_of_all(),
            "images_per_second": speed,
            "train_seconds": self.at.train_seconds,
        }
        random_state = self.random.read()
        try:
            self._validate(row)
        except (Asked, UserError) as e:
            # A resume starts with the validation. After an error a process may be alone, and
            # saving needs them all.
            if isinstance(e, Asked) or processes.world_size() == 1:
                self.at.epoch -= 1
                self.random.write(random_state)
                self._save(sums)
            if isinstance(e, Asked):
                self._leave()
            raise
        self._record(row)

    def _pause(self, sums: Sums) -> None:
        """Write a checkpoint if one is due within the epoch or a stop was requested; then stop."""
        every, step = self.job.config.checkpoint_every, self.at.step
        within = step % self.job.source.steps_per_epoch and step < self.job.total
        due = every and step % every == 0 and within
        stops = self.run is not None and self.stop.after(step, self.job.device)
        if not (due or stops):
            return
        self._check_finite(sums, weights=True)
        self._share_buffers()
        self._speed(sums)
        self._save(sums)
        # Writing does not count as training time.
        self._began = time.perf_counter() - self.at.train_seconds
        if stops:
            self._leave()

    def _speed(self, sums: Sums) -> float:
        """Update ``train_seconds`` and return the images per second of this epoch so far."""
        self.at.train_seconds = time.perf_counter() - self._began
        before = self.at.history[-1]["train_seconds"] if self.at.history else 0.0
        return sums.images * processes.world_size() / (self.at.train_seconds - before)

    def _batches(self, skip: int, left: int, restored: dict[str, Any] | None) -> Iterator[Batch]:
        """Return the next ``left`` batches of the epoch, after the first ``skip``."""
        states = restored["rng"] if restored else self.random.of_all()
        # A loader draws its order when an epoch begins, so restore the state of that moment first.
        self._epoch_rng = restored.get("epoch_rng", states) if restored and skip else states
        if restored:
            self.random.restore(self._epoch_rng, self.at.step)
        batches = self.job.source.epoch(self.at.epoch, skip) if left else iter(())
        if restored and skip:
            self.random.restore(states, self.at.step)
        return itertools.islice(batches, left)

    def _leave(self) -> NoReturn:
        assert self.run is not None
        self.display.say(
            f"stopped at step {self.at.step} of {self.job.total}: {self.run.folder} is saved"
        )
        self._end()
        self.stop.leave()

    def _step(self, x: Tensor, y: Tensor, index: Tensor | None) -> StepResult:
        job, step, draw = self.job, self.at.step, None
        if job.method.needs_index:
            draw = job.source.draw(self.at.epoch, step % job.source.steps_per_epoch)
            # Once, rather than each time that the method reads or writes what it remembers.
            draw = None if draw is None else draw.to(job.device)
        with job.guard(f"step {step + 1}", len(x)):
            return job.take_step(x, y, index, draw)

    def _show(self, sums: Sums) -> None:
        self._check_finite(sums)
        means, speed = sums.means(), self._speed(sums)
        robust = f"  robust {self.at.scores[-1]:.1%}" if self.at.scores else ""
        parts = "  ".join(f"{k} {v:.3f}" for k, v in means.items() if k != "adv_accuracy")
        epoch = f"epoch {self.at.epoch + 1}/{math.ceil(self.job.config.epochs)}"
        self.display.step(self.at.step, epoch, f"{parts}{robust}  {speed:,.0f} img/s")

    def _check_finite(self, sums: Sums, *, weights: bool = False) -> None:
        """Raise if a loss was not finite or, with ``weights``, if the weights no longer are.

        With ``weights`` every process must call this, and all stop together; without it, nothing
        is checked when there are several processes.
        """
        if processes.world_size() > 1 and not weights:
            return
        bad = int(sums.bad_step)
        if bad < 0 and weights:
            finite = [p.detach().isfinite().all() for p in self.job.model.parameters()]
            bad = -1 if bool(torch.stack(finite).all()) else self.at.step
        bad = processes.all_max(bad, self.job.device)
        if bad < 0:
            return
        kept = checkpoint.found(self.run.checkpoints) if self.run else []
        where = f"last good checkpoint: {kept[-1]}" if kept else "no checkpoint was written yet"
        if self.run and self.run.weights.is_file():
            where += f", weights of the best epoch so far: {self.run.weights}"
        epoch = (bad - 1) // self.job.source.steps_per_epoch + 1
        raise TrainingDiverged(
            f"the loss became NaN or infinite at step {bad} (epoch {epoch}); {where}: begin a "
            f"new run with a lower lr ({self.job.config.lr:g}), clip_grad, or precision fp32"
        )

    def _validate(self, row: dict[str, Any]) -> None:
        """Attack the held-out images, watch for collapse, and choose the weights to keep."""
        at = self.at
        if self.job.held_out is None:
            at.best_epoch = at.epoch
            return
        row |= validate(self.job, self.stop)
        if warning := find_masking(row, at.scores[-1] if at.scores else None):
            row["collapse"] = True
            self.display.say(warning, "yellow")
        if self.job.config.select == "last" or row["val_worst_case"] > max(at.scores, default=-1):
            at.best_epoch = at.epoch

    def _record(self, row: dict[str, Any]) -> None:
        """Write the checkpoint, then the weights if they are the best, then the epoch's row."""
        job, at = self.job, self.at
        at.history.append(row)
        job.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=at.step)
        robust = f"  robust {row['val_worst_case']:.1%}" if "val_worst_case" in row else ""
        clean = f"  clean {row['val_clean']:.1%}" if "val_clean" in row else ""
        epochs = math.ceil(job.config.epochs)
        self.display.say(
            f"epoch {at.epoch}/{epochs}  loss {row['loss']:.4f}{clean}{robust}"
            f"  {row['images_per_second']:,.0f} img/s"
        )
        # Checkpoint first: without it a resume repeats the epoch, whose weights must not be kept
        # yet. Row last: an epoch that has its row is complete.
        self._save(Sums(job.device))
        self._keep()
        if self.on_epoch:
            # A logger must not affect training, whatever it draws at random or sets.
            with attacking(job.judged) as model, forked_rng(job.device):
                self.on_epoch(dict(row), model)

    def _keep(self) -> None:
        """Keep the weights if the epoch just ended is the best so far, and write the history."""
        job, at = self.job, self.at
        best = at.best_epoch == at.epoch
        if self.run is None:
            self._best = copy.deepcopy(job.judged.state_dict()) if best else self._best
        elif processes.rank() == 0:
            if best:
                files.save_weights(self.run.weights, job.judged, job.signature)
            rows = "".join(json.dumps(r) + "\n" for r in at.history)
            files.write_atomically(self.run.metrics, rows)

    def _save(self, sums: Sums) -> None:
        if self.checkpoints:
            self.checkpoints.save(self.at, sums, self._epoch_rng)

    def _share_buffers(self) -> None:
        """Copy the first process's buffers (batch statistics) to all: its weights are kept."""
        for module in dict.fromkeys((self.job.model, self.job.judged)):
            processes.broadcast_first(list(module.buffers()))

    def _end(self) -> None:
        """Wait until the first process is done writing: a launcher may end all when one exits."""
        processes.barrier(self.job.device)
        for tracker in self.job.accelerator.trackers:
            tracker.finish()

    def _finish(self) -> None:
        """Load the selected weights into the model, and put it into eval mode."""
        self._end()
        if self.run:
            files.load_weights(self.run.weights, self.job.model)
        else:
            self.job.model.load_state_dict(self._best)
        self.job.model.eval()
