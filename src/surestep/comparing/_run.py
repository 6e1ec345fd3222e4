"""One run of a comparison: trained if it has to be, judged, and saved step by step."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from surestep import __version__, auditing, evaluation, files, methods, models, runs
from surestep.clock import each_minute
from surestep.comparing import _process
from surestep.comparing._outcome import Outcome
from surestep.comparing._table import Tell
from surestep.config import RunConfig, parse
from surestep.data import Images
from surestep.errors import UserError
from surestep.training import checkpoint
from surestep.training.run_folder import RunFolder
from surestep.weights import read_signature

OUTCOME_FILE = "judged.json"
_JUDGED_BY = (
    *("model", "normalize", "head", "head_scale", "mean_sparse"),
    *("dataset", "image_size", "norm", "eps"),
)
"""The settings of a run that, besides its weights, determine the results of judging it."""


@dataclass(frozen=True)
class Judging:
    """How every run is judged.

    Attributes:
        attacks: their names.
        audit: budget of the audit; None for no audit.
        n: number of images.
        split: the split that they are from.
        batch_size: images attacked at a time; None for the defaults. Saved results may have
            another.
    """

    attacks: tuple[str, ...]
    audit: str | None
    n: int
    split: str = "test"
    batch_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "attacks": list(self.attacks),
            "audit": self.audit,
            "n": self.n,
            "split": self.split,
        }

    def options(self) -> dict[str, Any]:
        """Return the arguments that evaluations and audits have in common."""
        sized = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return {"n": self.n, **sized}


@dataclass(frozen=True)
class Entrant:
    """A run in a comparison, which may still have to be trained.

    Attributes:
        label: its name in the table and on progress lines.
        folder: the run folder.
        config: its settings, with every hyperparameter filled in.
        outcome_path: where its outcome is saved; None if nothing is kept.
        trains: whether the comparison trains it; otherwise the run was given.
        device: where a given run is judged; None for the run's own device setting.
    """

    label: str
    folder: Path
    config: RunConfig
    outcome_path: Path | None
    trains: bool
    device: str | None = None

    @property
    def run(self) -> RunFolder:
        """The paths in its folder."""
        return RunFolder(self.folder)

    @property
    def name(self) -> str:
        """Its name in errors: a given folder's whole path, since last names may coincide."""
        return self.label if self.trains else str(self.folder)


def resolved(config: RunConfig) -> RunConfig:
    """Fill in every hyperparameter and make paths absolute, as in a run folder."""
    method = runs.build_method(config)
    own = methods.settle(method, config)
    config = runs.from_anywhere(config)
    return parse(RunConfig, {**config.model_dump(), **own, "params": method.params()})


def is_finished(run: RunFolder, config: RunConfig) -> bool:
    """Tell whether a run is trained to the end and its weights are written.

    At the end of an epoch, the checkpoint is written first, then the weights, then the row of
    metrics; a kill may come in between.
    """
    if config.mean_sparse is not None:  # made by `surestep harden`, always complete
        return run.weights.is_file()
    if not run.ended(config.epochs):
        return False
    newest = checkpoint.newest_step(run.checkpoints)
    # If there is none, they were removed to save space.
    return newest is None or newest >= int(run.history()[-1]["step"])


def read_saved_outcome(entrant: Entrant, asked: Judging) -> Outcome:
    """Return the saved outcome of a run, or an empty one, without writing anything.

    Raises:
        UserError: the run folder has other settings, the saved outcome is damaged or was made with
            other settings, or the code of the method has changed.
    """
    _check_settings(entrant)
    fresh = Outcome(asked.to_dict())
    path = entrant.outcome_path
    if path is None or not path.is_file():
        # The folder of a run that an earlier comparison trained has its peak memory.
        path = entrant.folder / OUTCOME_FILE
    found = Outcome.read(path)
    if found is None:
        return fresh
    _check_code(entrant, found.code)
    if found.settings == fresh.settings:
        return found
    if path != entrant.outcome_path:
        return replace(found, settings=fresh.settings, subject=None, evaluation=None, audit=None)
    name = next(k for k, v in fresh.settings.items() if found.settings.get(k) != v)
    one, other = (_told(s.settings.get(name)) for s in (found, fresh))
    raise UserError(
        f"{path} was made with {name} {one}, but this comparison has {other}: give the same "
        "value, or another --out"
    )


