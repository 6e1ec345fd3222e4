"""What a run writes down to go on from, and how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from accelerate.utils import gather_object

from surestep.errors import UserError
from surestep.training import checkpoint
from surestep.training.engine import match_layout
from surestep.training.preparing import Job
from surestep.training.randomness import RandomStates
from surestep.training.run_folder import RunFolder
from surestep.training.state import RunState, Sums


class Checkpoints:
    """The checkpoints of a run: everything that the rest of it depends on.

    Args:
        job: whose state is written and restored.
        run: its folder.
        random: the states of its processes.
        say: told what the user should know.
    """

    def __init__(
        self, job: Job, run: RunFolder, random: RandomStates, say: Callable[[str], None]
    ) -> None:
        self.job, self.run, self.random, self.say = job, run, random, say

    def save(self, at: RunState, sums: Sums, epoch_rng: list[dict[str, Any]]) -> None:
        """Write one; every process must call this.

        Args:
            at: how far the run is.
            sums: of the running epoch.
            epoch_rng: the random states that the epoch began with.
        """
        job, rng = self.job, self.random.of_all()
        parts = gather_object([sums.state_dict()])
        # Collective, so before the other processes return: it gathers rows of the batch.
        method = job.method.state_dict()
        if not job.accelerator.is_main_process:
            return
        checkpoint.save(
            self.run.checkpoints,
            at.step,
            {
                "progress": asdict(at),
                "model": job.model.state_dict(),
                "optimizer": job.optimizer.state_dict(),
                "scaler": job.take_step.scaler.state_dict(),
                "average": job.average.state_dict() if job.average else None,
                "method": method,
                "sums": parts,
                "rng": rng,
                "epoch_rng": epoch_rng,
                "steps_per_epoch": job.source.steps_per_epoch,
            },
        )

    def restore(self) -> tuple[RunState, dict[str, Any] | None]:
        """Load the newest one, but for what the epoch itself restores.

        Returns:
            How far the run is, and what the checkpoint holds, None if the run did not come to one,
            or has come to its end.

        Raises:
            UserError: it does not go with this job, or is lost.
        """
        job = self.job
        state = checkpoint.load_newest(self.run.checkpoints, self.say)
        if state is None:
            return self._without(), None
        self._check_steps(len(state["rng"]), state["steps_per_epoch"])
        try:
            job.model.load_state_dict(state["model"])
        except RuntimeError as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"cannot resume {self.run.folder} with another model: {reason}") from e
        job.optimizer.load_state_dict(state["optimizer"])
        match_layout(job.optimizer)
        job.take_step.scaler.load_state_dict(state["scaler"])
        if job.average:
            job.average.load_state_dict(state["average"])
        job.method.load_state_dict(state["method"])
        at = RunState(**state["progress"])
        self.say(f"resuming {self.run.folder} at step {at.step} of {job.total}")
        return at, state

    def _without(self) -> RunState:
        """Return how far a run without checkpoints is: at its end, or at its beginning."""
        rows = self.run.history()
        if self.run.ended(self.job.config.epochs):
            scores = [row.get("val_worst_case", 0.0) for row in rows]
            last = self.job.config.select == "last" or "val_worst_case" not in rows[-1]
            return RunState(
                step=self.job.total,
                epoch=len(rows),
                best_epoch=len(rows) if last else 1 + scores.index(max(scores)),
                train_seconds=rows[-1]["train_seconds"],
                history=rows,
            )
        if len(rows) > 1:
            raise UserError(
                f"cannot resume {self.run.folder}: it has {len(rows)} epochs and no "
                f"checkpoint; train it anew with --config {self.run.config}, another --out"
            )
        return RunState()

    def _check_steps(self, begun: int, steps: int) -> None:
        """Let a run go on with another number of processes where its steps stay what they were."""
        now, expected = self.job.accelerator.num_processes, self.job.source.steps_per_epoch
        if begun == now:
            if steps != expected:
                raise UserError(
                    f"{self.run.folder} has epochs of {steps} steps, these data give {expected}: "
                    "resume with the data and the batch size that it was begun with"
                )
            return
        if not self.job.images:
            raise UserError(
                f"{self.run.folder} was run on {begun} processes, this is {now}, which share a "
                "Dataset or DataLoader out otherwise: resume with the same number"
            )
        self.say(
            f"results will differ from an uninterrupted run's: it was started on {begun} processes "
            f"and resumes on {now}, which draw other random numbers"
        )
