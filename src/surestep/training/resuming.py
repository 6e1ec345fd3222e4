"""What a run saves in order to resume, and how it resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from accelerate.utils import gather_object

from surestep import processes
from surestep.errors import UserError
from surestep.training import checkpoint
from surestep.training.engine import match_layout
from surestep.training.preparing import Job
from surestep.training.random_states import RandomStates
from surestep.training.run_folder import RunFolder
from surestep.training.state import EpochMeans, RunState


class Interrupted(NamedTuple):
    """An epoch that was interrupted: what each process, in rank order, had at the checkpoint.

    Attributes:
        sums: the states of its ``EpochMeans``.
        rng: its random states.
        epoch_rng: its random states at the start of the epoch.
    """

    sums: list[dict[str, Any]]
    rng: list[dict[str, Any]]
    epoch_rng: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of a run, which hold everything that the rest of it depends on.

    Args:
        job: whose state is written and restored.
        run: the folder of the run.
        random: the random states of its processes.
        say: called with messages for the user.
    """

    def __init__(
        self, job: Job, run: RunFolder, random: RandomStates, say: Callable[[str], None]
    ) -> None:
        self.job, self.run, self.random, self.say = job, run, random, say

    def save(self, state: RunState, means: EpochMeans, epoch_rng: list[dict[str, Any]]) -> None:
        """Write a checkpoint; every process must call this.

        Args:
            state: the progress of the run.
            means: those of the current epoch so far.
            epoch_rng: the random states of all processes at the start of the epoch.
        """
        job, rng = self.job, self.random.of_all()
        sums = gather_object([means.state_dict()])
        # Collective, since it gathers rows of the batch: so before the other processes return.
        method = job.method.state_dict()
        if processes.rank():
            return
        checkpoint.save(
            self.run.checkpoints,
            state.step,
            {
                "progress": asdict(state),
                "model": job.model.state_dict(),
                "optimizer": job.optimizer.state_dict(),
                "scaler": job.take_step.scaler.state_dict(),
                "average": job.average.state_dict() if job.average else None,
                "method": method,
                "sums": sums,
                "rng": rng,
                "epoch_rng": epoch_rng,
                "steps_per_epoch": job.source.steps_per_epoch,
                "images": job.images,
                "loader_batch": job.loader_batch,
            },
        )

    def restore(self) -> tuple[RunState, Interrupted | None]:
        """Load the newest checkpoint, except for what an interrupted epoch itself restores.

        Returns:
            The progress of the run, and the epoch in which the checkpoint was written. That is None
            if it was written after an epoch, or if there is no checkpoint, because the run did not
            reach one or has already ended.

        Raises:
            UserError: the checkpoint does not fit this job, or is missing or damaged.
        """
        job = self.job
        saved = checkpoint.load_newest(self.run.checkpoints, self.say)
        if saved is None:
            return self._without_checkpoint(), None
        state = RunState(**saved["progress"])
        within = state.step != min(job.total, state.epoch * job.source.steps_per_epoch)
        self._check_data(state.step, saved)
        try:
            job.model.load_state_dict(saved["model"])
        except RuntimeError as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"cannot resume {self.run.folder} with another model: {reason}") from e
        job.optimizer.load_state_dict(saved["optimizer"])
        match_layout(job.optimizer)
        job.take_step.scaler.load_state_dict(saved["scaler"])
        if job.average:
            job.average.load_state_dict(saved["average"])
        job.method.load_state_dict(saved["method"])
        self.say(f"resuming {self.run.folder} at step {state.step} of {job.total}")
        rng = saved["rng"]
        if not within:
            self.random.restore(rng, state.step)
            return state, None
        return state, Interrupted(saved["sums"], rng, saved["epoch_rng"])

    def _without_checkpoint(self) -> RunState:
        """Return the progress of a run without checkpoints, which has ended or starts anew."""
        rows = self.run.history()
        if self.run.ended(self.job.config.epochs):
            scores = [row.get("val_worst_case", 0.0) for row in rows]
            last = self.job.config.select == "last" or "val_worst_case" not in rows[-1]
            return RunState(
                step=rows[-1]["step"],
                epoch=len(rows),
                best_epoch=len(rows) if last else 1 + scores.index(max(scores)),
                train_seconds=rows[-1]["train_seconds"],
                history=rows,
            )
        if rows:
            raise UserError(
                f"cannot resume {self.run.folder}: it has {len(rows)} epochs and no "
                f"checkpoint; train it anew, with the settings in {self.run.config} and another out"
            )
        self.say(f"{self.run.folder} has no checkpoint yet: it starts anew")
        return RunState()

    def _check_data(self, step: int, saved: Mapping[str, Any]) -> None:
        """Check that a run can resume with this number of processes, and with these data.

        Args:
            step: the run's steps so far.
            saved: its checkpoint.

        Raises:
            UserError: it cannot, and the message names what differs.
        """
        job = self.job
        steps, expected = saved["steps_per_epoch"], job.source.steps_per_epoch
        begun, now = len(saved["rng"]), processes.world_size()
        # Any number of processes draws the same order of images in memory, but not of a Dataset.
        batches_left = step % steps and step < job.total
        if begun != now and (job.own_batches or (batches_left and not job.images)):
            raise UserError(
                f"{self.run.folder} was run on {begun} processes and cannot resume on {now}, which "
                "would split a Dataset or DataLoader differently: use the same number"
            )
        if steps != expected:
            raise UserError(
                f"{self.run.folder} has epochs of {steps} steps, but these data give "
                f"{expected}: resume with the data and the batch size that it was started with"
            )
        images = saved["images"]
        if images != job.images:
            raise UserError(
                f"{self.run.folder} has {images or 'no'} training images in memory, but these data "
                f"give {job.images or 'none'}: resume with the data that it was started with"
            )
        batch = saved["loader_batch"]
        if batch and job.loader_batch and batch != job.loader_batch:
            raise UserError(
                f"{self.run.folder} took {batch} images in a step from its DataLoader, but this "
                f"one gives {job.loader_batch}: resume with the batch size that it was started with"
            )
        # For another number of processes Accelerate may add some.
        drew, draw = len(saved["rng"][0]["loader"]), len(job.source.generators())
        if begun == now and drew != draw:
            raise UserError(
                f"{self.run.folder} drew from {drew} random generators of its DataLoader and "
                f"samplers, but these have {draw}: resume with those that it was started with"
            )
        if begun != now:
            self.say(
                "results will differ from an uninterrupted run's: it was started on "
                f"{begun} processes and resumes on {now}, which draw other random numbers"
            )