def _check_settings(entrant: Entrant) -> None:
    """Refuse to continue a run that was started with other settings.

    Raises:
        UserError: a setting differs.
    """
    if not entrant.trains or not entrant.run.config.is_file():
        return
    begun = resolved(runs.read_config(entrant.folder))
    wanted = entrant.run.as_begun(entrant.config)
    for name in RunConfig.model_fields:
        one, other = getattr(begun, name), getattr(wanted, name)
        if one != other:
            raise UserError(
                f"{entrant.folder} was started with {name} {one!r}, but this comparison has "
                f"{other!r}: give the same value, or another --out"
            )


def code_of(method: str) -> str | None:
    """Return a digest of the source file of a plug-in's method; None for surestep's own methods."""
    module = methods.get(method).__module__
    if module.partition(".")[0] == "surestep":
        return None
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):  # the method has no source file
        return None
    return files.digest(source.encode())


def _check_code(entrant: Entrant, before: str | None) -> None:
    """Refuse a run whose method has changed since it was trained.

    Raises:
        UserError: the method's code has changed.
    """
    if entrant.trains and before is not None and before != code_of(entrant.config.method):
        raise UserError(
            f"the code of {entrant.config.method} has changed since {entrant.folder} was trained: "
            "delete that folder, or give another --out"
        )


def _told(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value or "none")


