"""Methods side by side: several seeds each, trained, attacked and audited alike, in one table.

Runs are trained one after another, each in a process of its own: seconds are only comparable
if runs do not share the machine, and peak memory can only be told of a whole process. What is
known of a run is kept as soon as it is known, so that a comparison that was stopped goes on.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import surestep
from surestep import auditing, evaluation, files, report, runs
from surestep import methods as zoo
from surestep.config import RunConfig, parse, to_yaml
from surestep.data import Images
from surestep.devices import pick_device
from surestep.errors import UserError
from surestep.evaluation import suite
from surestep.training import checkpoint
from surestep.training.run_folder import RunFolder

FORMAT, VERSION = "surestep-comparison", 1
OUTCOME_FORMAT, OUTCOME_VERSION = "surestep-outcome", 1

ATTACKS = ("fgsm", "pgd-100", "pgd-100-margin")
"""The attacks of a comparison, unless others are asked for."""

SEVERITY = ("pseudo-robust", "not robust", "inconclusive", "robust")
"""Verdicts, the most severe first: what looks robust and is not comes before what is plainly
not."""

COLUMNS = {
    "clean_accuracy": "clean",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "autoattack": "AutoAttack",
    "worst_case_accuracy": "worst case",
    "passes": "passes per image",
    "seconds": "training seconds",
    "peak_memory_mb": "peak memory MB",
}
"""The numbers of a row, with their titles."""

_SHARES = ("clean_accuracy", "fgsm", "pgd", "autoattack", "worst_case_accuracy")
_ALIKE = ("dataset", "norm", "eps")
# What may differ between two runs of one row: neither changes what is learnt.
_NO_MATTER = ("seed", "tensorboard", "checkpoint_every")

# Starts the training and reports its exit code and peak memory. A process in between, since on
# Linux a process starts with the peak of the one it was forked from, and the comparison's own,
# which attacks, may be far above the training's. When its standard input ends, the comparison is
# gone, however it died, and the training is ended: the next one must have the folder to itself.
_MEASURE = """
import os, signal, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
signal.signal(signal.SIGINT, signal.SIG_IGN)
def watch():
    os.read(0, 1)
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

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Number:
    """A number of a row.

    Attributes:
        mean: over the seeds.
        std: the sample standard deviation; None of a single seed.
        n: how many seeds.
    """

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Number:
        """Build the number of one value a seed."""
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread, len(values))


