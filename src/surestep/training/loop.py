"""The one training loop, for all methods and any number of processes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from surestep import files, processes
from surestep.attacks.lending import attacking
from surestep.errors import UserError
from surestep.methods import StepResult
from surestep.randomness import forked_rng
from surestep.training import checkpoint
from surestep.training.course import apply_schedules
from surestep.training.display import Display
from surestep.training.preparing import Job
from surestep.training.random_states import RandomStates
from surestep.training.resuming import Checkpoints, Interrupted
from surestep.training.run_folder import RunFolder
from surestep.training.source import Batch
from surestep.training.state import EpochMeans, RunState, has_stopped
from surestep.training.stopping import StopRequest, StopRequested, is_meeting
from surestep.training.validating import find_masking, validate
from surestep.weights import load_weights, save_weights

_GO_ON, _END, _FAILED = 0, 1, 2
"""What the first process tells the others after its callback."""
_COLUMNS = {
    *("loss", "epoch", "step", "lr", "adv_accuracy", "images_per_second", "train_seconds"),
    *("collapse", "stopped"),
}
"""Columns of the log, beside those of validation, whose names no term of a loss may have."""


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
        quiet: bool,
        on_epoch: Callable[[dict[str, Any], nn.Module], object] | None,
    ) -> None:
        first = processes.rank() == 0
        self.job, self.run = job, run
        self.on_epoch = on_epoch if first else None
        # Not those of the settings, which may end with less than half a step.
        self.epochs = math.ceil(job.total / job.source.steps_per_epoch)
        self.state = RunState()
        self.stop = StopRequest()
        self.display = Display(job.total, quiet=quiet or not first)
        self.random = RandomStates(job.device, job.config.seed, job.source.generators)
        self.checkpoints = Checkpoints(job, run, self.random, self.display.say) if run else None
        self._epoch_rng: list[dict[str, Any]] = []
        self._began = 0.0
        self._best: dict[str, Tensor] = {}

    def train(self, *, resume: bool, notes: Sequence[str]) -> RunState:
        """Train to the end, and leave the selected weights in the model.

        Args:
            resume: continue from the newest checkpoint.
            notes: lines to show first, on what differs from when the run was started.

        Returns:
            The progress of the run, with its history.

        Raises:
            UserError: there is nothing to resume from; a step, validation or ``on_epoch`` failed;
                a file cannot be written.
            TrainingDiverged: the loss or the weights are no longer finite.
            KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
            SystemExit: SIGTERM, likewise.
        """
        job = self.job
        if job.config.tensorboard:
            job.accelerator.init_trackers("tensorboard")
        with self.display:
            if job.pick:
                self.display.say(str(job.pick))
            for note in notes:
                self.display.say(note)
            interrupted = self._resume() if resume else None
            # Without a folder there is nothing to resume: signals keep their usual effect.
            with self.stop.handling_signals() if self.run else nullcontext():
                while self.state.epoch < self.epochs and not has_stopped(self.state.history):
                    self._epoch(interrupted)
                    interrupted = None
        self._finish_writing()
        self._load_selected()
        if self.stop.number:  # received when there was nothing left to stop
            self.stop.exit()
        return self.state

    def _resume(self) -> Interrupted | None:
        """Restore the newest checkpoint; return the epoch in which it was written, if any."""
        assert self.checkpoints is not None
        assert self.run is not None
        self.state, interrupted = self.checkpoints.restore()
        processes.check_alike("finished steps", self.state.step, self.job.device)
        if interrupted is None and checkpoint.found(self.run.checkpoints):
            self._save_if_best()  # in case the run ended right after this checkpoint
        return interrupted

    def _epoch(self, interrupted: Interrupted | None) -> None:
        """Train one epoch (what is left of an interrupted one), validate and save."""
        means = EpochMeans(self.job.device)
        if interrupted:
            means.restore(interrupted.sums)
        self._train_steps(means, interrupted)
        self._check_finite(means, weights=True)
        self._share_buffers()
        self._read_clock()
        self.state.epoch += 1
        row = {
            "epoch": self.state.epoch,
            "step": self.state.step,
            "lr": self.job.optimizer.param_groups[0]["lr"],
            **means.of_all(),
            "images_per_second": self._images_per_second(means),
            "train_seconds": self.state.train_seconds,
        }
        self._validate_or_save(row, means)
        self._record(row)

    def _train_steps(self, means: EpochMeans, interrupted: Interrupted | None) -> None:
        """Take the steps that are left of the epoch."""
        job, steps = self.job, self.job.source.steps_per_epoch
        # If the run was stopped during validation, all steps of the epoch are already done.
        skip = self.state.step - steps * self.state.epoch
        # The last epoch may be partial.
        left = min(steps - skip, job.total - self.state.step)
        self._start_clock()
        for x, y, index in self._batches(skip, left, interrupted):
            apply_schedules(job, self.state.step)
            result = self._step(x, y, index)
            if taken := [k for k in result.terms if k in _COLUMNS or k.startswith("val_")]:
                raise UserError(f"the term {taken[0]!r} has a name that training logs: rename it")
            self.state.step += 1
            # An image without a label never counts as a hit, so average over the labelled ones.
            hits = (result.logits.argmax(1) == y).float().mean() / job.labelled
            values = {"loss": result.loss, **result.terms, "adv_accuracy": hits}
            means.add(self.state.step, len(x), values)
            # Of several processes only the first shows anything.
            if self.display.due() and processes.rank() == 0:
                if processes.world_size() == 1:  # several check where they meet, all of them
                    self._check_finite(means)
                self._show(means)
            if is_meeting(self.state.step):
                self._check_finite(means)
            self._checkpoint_if_due(means)

    def _batches(self, skip: int, left: int, interrupted: Interrupted | None) -> Iterator[Batch]:
        """Return the next ``left`` batches of the epoch, after the first ``skip``."""
        if interrupted:
            # A loader draws its order when an epoch begins: restore the state of that moment first.
            self.random.restore(interrupted.epoch_rng, self.state.step)
        self._epoch_rng = self.random.of_all()
        # Without steps left this only tells the data their epoch, by which they may be judged.
        batches = self.job.source.epoch(self.state.epoch, skip if left else 0)
        if interrupted:
            self.random.restore(interrupted.rng, self.state.step)
        return itertools.islice(batches, left)

    def _checkpoint_if_due(self, means: EpochMeans) -> None:
        """Write a checkpoint if one is due within the epoch or a stop was requested; then stop."""
        every, step = self.job.config.checkpoint_every, self.state.step
        within = step % self.job.source.steps_per_epoch and step < self.job.total
        due = every and step % every == 0 and within
        stops = self.run is not None and self.stop.after(step, self.job.device)
        if not (due or stops):
            return
        self._check_finite(means, weights=True)
        self._share_buffers()
        self._read_clock()
        self._save(means)
        self._start_clock()  # writing does not count as training time
        if stops:
            self._stop_early()

    def _validate_or_save(self, row: dict[str, Any], means: EpochMeans) -> None:
        """Validate; if that fails or is stopped, save, so that a resume starts with validation."""
        random_state = self.random.read()
        try:
            self._validate(row)
        except (StopRequested, Exception) as e:
            stops = isinstance(e, StopRequested)
            # After an error a process may be alone, and saving needs them all.
            if stops or processes.world_size() == 1:
                self.state.epoch -= 1
                self.random.write(random_state)
                self._save(means)
            if stops:
                self._stop_early()
            raise

    def _start_clock(self) -> None:
        """Count the time from now on as training time."""
        self._began = time.perf_counter() - self.state.train_seconds

    def _read_clock(self) -> None:
        self.state.train_seconds = time.perf_counter() - self._began

    def _images_per_second(self, means: EpochMeans) -> float:
        """Return the speed of this epoch, up to when the clock was last read."""
        history = self.state.history
        seconds = self.state.train_seconds - (history[-1]["train_seconds"] if history else 0.0)
        return means.images * processes.world_size() / seconds

    def _stop_early(self) -> NoReturn:
        assert self.run is not None
        self.display.say(
            f"stopped at step {self.state.step} of {self.job.total}: {self.run.folder} is saved"
        )
        self._finish_writing()
        self.stop.exit()

    def _step(self, x: Tensor, y: Tensor, index: Tensor | None) -> StepResult:
        job, step, draw = self.job, self.state.step, None
        if job.method.needs_index:
            draw = job.source.draw(self.state.epoch, step % job.source.steps_per_epoch)
            # Once, rather than each time that the method reads or writes what it remembers.
            draw = None if draw is None else draw.to(job.device)
        with job.guard(f"step {step + 1}", len(x)):
            return job.take_step(x, y, index, draw)

    def _show(self, means: EpochMeans) -> None:
        self._read_clock()
        scores = self.state.scores
        robust = f"  robust {scores[-1]:.1%}" if scores else ""
        parts = "  ".join(f"{k} {v:.3f}" for k, v in means.local().items() if k != "adv_accuracy")
        epoch = f"epoch {self.state.epoch + 1}/{self.epochs}"
        speed = f"{self._images_per_second(means):,.0f} img/s"
        self.display.step(self.state.step, epoch, f"{parts}{robust}  {speed}")

    def _check_finite(self, means: EpochMeans, *, weights: bool = False) -> None:
        """Raise if a loss was not finite or, with ``weights``, if the weights no longer are.

        Every process must call this, and all stop together.
        """
        bad = int(means.bad_step)
        if bad < 0 and weights:
            finite = [p.detach().isfinite().all() for p in self.job.model.parameters()]
            bad = -1 if bool(torch.stack(finite).all()) else self.state.step
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
        state = self.state
        if self.job.held_out is None:
            state.best_epoch = state.epoch
            return
        row |= validate(self.job, self.stop)
        if warning := find_masking(row, state.scores[-1] if state.scores else None):
            row["collapse"] = True
            self.display.say(warning, "yellow")
        best = max(state.scores, default=-1)
        if self.job.config.select == "last" or row["val_worst_case"] > best:
            state.best_epoch = state.epoch

    def _record(self, row: dict[str, Any]) -> None:
        """Write the checkpoint, then the weights if they are the best, then the epoch's row."""
        job, state = self.job, self.state
        state.history.append(row)
        job.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=state.step)
        robust = f"  robust {row['val_worst_case']:.1%}" if "val_worst_case" in row else ""
        clean = f"  clean {row['val_clean']:.1%}" if "val_clean" in row else ""
        self.display.say(
            f"epoch {state.epoch}/{self.epochs}  loss {row['loss']:.4f}{clean}{robust}"
            f"  {row['images_per_second']:,.0f} img/s"
        )
        # Checkpoint first: without it a resume repeats the epoch, whose weights must not have been
        # kept. Row last: an epoch that has its row is complete.
        self._save(EpochMeans(job.device))
        self._save_if_best()
        if self._asks_to_end(row) and state.step < job.total:
            row["stopped"] = True
            self.display.say(
                f"ended after epoch {state.epoch} of {self.epochs}: on_epoch returned True"
            )
            self._save(EpochMeans(job.device))
            self._save_if_best()

    def _asks_to_end(self, row: dict[str, Any]) -> bool:
        """Call ``on_epoch`` in the first process; tell in all whether it ends the training.

        Raises:
            UserError: in the other processes, the callback failed. The first raises its error.
        """
        device, answer = self.job.device, None
        try:
            if self.on_epoch:
                # A logger must not affect training, whatever it draws at random or sets.
                with attacking(self.job.eval_model) as model, forked_rng(device):
                    answer = self.on_epoch(dict(row), model)
        except BaseException:
            processes.all_max(_FAILED, device)  # the others would wait for this one
            raise
        # Loggers return all sorts of things, which mean nothing.
        ends = isinstance(answer, bool | np.bool_) and bool(answer)
        told = processes.all_max(_END if ends else _GO_ON, device)
        if told == _FAILED:
            raise UserError("on_epoch failed in the first process, whose output says why")
        return told == _END

    def _save_if_best(self) -> None:
        """Save the weights if the epoch just ended is the best so far, and write the history."""
        job, state = self.job, self.state
        best = state.best_epoch == state.epoch
        if self.run is None:
            self._best = copy.deepcopy(job.eval_model.state_dict()) if best else self._best
        elif processes.rank() == 0:
            if best:
                save_weights(self.run.weights, job.eval_model, job.signature)
            rows = "".join(json.dumps(r) + "\n" for r in state.history)
            files.write_atomically(self.run.metrics, rows)

    def _save(self, means: EpochMeans) -> None:
        if self.checkpoints:
            self.checkpoints.save(self.state, means, self._epoch_rng)

    def _share_buffers(self) -> None:
        """Copy the first process's buffers (batch statistics) to all, as it saves the weights."""
        for module in dict.fromkeys((self.job.model, self.job.eval_model)):
            processes.broadcast_first(list(module.buffers()))

    def _finish_writing(self) -> None:
        """Wait until the first process is done writing: a launcher may end all when one exits."""
        processes.barrier(self.job.device)
        for tracker in self.job.accelerator.trackers:
            tracker.finish()

    def _load_selected(self) -> None:
        """Load the selected weights into the model, and put it into eval mode."""
        if self.run:
            load_weights(self.run.weights, self.job.model)
        else:
            self.job.model.load_state_dict(self._best)
        self.job.model.eval()