@dataclass
class Work:
    """The work on a run: to train, evaluate and audit it, whichever is missing.

    Attributes:
        entrant: the run.
        outcome: what is known of it so far, at first as from ``read_saved_outcome``.
        asked: how to judge it.
        images: the images to judge it on, with labels in the data's class order.
        told: the run as progress lines name it.
        tell: called with one line of text on what is being done.
    """

    entrant: Entrant
    outcome: Outcome
    asked: Judging
    images: Images
    told: str
    tell: Tell

    def complete(self) -> Outcome:
        """Do what is missing, saving the outcome after each step, and return it.

        Raises:
            TrainingFailed: the training ended without a result.
            UserError: the run cannot be loaded or judged, it does not know all classes of the data,
                or a file cannot be written.
        """
        if self.entrant.trains and not is_finished(self.entrant.run, self.entrant.config):
            self._train()
        self._drop_stale_results()
        if self.outcome.evaluation is None:
            self._evaluate()
        if self.asked.audit is not None and self.outcome.audit is None:
            self._audit(self.asked.audit)
        return self.outcome

    def _train(self) -> None:
        """Train the run; note its code, weights and peak memory."""
        run, config = self.entrant.run, self.entrant.config
        self.tell(f"training {self.told}")
        # Read now: it may be edited during the training.
        self.outcome = replace(self.outcome, code=code_of(config.method))
        resumed = bool(checkpoint.found(run.checkpoints))
        try:
            peak = _process.train(run, config, self.tell)
        except BaseException:
            if checkpoint.found(run.checkpoints):
                self._save()  # a resume must not mix two versions of the code
            raise
        weights = files.digest(run.weights.read_bytes())
        if weights != self.outcome.weights:
            # The peak of the last of several processes is not the training's.
            peak = None if resumed else peak
            self._save(weights=weights, peak_memory_mb=peak, resumed=resumed)

    def _drop_stale_results(self) -> None:
        """Forget results of other weights, settings, images or versions."""
        images = self._numbered.first(self.asked.n)  # reads the weights file, if it can be read
        weights = files.digest(self.entrant.run.weights.read_bytes())
        if weights != self.outcome.weights:  # the peak memory was that of another training
            known = replace(self.outcome, weights=weights, peak_memory_mb=None, resumed=False)
            self.outcome = known
        subject = _judged_digest(self.entrant.config, weights, images)
        if subject == self.outcome.subject:
            return
        if self.outcome.evaluation is not None:
            self.tell(
                f"judging {self.told} anew: its weights, settings or model file, the images or "
                "surestep's version changed"
            )
        self._save(subject=subject, evaluation=None, audit=None)

    def _evaluate(self) -> None:
        """Evaluate the run, or continue a stopped evaluation."""
        run, path = self._loaded, self.entrant.outcome_path
        self.tell(f"evaluating {self.told}")
        size = f"-{self.asked.batch_size}" if self.asked.batch_size else ""
        state = path and path.with_name(f"judged-{self.outcome.subject}{size}.state")
        found = evaluation.evaluate(
            run.model,
            self._numbered,
            run.threat,
            self.asked.attacks,
            state=state,
            tell=each_minute(self.tell),
            **self.asked.options(),
        )
        self._save(evaluation=found.to_dict())
        if state:
            state.unlink(missing_ok=True)

    def _audit(self, budget: str) -> None:
        run = self._loaded
        self.tell(f"auditing {self.told}")
        found = auditing.audit(
            run.model,
            self._numbered,
            run.threat,
            budget=budget,
            tell=lambda text: self.tell(f"  {text}"),
            **self.asked.options(),
        )
        self._save(audit=found.to_dict())

    @cached_property
    def _numbered(self) -> Images:
        """The images, with labels in the class order of the trained run."""
        classes = read_signature(self.entrant.run.weights).classes
        return runs.in_class_order_of(self.entrant.name, classes, self.images)

    @cached_property
    def _loaded(self) -> runs.Run:
        if self._numbered is not self.images:
            name = self.entrant.name
            self.tell(f"the labels are renumbered to the class order of {name}, by class name")
        return runs.load(self.entrant.folder, self.entrant.device or self.entrant.config.device)

    def _save(self, **known: Any) -> None:
        """Add to the outcome, and save it."""
        self.outcome = replace(self.outcome, **known)
        if self.entrant.outcome_path is not None:
            self.outcome.write(self.entrant.outcome_path)


def _judged_digest(config: RunConfig, weights: str, images: Images) -> str:
    """Return a digest of what is judged, on which images, and by which version of surestep.

    A model is its weights and settings, such as MeanSparse's threshold. A data set's name does not
    determine its images: the file or folder behind it may change. So may a model's own file.
    """
    settings = config.model_dump(mode="json", include=set(_JUDGED_BY))
    subject = [__version__, weights, settings, files.digest(images.stored(), images.y)]
    if models.in_file(config.model) and (file := models.file_of(config.model)).is_file():
        subject.append(files.digest(file.read_bytes()))
    return files.digest(json.dumps(subject, sort_keys=True).encode())


def numbers_of(entrant: Entrant, outcome: Outcome) -> dict[str, float | None]:
    """Return the numbers of one run that was evaluated, with the keys of ``COLUMNS``."""
    found = outcome.evaluation
    assert found is not None
    robust = found["robust_accuracy"]
    history = entrant.run.history()  # a hardened run has none

    def under(name: str) -> float | None:
        """Return the accuracy under an attack, the lower one if it was also run as NAME-bpda."""
        return min((robust[k] for k in (name, f"{name}-bpda") if k in robust), default=None)

    pgd = [value for name, value in robust.items() if name.startswith("pgd-")]
    return {
        "clean_accuracy": found["clean_accuracy"],
        "fgsm": under("fgsm"),
        "pgd": min(pgd, default=None),
        "autoattack": under("autoattack"),
        "worst_case_accuracy": found["worst_case_accuracy"],
        "passes": runs.passes_of(entrant.config),
        "seconds": history[-1].get("train_seconds") if history else None,
        "peak_memory_mb": outcome.peak_memory_mb,
    }