@dataclass(frozen=True)
class Row:
    """A method in a comparison.

    Attributes:
        method: its slug; where runs of one method differ in settings, with these.
        seeds: of its runs.
        numbers: by the keys of ``COLUMNS``; accuracies are shares. What is not known is not there.
        verdicts: how many runs got each verdict, the most severe first; empty without an audit.
    """

    method: str
    seeds: list[int]
    numbers: dict[str, Number]
    verdicts: dict[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> str | None:
        """The most severe verdict over the seeds; None without an audit."""
        return next(iter(self.verdicts), None)

    @property
    def verdict_text(self) -> str:
        """The most severe verdict, with the counts if the seeds disagree."""
        if len(self.verdicts) < 2:
            return self.verdict or ""
        (worst, count), *others = self.verdicts.items()
        rest = ", ".join(f"{name} {k}" for name, k in others)
        return f"{worst} ({count} of {sum(self.verdicts.values())}; {rest})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts; what is not known is None."""
        known = {key: asdict(number) for key, number in self.numbers.items()}
        return {
            "method": self.method,
            "seeds": self.seeds,
            **{key: known.get(key) for key in COLUMNS},
            "verdict": self.verdict,
            "verdicts": self.verdicts,
        }


@dataclass(frozen=True)
class Failure:
    """A run that gave no result.

    Attributes:
        run: its name in the comparison.
        message: why, in one line.
        fault: it was a fault of surestep, not a mistake or a full disk.
    """

    run: str
    message: str
    fault: bool = False


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        rows: one a method, in the order they were named.
        runs: one dict a run: its name, method, seed and numbers, verdict and its sentence.
        failures: runs that gave no result; they are in no row.
        dataset: what it was judged on.
        threat: norm and eps.
        n: test images.
        attacks: of the evaluation.
        audit: budget of the audits; None without.
        notes: what a reader of the table must know, a line each.
    """

    rows: list[Row]
    runs: list[dict[str, Any]]
    failures: list[Failure]
    dataset: str
    threat: dict[str, Any]
    n: int
    attacks: list[str]
    audit: str | None
    notes: list[str]

    @property
    def title(self) -> str:
        """What the numbers are, in a line."""
        threat = f"{self.threat['norm']} eps {self.threat['eps']:.4g}"
        counts = {len(row.seeds) for row in self.rows}
        spread = ""
        if max(counts) > 1:
            over = f" over {counts.pop()} seeds" if len(counts) == 1 else ""
            spread = f", mean ± standard deviation{over}"
        return f"accuracy in % on {self.n:,} test images of {self.dataset}, {threat}{spread}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the table as texts: the titles and one list a row.

        A column of which nothing is known is left out; so are the seeds where every row has the
        same number of them.
        """
        keys = [key for key in COLUMNS if any(key in row.numbers for row in self.rows)]
        audited = any(row.verdicts for row in self.rows)
        uneven = len({len(row.seeds) for row in self.rows}) > 1
        titles, body = ["method"], [[row.method] for row in self.rows]

        def add(title: str, texts: Iterable[str]) -> None:
            titles.append(title)
            for line, text in zip(body, texts, strict=True):
                line.append(text)

        if uneven:
            add("seeds", (str(len(row.seeds)) for row in self.rows))
        for key in keys:
            if key == "passes" and audited:
                add("verdict", (row.verdict_text for row in self.rows))
            add(COLUMNS[key], (_cell(key, row.numbers.get(key)) for row in self.rows))
        return titles, body

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, as written by ``--json``."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "dataset": self.dataset,
            "threat": self.threat,
            "n": self.n,
            "attacks": self.attacks,
            "audit": self.audit,
            "rows": [row.to_dict() for row in self.rows],
            "runs": self.runs,
            "failures": [asdict(failure) for failure in self.failures],
            "notes": self.notes,
        }

    def to_csv(self) -> str:
        """Return the table as CSV: unrounded, mean and deviation in columns of their own."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        parts = [f"{key}_{part}" for key in COLUMNS for part in ("mean", "std")]
        writer.writerow(["method", "seeds", *parts, "verdict", "verdicts"])
        for row in self.rows:
            numbers = [row.numbers.get(key) for key in COLUMNS]
            values = [v for number in numbers for v in (_mean(number), _std(number))]
            counts = "; ".join(f"{name} {count}" for name, count in row.verdicts.items())
            writer.writerow([_line(row.method), len(row.seeds), *values, row.verdict, counts])
        return text.getvalue()

    def to_markdown(self) -> str:
        """Return the table as Markdown, its notes below.

        Raises:
            UserError: tabulate is not installed.
        """
        titles, body = self.table()
        texts = [[_markdown(text) or "–" for text in line] for line in body]
        table = need_tabulate().tabulate(
            texts, titles, tablefmt="pipe", disable_numparse=True, colalign=_align(titles)
        )
        lines = "".join(f"- {_markdown(note)}\n" for note in self.notes)
        return f"{table}\n\n{_markdown(self.title)}\n" + (f"\n{lines}" if lines else "")

    def to_latex(self) -> str:
        """Return the table as LaTeX (package booktabs), title and notes as comments above.

        Raises:
            UserError: tabulate is not installed.
        """
        titles, body = self.table()
        texts = [[_line(text) or "–" for text in line] for line in body]
        table: str = need_tabulate().tabulate(
            texts, titles, tablefmt="latex_booktabs", disable_numparse=True, colalign=_align(titles)
        )
        text = "".join(f"% {_line(line)}\n" for line in (self.title, *self.notes)) + f"{table}\n"
        # tabulate escapes what LaTeX reads; these two would depend on the encoding it is told.
        return text.replace("±", "$\\pm$").replace("–", "--")


def need_tabulate() -> Any:
    """Import tabulate.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("tabulate")
    except ImportError as e:
        raise UserError(
            "Markdown and LaTeX tables need tabulate: pip install 'surestep[report]'"
        ) from e


