"""One run of a comparison: trained in its own process, judged, and saved step by step."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surestep import __version__, auditing, evaluation, files, methods, models, runs
from surestep.clock import each_minute
from surestep.comparing._table import Tell
from surestep.config import RunConfig, parse, to_yaml
from surestep.data import Images
from surestep.devices import free_cached_memory
from surestep.errors import UserError
from surestep.training import checkpoint
from surestep.training.run_folder import RunFolder

OUTCOME_FORMAT, OUTCOME_VERSION = "surestep-outcome", 1
OUTCOME_FILE = "comparison.json"

# Starts the training and reports its exit code and peak memory. This is a process in between, since
# on Linux a process inherits the peak of the one it was forked from, and the comparison's own peak,
# with its attacks, may be far above the training's. When its standard input closes, the comparison
# has ended, for whatever reason, and it terminates the training: the next comparison must have the
# run folder to itself.
MEASURE = """
import os, signal, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
signal.signal(signal.SIGINT, signal.SIG_IGN)
def watch():
    os.read(0, 1)
    if os.name == "nt":  # there it kills at once: a training that got Ctrl-C too saves its state
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            pass
    os.kill(child.pid, signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
if hasattr(os, "wait4"):
    _, status, usage = os.wait4(child.pid, 0)
    code, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss
else:
    code, peak = child.wait(), 0
print(code, peak, flush=True)
os._exit(0)
"""
_ERROR = "surestep: error: "
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
    def name(self) -> str:
        """Its name in errors: a given folder's whole path, since last names may coincide."""
        return self.label if self.trains else str(self.folder)


class Failed(Exception):
    """A training that ended without a result.

    Attributes:
        is_bug: whether the cause is a bug in surestep.
    """

    def __init__(self, message: str, *, is_bug: bool) -> None:
        super().__init__(message)
        self.is_bug = is_bug


def resolved(config: RunConfig) -> RunConfig:
    """Fill in every hyperparameter and make paths absolute, as in a run folder."""
    method = runs.build_method(config)
    own = methods.settle(method, config)
    config = runs.from_anywhere(config)
    return parse(RunConfig, {**config.model_dump(), **own, "params": method.params()})


def is_finished(folder: Path, config: RunConfig) -> bool:
    """Tell whether a run is trained to the end and its weights are written.

    At the end of an epoch, the checkpoint is written first, then the weights, then the row of
    metrics; a kill may come in between.
    """
    run = RunFolder(folder)
    if config.mean_sparse is not None:  # made by `surestep harden`, always complete
        return run.weights.is_file()
    if not run.ended(config.epochs):
        return False
    steps = [int(path.stem.removeprefix("step-")) for path in checkpoint.found(run.checkpoints)]
    # If there are none, they were removed to save space.
    return not steps or max(steps) >= int(run.history()[-1]["step"])


def read_saved_outcome(entrant: Entrant, asked: Judging) -> dict[str, Any]:
    """Return the saved outcome of a run, or an empty one, without writing anything.

    Raises:
        UserError: the run folder has other settings, the saved outcome is damaged or was made with
            other settings, or the code of the method has changed.
    """
    _check_settings(entrant)
    fresh: dict[str, Any] = {
        "format": OUTCOME_FORMAT,
        "version": OUTCOME_VERSION,
        "settings": asked.to_dict(),
        "weights": None,
        "subject": None,
        "peak_memory_mb": None,
        "resumed": False,
        "code": None,
        "evaluation": None,
        "audit": None,
    }
    path = entrant.outcome_path
    if path is None or not path.is_file():
        # The folder of a run that an earlier comparison trained has its peak memory.
        path = entrant.folder / OUTCOME_FILE
    found = read_outcome(path)
    if found is None:
        return fresh
    _check_code(entrant, found.get("code"))
    before = found["settings"]
    if before == fresh["settings"]:
        return found
    if path != entrant.outcome_path:
        kept = ("weights", "peak_memory_mb", "resumed", "code")
        return fresh | {k: found.get(k) for k in kept}
    name = next(k for k, v in fresh["settings"].items() if before.get(k) != v)
    one, other = (_told(s.get(name)) for s in (before, fresh["settings"]))
    raise UserError(
        f"{path} was made with {name} {one}, but this comparison has {other}: give the same "
        "value, or another --out"
    )


def _check_settings(entrant: Entrant) -> None:
    """Refuse to continue a run that was started with other settings.

    Raises:
        UserError: a setting differs.
    """
    if not entrant.trains or not RunFolder(entrant.folder).config.is_file():
        return
    begun = resolved(runs.read_config(entrant.folder))
    wanted = RunFolder(entrant.folder).as_begun(entrant.config)
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


def read_outcome(path: Path) -> dict[str, Any] | None:
    """Read the outcome of a run; None if there is none.

    Raises:
        UserError: the file cannot be read or is not an outcome in this version's format.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): delete it to judge the run again") from e
    kind = (OUTCOME_FORMAT, OUTCOME_VERSION)
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != kind:
        raise UserError(f"{path} is not an outcome of a run: delete it, or give another --out")
    return found


def complete_run(
    entrant: Entrant, outcome: dict[str, Any], asked: Judging, images: Images, told: str, tell: Tell
) -> dict[str, Any]:
    """Train, evaluate and audit a run, whichever is missing, saving the outcome after each step.

    Args:
        entrant: the run.
        outcome: what is known of it, as from ``read_saved_outcome``.
        asked: how to judge it.
        images: the images to judge it on, with labels in the data's class order.
        told: the run as progress lines name it.
        tell: called with one line of text on what is being done.

    Returns:
        The complete outcome.

    Raises:
        Failed: the training ended without a result.
        UserError: the run cannot be loaded or judged, it does not know all classes of the data, or
            a file cannot be written.
    """
    if entrant.trains and not is_finished(entrant.folder, entrant.config):
        tell(f"training {told}")
        outcome = _trained(entrant, outcome, tell)
    classes = files.read_signature(RunFolder(entrant.folder).weights).classes
    numbered = runs.in_class_order_of(entrant.name, classes, images)
    outcome = _without_stale_results(entrant, outcome, asked, numbered, told, tell)
    unjudged = outcome["evaluation"] is None
    unaudited = asked.audit is not None and outcome["audit"] is None
    if unjudged or unaudited:
        if numbered is not images:
            tell(f"the labels are renumbered to the class order of {entrant.name}, by class name")
        run = runs.load(entrant.folder, entrant.device or entrant.config.device)
        if unjudged:
            tell(f"evaluating {told}")
            outcome = _evaluated(entrant, outcome, run, asked, numbered, tell)
        if unaudited:
            tell(f"auditing {told}")
            outcome = _audited(entrant, outcome, run, asked, numbered, tell)
    return outcome


def _trained(entrant: Entrant, outcome: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Train the run; return the outcome with its code, weights and peak memory."""
    code = code_of(entrant.config.method)  # read now: it may be edited during the training
    outcome = outcome | {"code": code}
    resumed = bool(checkpoint.found(RunFolder(entrant.folder).checkpoints))
    try:
        peak = _train(entrant, tell)
    except BaseException:
        if checkpoint.found(RunFolder(entrant.folder).checkpoints):
            _saved(entrant, outcome)  # a resume must not mix two versions of the code
        raise
    weights = _weights_digest(entrant)
    if weights != outcome["weights"]:
        # The peak of the last of several processes is not the training's.
        known = {"peak_memory_mb": None if resumed else peak, "resumed": resumed}
        outcome = outcome | {"weights": weights, **known}
    return outcome


def _without_stale_results(
    entrant: Entrant, outcome: dict[str, Any], asked: Judging, images: Images, told: str, tell: Tell
) -> dict[str, Any]:
    """Return the outcome without results of other weights, settings, images or versions."""
    weights = _weights_digest(entrant)
    if weights != outcome["weights"]:  # the peak memory was that of another training
        outcome = outcome | {"weights": weights, "peak_memory_mb": None, "resumed": False}
    subject = _judged_digest(entrant.config, weights, images.first(asked.n))
    if subject == outcome.get("subject"):
        return outcome
    if outcome["evaluation"] is not None:
        tell(
            f"judging {told} anew: its weights, settings or model file, the images or "
            "surestep's version changed"
        )
    return _saved(entrant, outcome | {"subject": subject, "evaluation": None, "audit": None})


def _evaluated(
    entrant: Entrant,
    outcome: dict[str, Any],
    run: runs.Run,
    asked: Judging,
    images: Images,
    tell: Tell,
) -> dict[str, Any]:
    """Evaluate the run, or continue a stopped evaluation; return the outcome with the result."""
    size = f"-{asked.batch_size}" if asked.batch_size else ""
    path = entrant.outcome_path
    state = path and path.with_name(f"comparison-{outcome['subject']}{size}.state")
    found = evaluation.evaluate(
        run.model,
        images,
        run.threat,
        asked.attacks,
        state=state,
        tell=each_minute(tell),
        **asked.options(),
    )
    outcome = _saved(entrant, outcome | {"evaluation": found.to_dict()})
    if state:
        state.unlink(missing_ok=True)
    return outcome


def _audited(
    entrant: Entrant,
    outcome: dict[str, Any],
    run: runs.Run,
    asked: Judging,
    images: Images,
    tell: Tell,
) -> dict[str, Any]:
    """Audit the run; return the outcome with the result."""
    assert asked.audit is not None
    judged = auditing.audit(
        run.model,
        images,
        run.threat,
        budget=asked.audit,
        tell=lambda text: tell(f"  {text}"),
        **asked.options(),
    )
    return _saved(entrant, outcome | {"audit": judged.to_dict()})


def _weights_digest(entrant: Entrant) -> str:
    return files.digest(RunFolder(entrant.folder).weights.read_bytes())


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


def _saved(entrant: Entrant, outcome: dict[str, Any]) -> dict[str, Any]:
    """Save the outcome, and return it."""
    if entrant.outcome_path is not None:
        files.make_folder(entrant.outcome_path.parent)
        files.write_atomically(entrant.outcome_path, json.dumps(outcome, indent=2) + "\n")
    return outcome


def _train(entrant: Entrant, tell: Tell) -> float | None:
    """Train a run, or resume it, in its own process; return its peak memory in MB.

    Raises:
        Failed: the training ended without a result.
        KeyboardInterrupt: the training was stopped by Ctrl-C.
    """
    free_cached_memory()  # leave it to the training process
    with tempfile.TemporaryDirectory() as folder:
        if RunFolder(entrant.folder).config.is_file():
            arguments = ["--resume", str(entrant.folder)]
        else:
            files.make_folder(entrant.folder.parent)
            settings = Path(folder) / "config.yaml"
            settings.write_text(to_yaml(entrant.config.model_dump(mode="json")), "utf-8")
            arguments = ["--config", str(settings), "--out", str(entrant.folder)]
        code, peak, error = _measured(["train", *arguments], tell)
    if code in (130, -2):  # by its own handler, or before that was installed
        raise KeyboardInterrupt
    if code < 0 or 128 < code < 192:  # above 128: by its own handler; Windows has larger codes
        number = -code if code < 0 else code - 128
        raise Failed(f"the training was killed by signal {number}", is_bug=False)
    if code:
        raise Failed(error or f"the training ended with exit code {code}", is_bug=code != 2)
    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return peak * unit / 1e6 if peak else None


def _measured(arguments: list[str], tell: Tell) -> tuple[int, int, str]:
    """Run a surestep command; return its exit code, ``ru_maxrss`` (0 if unknown) and error line."""
    command = [sys.executable, "-I", "-c", MEASURE, sys.executable, "-m", "surestep", *arguments]
    error = ""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        # "-m" would import a random.py of the working directory, which the command does not.
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        try:
            for line in process.stderr:
                if line.startswith(_ERROR):
                    error = line.removeprefix(_ERROR).strip()
                else:
                    tell(f"  {line.rstrip()}")
            code, peak = process.stdout.read().split() or ("-9", "0")
        except BaseException:
            # Closing its standard input makes it terminate the training; wait until it has.
            process.stdin.close()
            process.wait()
            raise
    return int(code), int(peak), error


def numbers_of(entrant: Entrant, outcome: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of one run, with the keys of ``COLUMNS``."""
    history = RunFolder(entrant.folder).history()  # a hardened run has none
    robust = outcome["evaluation"]["robust_accuracy"]

    def under(name: str) -> float | None:
        """Return the accuracy under an attack, the lower one if it was also run as NAME-bpda."""
        return min((robust[k] for k in (name, f"{name}-bpda") if k in robust), default=None)

    pgd = [value for name, value in robust.items() if name.startswith("pgd-")]
    return {
        "clean_accuracy": outcome["evaluation"]["clean_accuracy"],
        "fgsm": under("fgsm"),
        "pgd": min(pgd, default=None),
        "autoattack": under("autoattack"),
        "worst_case_accuracy": outcome["evaluation"]["worst_case_accuracy"],
        "passes": runs.build_method(entrant.config).cost(entrant.config.batch_size).total,
        "seconds": history[-1].get("train_seconds") if history else None,
        "peak_memory_mb": outcome["peak_memory_mb"],
    }
