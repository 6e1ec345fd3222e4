"""The folder of a run: its files, and the rules for creating, replacing and resuming one."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from surestep import environment, files, methods
from surestep.config import CHANGEABLE, FitSettings, RunConfig, parse, read_yaml, to_yaml
from surestep.errors import UserError
from surestep.training.state import has_stopped

C = TypeVar("C", bound=FitSettings)
_ENTRIES = {
    *("config.yaml", "metrics.jsonl", "model.safetensors", "checkpoints", "report.html"),
    *("tensorboard", "judged.json", "environment.json"),
}
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that file managers leave in folders."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run and the paths in it."""

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved settings, from which the run can be repeated."""
        return self.folder / "config.yaml"

    @property
    def environment(self) -> Path:
        """The versions and the machine that the run was started with."""
        return self.folder / "environment.json"

    @property
    def metrics(self) -> Path:
        """The history: one JSON row per epoch."""
        return self.folder / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        """The selected weights."""
        return self.folder / "model.safetensors"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.folder / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, from which a run is resumed."""
        return self.folder / "checkpoints"

    def history(self) -> list[dict[str, Any]]:
        """Return the rows of ``metrics`` so far.

        Raises:
            UserError: the file is damaged.
        """
        try:
            return [json.loads(line) for line in self.metrics.read_text("utf-8").splitlines()]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as e:
            raise UserError(
                f"{self.metrics} is damaged ({e}): restore it, or train the run again"
            ) from e

    def ended(self, epochs: float) -> bool:
        """Tell whether the last epoch has its row and the selected weights are saved.

        A run that ``on_epoch`` stopped has ended, too.

        Raises:
            UserError: the history is damaged.
        """
        rows = self.history()
        if not rows or not self.weights.is_file():
            return False
        # The first epoch is whole, unless it is all. Rounded as by the loop, to whole steps: 1.1
        # epochs of 3 steps each are one.
        total = round(rows[0]["step"] * max(1, epochs))
        return has_stopped(rows) or rows[-1]["step"] >= total

    @classmethod
    def plan(
        cls, out: str | Path | None, *, resume: bool = False, overwrite: bool = False
    ) -> RunFolder | None:
        """Decide on the folder of a run without touching anything yet.

        Raises:
            UserError: the folder exists and is neither resumed nor overwritten; it would be
                overwritten but is not just a run folder; there is no run to resume.
        """
        if out is None:
            if resume:
                raise UserError("resume=True needs the run folder: give out=...")
            return None
        run = cls(Path(out))
        if resume:
            if not run.config.is_file():
                raise UserError(f"cannot resume {out}: it is not a run folder (no config.yaml)")
            return run
        if not run.folder.exists() or (run.folder.is_dir() and not run._entries()):
            return run
        if not overwrite:
            raise UserError(
                f"{out} exists already: choose another --out, go on with --resume, or replace it "
                "with --overwrite (in Python: out, resume=True, overwrite=True)"
            )
        run._check_own()
        return run

    def _entries(self) -> list[str]:
        """Return the sorted names of the folder's entries, without file managers' litter."""
        return sorted(p.name for p in self.folder.iterdir() if p.name not in _LITTER)

    def _check_own(self) -> None:
        """Refuse to delete a folder that is not a run folder, or that also holds other files.

        Raises:
            UserError: naming the reason.
        """
        then = "so it is not deleted"
        if not self.config.is_file():
            raise UserError(f"{self.folder} is not a run folder (it has no config.yaml), {then}")
        for name in self._entries():
            if not (name in _ENTRIES or name.endswith(".part") or ".state" in name):
                raise UserError(f"{self.folder} holds {name} besides a run: move it away first")
        if "method" not in read_yaml(self.config):
            raise UserError(
                f"{self.folder} is not a run folder (its config.yaml names no method), {then}"
            )

    def make(self, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Create the folder and write the settings.

        Args:
            settings: what ``config.yaml`` is to hold.
            overwrite: delete the old run there; otherwise the folder must be empty, since another
                run may have started there after this one was planned.

        Raises:
            UserError: the folder cannot be created or written to, or another run has taken it.
        """
        text = to_yaml(settings)
        try:
            if overwrite and self.folder.exists():
                with self.held() if self.config.is_file() else nullcontext():
                    self._empty()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim(text)
        except FileExistsError as e:
            raise UserError(
                f"{self.folder} was taken by another run just now: choose another --out"
            ) from e
        except OSError as e:
            reason = e.strerror or e
            raise UserError(f"cannot make the run folder {self.folder}: {reason}") from e

    def _empty(self) -> None:
        """Delete what is in the folder, ``config`` last: without that file it is no run folder.

        The folder itself stays: network drives keep a file in it while ``config`` is held open.

        Raises:
            OSError: the folder is a link, or an entry cannot be deleted.
        """
        if self.folder.is_symlink():
            raise OSError("it is a link, and what it leads to is not deleted")
        for entry in sorted(self.folder.iterdir(), key=lambda path: path == self.config):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock an existing run folder, so that only one process can train in it.

        Raises:
            UserError: another process holds it.
        """
        if os.name == "nt":  # it has no such locks, and cannot delete an open file
            yield
            return
        with self.config.open("r+b") as f:
            if not files.lock(f):
                raise UserError(
                    f"{self.folder} is being trained by another process: wait for it, stop it, or "
                    "choose another --out"
                )
            try:
                yield
            finally:
                files.unlock(f)

    def _claim(self, text: str) -> None:
        """Write ``config`` atomically: if two runs find an empty folder, only one can claim it.

        Raises:
            FileExistsError: the other run did, or the folder is no longer empty.
        """
        part = self.folder / f".{self.config.name}.{uuid.uuid4().hex}.part"
        try:
            files.write_atomically(part, text)
            if any(not name.endswith(".part") for name in self._entries()):
                raise FileExistsError
            try:
                os.link(part, self.config)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                with self.config.open("x", encoding="utf-8") as f:
                    f.write(text)
        finally:
            part.unlink(missing_ok=True)

    def note_environment(self) -> list[str]:
        """Record a new run's environment; for a resumed run, return how it differs from then."""
        now, before = environment.describe(), self.recorded_environment()
        if before is not None:
            changed = environment.differences(before, now)
            return [f"{c.name} {c.before} then, {c.now} now" for c in changed]
        files.write_atomically(self.environment, json.dumps(now, indent=2) + "\n")
        return []

    def recorded_environment(self) -> dict[str, Any] | None:
        """Return the recorded environment; None for a new run."""
        try:
            found = json.loads(self.environment.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def as_begun(self, config: C) -> C:
        """Return the settings, with "auto" replaced by the engine and precision of the run's start.

        Another engine rounds differently, so a resumed run must not pick again. An engine or
        precision that is given explicitly stays, for ``check_same`` to judge.
        """
        begun, settings = read_yaml(self.config), config.model_dump()
        for name in ("engine", "precision"):
            if settings[name] == "auto":
                settings[name] = begun.get(name, "auto")
        return parse(type(config), settings, f"{self.config}: ")

    def check_same(self, settings: Mapping[str, Any]) -> list[str]:
        """Refuse to resume with settings other than those the run was started with.

        Returns:
            A line for each of ``CHANGEABLE``, which may differ, that does.

        Raises:
            UserError: naming the first of the others that differs.
        """
        # A setting that did not exist when the run started counts as its default.
        defaults = {k: f.default for k, f in RunConfig.model_fields.items()}
        defaults["bounds"] = [0.0, 1.0]
        known = {f.name: f.default for f in fields(methods.get(str(settings["method"])))}
        defaults |= {k: known[k] for k in methods.SHARED if k in settings}
        begun = {**{k: defaults.get(k) for k in settings}, **read_yaml(self.config)}
        before = {name: known[name] for name in settings["params"]}
        begun["params"] = {**before, **(begun["params"] or {})}
        changed = []
        for name, then in begun.items():
            now = settings.get(name)
            if then == now:
                continue
            if name not in CHANGEABLE:
                raise UserError(
                    f"cannot resume {self.folder} with {name} {now!r}: it was begun with {then!r}"
                )
            computes = name in ("device", "max_memory")
            more = "; results may differ from an uninterrupted run's" if computes else ""
            changed.append(f"{name} {str(then).lower()} then, {str(now).lower()} now{more}")
        return changed