def _align(titles: Sequence[str]) -> list[str]:
    return ["left" if title in ("method", "verdict") else "right" for title in titles]


def _line(text: str) -> str:
    """Bring a text onto one line: a line break would end the row."""
    return " ".join(text.split())


def _markdown(text: str) -> str:
    """Escape what Markdown or a browser would read as something else than text."""
    text = _line(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\|*_`[]" else c for c in text)


def _mean(number: Number | None) -> float | None:
    return None if number is None else number.mean


def _std(number: Number | None) -> float | None:
    return None if number is None else number.std


def _cell(key: str, number: Number | None) -> str:
    if number is None:
        return ""
    if key == "passes":
        # Counted, not measured: a deviation would say nothing.
        return f"{number.mean:.4g}"
    scale = 100 if key in _SHARES else 1
    digits = 1 if key in _SHARES or number.mean < 100 else 0
    text = f"{scale * number.mean:.{digits}f}"
    return text if number.std is None else f"{text} ± {scale * number.std:.{digits}f}"


def compare(
    methods: Sequence[str],
    seeds: int | Sequence[int] = 3,
    *,
    out: str | Path,
    preset: str | None = None,
    attacks: Sequence[str] | None = None,
    budget: str | None = None,
    audit: str | None = "quick",
    n: int = 1000,
    tell: Tell = lambda _: None,
    **settings: Any,
) -> Comparison:
    """Train methods with several seeds each and judge them alike.

    Every run is trained into ``out/<method>-seed<k>``, one after another, each in a process of
    its own, then evaluated and audited on test images. What is known of a run is kept there in
    ``comparison.json``: called again, finished runs are skipped and a half-finished one goes on.

    A run that fails does not end the comparison; it is named in ``failures``.

    Args:
        methods: slugs, as `surestep methods` lists them.
        seeds: how many, from 0, or which.
        out: the folder for the run folders.
        preset: as of ``surestep train``: by default each method's for the data set, or "none".
        attacks: of the evaluation; by default ``ATTACKS``.
        budget: instead of ``attacks``: "quick", "standard" or "thorough".
        audit: budget of the audit; None for no audit.
        n: test images, the first ones.
        tell: called with a line on what is being done.
        settings: of training, by the names of ``RunConfig``: dataset, eps, epochs, ...

    Returns:
        The table, with a row for each method of which a run succeeded.

    Raises:
        UserError: unknown names, no method or seed, invalid settings, methods whose data set or
            threat model differ, run folders or kept results of other settings, or no run succeeded.
    """
    asked = _asked(attacks, budget, audit, n)
    for name, instead in (("method", "methods"), ("seed", "seeds")):
        if name in settings:
            raise UserError(f"{name} is no setting of a comparison: give {instead}")
    names = _distinct("method", list(methods))
    numbers = _distinct("seed", list(range(seeds)) if isinstance(seeds, int) else list(seeds))
    for name in names:
        zoo.get(name)
    out, jobs = _folder(out), []
    for name in names:
        for number in numbers:
            config = runs.resolve({**settings, "method": name, "seed": number}, preset)
            label = f"{name}-seed{number}"
            jobs.append(_Job(label, out / label, _whole(config), out / label / _KEPT, trains=True))
    return _compare(jobs, asked, tell)


def compare_runs(
    folders: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    attacks: Sequence[str] | None = None,
    budget: str | None = None,
    audit: str | None = "quick",
    n: int = 1000,
    device: str | None = None,
    tell: Tell = lambda _: None,
) -> Comparison:
    """Judge finished runs alike.

    Runs that differ in the seed only share a row. Peak memory is known of runs that ``compare``
    trained.

    Args:
        folders: as written by ``surestep train``.
        out: a folder to keep each run's results in, so that a comparison that was stopped can
            go on; None keeps nothing.
        attacks: of the evaluation; by default ``ATTACKS``.
        budget: instead of ``attacks``: "quick", "standard" or "thorough".
        audit: budget of the audit; None for no audit.
        n: test images, the first ones.
        device: by default the best there is.
        tell: called with a line on what is being done.

    Raises:
        UserError: a folder is no finished run, two are the same run, or their test images or
            threat models differ; or no run could be judged.
    """
    asked = _asked(attacks, budget, audit, n)
    place = None if out is None else _folder(out)
    jobs: list[_Job] = []
    for folder in _distinct("run folder", [Path(f) for f in folders]):
        config = runs.read_config(folder)
        done = _epochs(folder)
        if not _finished(folder, config):
            raise UserError(
                f"{folder} is not finished (epoch {done} of {config.epochs}): go on with surestep "
                f"train --resume {folder}"
            )
        base = folder.resolve().name
        taken = [job.label for job in jobs]
        label = next(k for k in _numbered(base) if k not in taken)
        kept = None if place is None else place / label / _KEPT
        jobs.append(_Job(label, folder, _whole(config), kept, trains=False, device=device))
    return _compare(jobs, asked, tell)


def save(
    comparison: Comparison,
    folder: str | Path,
    *,
    command: str = "",
    versions: Mapping[str, Any] | None = None,
    tell: Tell = lambda _: None,
) -> list[Path]:
    """Write comparison.json, .csv, .md and .tex, report.html, and its plots as PNG and SVG.

    What needs a package that is not installed is left out, and ``tell`` is told.

    Args:
        comparison: what to write.
        folder: where; made if it is not there.
        command: that made it.
        versions: of packages; by default those of surestep, torch and Python.
        tell: called with a line for each file that is left out.

    Returns:
        The files.

    Raises:
        UserError: a file cannot be written.
    """
    folder = Path(folder)
    _make(folder)
    versions = versions or {
        "surestep": surestep.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    made = {**comparison.to_dict(), "command": command, "versions": dict(versions)}
    page = _page(comparison, command, versions)
    texts: list[tuple[str, Callable[[], str]]] = [
        ("comparison.json", lambda: json.dumps(made, indent=2) + "\n"),
        ("comparison.csv", comparison.to_csv),
        ("comparison.md", comparison.to_markdown),
        ("comparison.tex", comparison.to_latex),
        ("report.html", page.to_html),
    ]
    written = []
    for name, make in texts:
        try:
            text = make()
        except UserError as e:
            tell(f"{name} left out: {e}")
            # Of an earlier comparison: beside the new numbers it would mislead.
            (folder / name).unlink(missing_ok=True)
            continue
        files.write_atomically(folder / name, text)
        written.append(folder / name)
    if folder / "report.html" in written:
        written += report.save_plots(page, folder / "plots")
    return written


def _page(comparison: Comparison, command: str, versions: Mapping[str, Any]) -> report.Report:

    seeds = {"training": sorted({seed for row in comparison.rows for seed in row.seeds})}
    return report.Report(
        f"Comparison of {', '.join(row.method for row in comparison.rows)}",
        comparison=[row.to_dict() for row in comparison.rows],
        command=command,
        versions=versions,
        seeds={name: ", ".join(map(str, values)) for name, values in seeds.items()},
        config={
            "data set": comparison.dataset,
            "norm": comparison.threat["norm"],
            "eps": comparison.threat["eps"],
            "test images": comparison.n,
            "attacks": ", ".join(comparison.attacks),
            "audit": comparison.audit or "none",
        },
    )


_KEPT = "comparison.json"


@dataclass(frozen=True)
class _Asked:
    """How every run is judged."""

    attacks: tuple[str, ...]
    audit: str | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        return {"attacks": list(self.attacks), "audit": self.audit, "n": self.n}


@dataclass(frozen=True)
class _Job:
    """A run of a comparison, perhaps still to be trained."""

    label: str
    folder: Path
    config: RunConfig
    kept: Path | None
    trains: bool
    device: str | None = None

    @property
    def name(self) -> str:
        """What an error calls it: two folders may have the same last name."""
        return self.label if self.trains else str(self.folder)


class _Failed(Exception):
    """A training that ended without a result."""

    def __init__(self, message: str, *, fault: bool) -> None:
        super().__init__(message)
        self.fault = fault


def _asked(attacks: Sequence[str] | None, budget: str | None, audit: str | None, n: int) -> _Asked:
    if attacks is not None and budget is not None:
        raise UserError("attacks and budget exclude each other: give one of them")
    if audit is not None:
        suite.budget(audit)
    if n < 1:
        raise UserError(f"n {n}: give 1 test image or more")
    if attacks is None:
        attacks = ATTACKS if budget is None else suite.budget(budget)
    return _Asked(tuple(dict.fromkeys(attacks)), audit, n)


def _distinct(what: str, values: list[Any]) -> list[Any]:
    """Refuse an empty list and one that names something twice."""
    if not values:
        raise UserError(f"there is nothing to compare: give at least one {what}")
    twice = next((v for k, v in enumerate(values) if v in values[:k]), None)
    if twice is not None:
        raise UserError(f"{what} {str(twice)!r} is named twice: leave one of them out")
    return values


def _folder(out: str | Path) -> Path:
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{out} is a file: give a folder for the results")
    return Path(out)


def _numbered(base: str) -> Iterable[str]:
    yield base
    number = 2
    while True:
        yield f"{base}-{number}"
        number += 1


def _whole(config: RunConfig) -> RunConfig:
    """Spell out every hyperparameter, as a run folder does."""
    params = runs.build_method(config).params()
    return parse(RunConfig, {**config.model_dump(), "params": params})


def _compare(jobs: list[_Job], asked: _Asked, tell: Tell) -> Comparison:
    """Check everything, then train and judge one run after another."""
    images = _check_alike(jobs)
    rows = _group(jobs)
    suite.parse_all(asked.attacks, runs.build_threat(jobs[0].config))
    kept = {job.label: _read(job, asked) for job in jobs}
    outcomes, failures = {}, []
    for k, job in enumerate(jobs, 1):
        try:
            told = f"{job.label} ({k} of {len(jobs)})"
            outcomes[job.label] = _outcome(job, kept[job.label], asked, images, told, tell)
        except (UserError, _Failed) as e:
            failures.append(Failure(job.label, str(e), isinstance(e, _Failed) and e.fault))
            tell(f"{job.label} failed: {e}")
    if not outcomes:
        first = failures[0]
        if first.fault:
            raise RuntimeError(f"{first.run}: {first.message}")
        raise UserError(f"no run succeeded; {first.run}: {first.message}")
    return _conclude(jobs, rows, outcomes, failures, asked)


def _check_alike(jobs: list[_Job]) -> Images:
    """Refuse runs that were not made for the same images and threat model; return the images."""
    first = jobs[0]
    images = runs.load_data(first.config, "test")
    known = {(first.config.data, first.config.image_size): images}
    for job in jobs[1:]:
        for name in _ALIKE:
            one, other = getattr(first.config, name), getattr(job.config, name)
            if one != other:
                raise UserError(
                    f"{first.name} and {job.name} cannot be compared: {name} {one!r} and {other!r}"
                )
        place = (job.config.data, job.config.image_size)
        if place not in known:
            # Two places may hold the same data; two archives of one kind need not.
            known[place] = runs.load_data(job.config, "test")
        if not _same(images, known[place]):
            raise UserError(
                f"{first.name} and {job.name} cannot be compared: their test images differ "
                f"({first.config.data} and {job.config.data})"
            )
    return images


def _same(one: Images, other: Images) -> bool:
    if one is other:
        return True
    alike = one.x.shape == other.x.shape and one.x.dtype == other.x.dtype
    return alike and torch.equal(one.x, other.x) and torch.equal(one.y, other.y)


def _group(jobs: list[_Job]) -> dict[str, list[_Job]]:
    """Return the runs by row: those that differ in the seed only share one.

    Raises:
        UserError: two are the same run, which would make the deviation too small.
    """
    groups: list[list[_Job]] = []
    for job in jobs:
        for group in groups:
            if _settings(group[0].config) == _settings(job.config):
                group.append(job)
                break
        else:
            groups.append([job])
    for group in groups:
        seen: dict[int, str] = {}
        for job in group:
            if job.config.seed in seen:
                raise UserError(
                    f"{seen[job.config.seed]} and {job.name} are the same run (method "
                    f"{job.config.method}, seed {job.config.seed}): leave one of them out"
                )
            seen[job.config.seed] = job.name
    return dict(zip(_row_names(groups), groups, strict=True))


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return all that makes a row, the hyperparameters among the others."""
    values = config.model_dump(mode="json", exclude={*_NO_MATTER, "params"})
    return {**values, **config.params}


def _row_names(groups: list[list[_Job]]) -> list[str]:
    """Return the methods, with the settings in which rows of one method differ."""
    names = []
    for group in groups:
        mine = _settings(group[0].config)
        same = [_settings(g[0].config) for g in groups if g[0].config.method == mine["method"]]
        told = ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in mine.items()
            if any(other[key] != value for other in same)
        )
        names.append(f"{mine['method']} ({told})" if told else mine["method"])
    return names


def _epochs(folder: Path) -> int:
    """Return how many epochs a run has ended."""
    return len(RunFolder(folder).history())


def _finished(folder: Path, config: RunConfig) -> bool:
    """Tell whether a run is trained to the end and its weights are written.

    Of an epoch the rows are written first, then the weights, then the checkpoint; a kill may come
    between.
    """
    run = RunFolder(folder)
    history = run.history()
    if len(history) < math.ceil(config.epochs) or not run.weights.is_file():
        return False
    steps = [int(path.stem.removeprefix("step-")) for path in checkpoint.found(run.checkpoints)]
    # Without any, they were removed to save space.
    return not steps or max(steps) >= int(history[-1]["step"])


def _read(job: _Job, asked: _Asked) -> dict[str, Any]:
    """Return what is known of a run, before anything is made.

    Raises:
        UserError: the folder is of a run with other settings, or what is kept was made in another
            way.
    """
    if job.trains and RunFolder(job.folder).config.is_file():
        begun = _whole(runs.read_config(job.folder))
        for name in RunConfig.model_fields:
            one, other = getattr(begun, name), getattr(job.config, name)
            if one != other:
                raise UserError(
                    f"{job.folder} was begun with {name} {one!r}, this comparison has {other!r}: "
                    "give the same, or another --out"
                )
    fresh: dict[str, Any] = {
        "format": OUTCOME_FORMAT,
        "version": OUTCOME_VERSION,
        "settings": asked.to_dict(),
        "weights": None,
        "peak_memory_mb": None,
        "evaluation": None,
        "audit": None,
    }
    paths = [job.kept] if job.kept is not None else []
    if job.kept is None or not job.kept.is_file():
        # A run that an earlier comparison trained brings its peak memory along.
        paths = [job.folder / _KEPT]
    for path in paths:
        found = _kept(path)
        if found is None:
            continue
        if found["settings"] == fresh["settings"]:
            return found
        if path != job.kept:
            return fresh | {key: found[key] for key in ("weights", "peak_memory_mb")}
        name = next(k for k, v in fresh["settings"].items() if found["settings"].get(k) != v)
        one, other = (_told(s["settings"].get(name)) for s in (found, fresh))
        raise UserError(
            f"{path} was made with {name} {one}, this comparison has {other}: give the same, or "
            "another --out"
        )
    return fresh


def _told(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value or "none")


def _kept(path: Path) -> dict[str, Any] | None:
    """Read the outcome of a run; None if there is none.

    Raises:
        UserError: the file is damaged or something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): delete it to judge the run again") from e
    if not isinstance(found, dict) or found.get("format") != OUTCOME_FORMAT:
        raise UserError(f"{path} is no outcome of a run: delete it, or give another --out")
    return found


def _outcome(
    job: _Job, kept: dict[str, Any], asked: _Asked, images: Images, told: str, tell: Tell
) -> dict[str, Any]:
    """Bring a run to its end: train, evaluate, audit, whatever of these is missing."""
    trained = None
    if job.trains and not _finished(job.folder, job.config):
        tell(f"training {told}")
        trained = _train(job, tell)
    weights = hashlib.sha256(RunFolder(job.folder).weights.read_bytes()).hexdigest()[:16]
    if weights != kept["weights"]:
        # New, or other ones than were judged.
        kept = kept | {"weights": weights, "peak_memory_mb": trained}
        kept |= {"evaluation": None, "audit": None}
        _write(job, kept)
    missing = [k for k in ("evaluation", "audit") if kept[k] is None]
    if asked.audit is None and "audit" in missing:
        missing.remove("audit")
    if missing:
        run = runs.load(job.folder, job.device or job.config.device)
        if "evaluation" in missing:
            tell(f"evaluating {told}")
            state = job.kept and job.kept.with_name(f"comparison-{weights}.state")
            found = evaluation.evaluate(
                run.model, images, run.threat, asked.attacks, n=asked.n, state=state
            )
            kept = kept | {"evaluation": found.to_dict()}
            _write(job, kept)
            if state:
                state.unlink(missing_ok=True)
        if asked.audit is not None:
            tell(f"auditing {told}")
            judged = auditing.audit(run.model, images, run.threat, budget=asked.audit, n=asked.n)
            kept = kept | {"audit": judged.to_dict()}
            _write(job, kept)
    return kept


def _write(job: _Job, kept: dict[str, Any]) -> None:
    if job.kept is not None:
        _make(job.kept.parent)
        files.write_atomically(job.kept, json.dumps(kept, indent=2) + "\n")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {folder}: {e.strerror or e}") from e


def _train(job: _Job, tell: Tell) -> float | None:
    """Train a run, or go on with it, in a process of its own; return its peak memory in MB.

    Raises:
        _Failed: it ended without a result.
        KeyboardInterrupt: it was stopped from the keyboard.
    """
    with tempfile.TemporaryDirectory() as place:
        if RunFolder(job.folder).config.is_file():
            arguments = ["--resume", str(job.folder)]
        else:
            _make(job.folder.parent)
            settings = Path(place) / "config.yaml"
            settings.write_text(to_yaml(job.config.model_dump(mode="json")), "utf-8")
            arguments = ["--config", str(settings), "--out", str(job.folder)]
        code, peak, error = _measured(["train", *arguments], tell)
    if code in (130, -2):  # by its own handler, or before that was there
        raise KeyboardInterrupt
    if code < 0:
        raise _Failed(f"the training was killed by signal {-code}", fault=False)
    if code:
        raise _Failed(error or f"the training ended with exit code {code}", fault=code != 2)
    # Kilobytes, but on a Mac bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return peak * unit / 1e6 if peak else None


def _measured(arguments: list[str], tell: Tell) -> tuple[int, int, str]:
    """Run a command of surestep; return its exit code, peak memory as told, and error line."""
    command = [sys.executable, "-I", "-c", _MEASURE, sys.executable, "-m", "surestep", *arguments]
    error = ""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
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
            # End of its standard input: it ends the training, and is waited for.
            process.stdin.close()
            process.wait()
            raise
    return int(code), int(peak), error


def _conclude(
    jobs: list[_Job],
    groups: dict[str, list[_Job]],
    outcomes: dict[str, dict[str, Any]],
    failures: list[Failure],
    asked: _Asked,
) -> Comparison:
    """Make the table of what each run gave."""
    found = {job.label: _numbers(job, outcomes[job.label]) for job in jobs if job.label in outcomes}
    rows = []
    for name, group in groups.items():
        done = [job for job in group if job.label in outcomes]
        if not done:
            continue
        numbers = {}
        for key in COLUMNS:
            values = [found[job.label].get(key) for job in done]
            known = [value for value in values if value is not None]
            if known:
                numbers[key] = Number.of(known)
        verdicts = [outcomes[job.label]["audit"]["verdict"] for job in done if asked.audit]
        counts = {v: verdicts.count(v) for v in SEVERITY if v in verdicts}
        rows.append(Row(name, [job.config.seed for job in done], numbers, counts))
    config, first = jobs[0].config, next(iter(outcomes.values()))
    return Comparison(
        rows=rows,
        runs=[
            {
                "run": job.label,
                "method": job.config.method,
                "seed": job.config.seed,
                **found[job.label],
                **_judged(outcomes[job.label]["audit"]),
            }
            for job in jobs
            if job.label in outcomes
        ],
        failures=failures,
        dataset=config.dataset,
        threat={"norm": config.norm, "eps": config.eps},
        n=first["evaluation"]["n"],
        attacks=list(asked.attacks),
        audit=asked.audit,
        notes=_notes(jobs, groups, rows, outcomes, failures, asked),
    )


def _numbers(job: _Job, outcome: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of one run by the keys of ``COLUMNS``."""
    robust = outcome["evaluation"]["robust_accuracy"]
    pgd = [value for name, value in robust.items() if name.startswith("pgd-")]
    return {
        "clean_accuracy": outcome["evaluation"]["clean_accuracy"],
        "fgsm": robust.get("fgsm"),
        "pgd": min(pgd, default=None),
        "autoattack": robust.get("autoattack"),
        "worst_case_accuracy": outcome["evaluation"]["worst_case_accuracy"],
        "passes": runs.build_method(job.config).cost(job.config.batch_size).total,
        "seconds": RunFolder(job.folder).history()[-1].get("train_seconds"),
        "peak_memory_mb": outcome["peak_memory_mb"],
    }


def _judged(audit: Mapping[str, Any] | None) -> dict[str, Any]:
    if audit is None:
        return {}
    return {key: audit[key] for key in ("verdict", "sentence", "found_accuracy", "found_by")}


def _notes(
    jobs: list[_Job],
    groups: dict[str, list[_Job]],
    rows: list[Row],
    outcomes: dict[str, dict[str, Any]],
    failures: list[Failure],
    asked: _Asked,
) -> list[str]:
    """Say what a reader must know to read the table right."""
    notes = []
    pgd = [name for name in asked.attacks if name.startswith("pgd-")]
    if len(pgd) > 1:
        notes.append(f"PGD is the lower of the accuracies under {' and '.join(pgd)}, run by run.")
    if "autoattack" in asked.attacks and len(asked.attacks) > 1:
        notes.append(
            "AutoAttack attacks what the other attacks left: its accuracy includes theirs."
        )
    below = []
    for name, group in groups.items():
        done = [outcomes[job.label] for job in group if job.label in outcomes]
        gaps = [
            (o["audit"]["found_accuracy"], o["evaluation"]["worst_case_accuracy"])
            for o in done
            if asked.audit
        ]
        if any(found < worst for found, worst in gaps):
            below.append(f"{name} {statistics.fmean(found for found, _ in gaps):.1%}")
    if below:
        notes.append(f"The audit's attacks leave less than the worst case: {', '.join(below)}.")
    different = _different(groups)
    if different:
        notes.append(f"The runs were trained with different settings: {'; '.join(different)}.")
    if any("peak_memory_mb" in row.numbers for row in rows):
        memory = "Peak memory is the training process's resident memory"
        devices = {pick_device(job.device or job.config.device).type for job in jobs}
        notes.append(f"{memory}, on the host only." if devices != {"cpu"} else f"{memory}.")
    if failures:
        named = ", ".join(failure.run for failure in failures)
        notes.append(f"Without {named}, of which there is no result.")
    return notes


def _different(groups: Mapping[str, list[_Job]]) -> list[str]:
    """Name the training settings that differ between rows: presets bring their own."""
    told = []
    configs = {name: group[0].config for name, group in groups.items()}
    for key in RunConfig.model_fields:
        if key in ("method", "params", "data", *_NO_MATTER):
            continue
        values = {name: getattr(config, key) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            told.append(f"{key} {', '.join(f'{v} ({name})' for name, v in values.items())}")
    return told
