"""Shared code of the accuracy tables: run each row on one core, add it to a resumable CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

if TYPE_CHECKING:
    from surestep.config import RunConfig

FIELDS = [
    *("method", "recipe", "seed", "epochs", "batch_size", "lr", "params", "train_seconds"),
    *("clean", "fgsm", "pgd", "pgd_margin", "worst_case", "n", "val_worst_case"),
    *("selected_epoch", "threads", "commit", "torch", "machine", "date", "command"),
]


QUICK = {"val_images": 0, "select": "last", "engine": "fast"}
"""Settings of a run that only trains, without validation or selection."""


@dataclass(frozen=True)
class Row:
    """A training run to judge: a method, one of its presets (``recipe``), and changed settings."""

    method: str
    recipe: str
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.method, self.recipe, self.seed)

    def resolve(self, data: str | None = None) -> RunConfig:
        """Return all settings, including the preset's; ``data`` is the location of the data set."""
        from surestep import runs

        settings = {"method": self.method, "seed": self.seed, "data": data, **self.changes}
        return runs.resolve(settings, self.recipe)


def train_and_judge(
    row: Row, steps: int, n: int, data: str | None, split: str = "test"
) -> dict[str, Any]:
    """Train a row and judge it on n images with FGSM and with PGD on cross entropy and margin."""
    import torch

    from surestep import evaluate, runs
    from surestep.training import Engine

    config = row.resolve(data)
    fitted = runs.train(config, None)
    engine = Engine.choose(device=next(fitted.model.parameters()).device)
    pgd = f"pgd-{steps}"
    # Points are crafted in the engine's precision and judged in float32; benchmarks/precision.py
    # measures what that changes.
    judged = evaluate(
        engine.place(fitted.model),
        runs.load_data(config, split),
        runs.build_threat(config),
        ("fgsm", pgd, f"{pgd}-margin"),
        n=n,
        precision=engine.precision,
    )
    return {
        "method": row.method,
        "recipe": row.recipe,
        "seed": row.seed,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "params": json.dumps(config.params),
        "train_seconds": round(fitted.train_seconds, 1),
        "clean": judged.clean_accuracy,
        "fgsm": judged.robust_accuracy["fgsm"],
        "pgd": judged.robust_accuracy[pgd],
        "pgd_margin": judged.robust_accuracy[f"{pgd}-margin"],
        "worst_case": judged.worst_case_accuracy,
        "n": judged.n,
        "val_worst_case": json.dumps([r.get("val_worst_case") for r in fitted.history]),
        "selected_epoch": fitted.best_epoch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main(rows: list[Row], *, out: str, steps: int, n: int, data: str | None = None) -> None:
    """Run the rows that are not in the CSV yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time, one core each")
    parser.add_argument("--n", type=int, default=n, help="test images")
    parser.add_argument("--out", type=Path, default=Path(out), help="the CSV")
    parser.add_argument("--only", nargs="*", default=[], help="rows to run, as METHOD/RECIPE")
    parser.add_argument("--data", default=data, help="location of the data set")
    parser.add_argument(
        "--table", action="store_true", help="run nothing: print means over the seeds of --out"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        row = Row(**json.loads(args.row))
        print(json.dumps(train_and_judge(row, steps, args.n, args.data)))
        return
    if args.table:
        print(means(read(args.out)))
        return
    done = {(r["method"], r["recipe"], int(r["seed"])) for r in read(args.out)}
    todo = [
        r
        for r in rows
        if r.key not in done and (not args.only or f"{r.method}/{r.recipe}" in args.only)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda row: _run_and_record(row, args), todo))


def spread(rows: list[dict[str, str]], key: str, scale: float) -> str:
    """Return a column's mean, with the standard deviation if there are several rows."""
    values = [scale * float(row[key]) for row in rows]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def means(rows: list[dict[str, str]]) -> str:
    """Return a table: per method and recipe, means over the seeds and their standard deviations.

    Accuracies are in percent; the last column has the worst case of each seed.
    """
    seeds: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        seeds.setdefault((row["method"], row["recipe"]), []).append(row)
    shares, lines = ("clean", "fgsm", "pgd", "pgd_margin", "worst_case"), []
    for (method, recipe), alike in seeds.items():
        each = ", ".join(f"{100 * float(r['worst_case']):.1f}" for r in alike)
        found = [spread(alike, name, 100) for name in shares]
        lines.append([f"{method}/{recipe}", len(alike), *found, each])
    return tabulate(lines, ["row", "seeds", *shares, "each seed"], disable_numparse=True)


def _run_and_record(row: Row, args: argparse.Namespace) -> None:
    start = time.time()
    result = run_alone(row, threads=1, n=args.n, data=args.data)
    if result is None:
        return
    append(args.out, FIELDS, result)
    shown = {k: v for k, v in result.items() if k in FIELDS[:15]}
    print(f"{time.time() - start:.0f} s {json.dumps(shown)}", flush=True)


def run_alone(row: Row, *words: str, threads: int, **options: Any) -> dict[str, Any] | None:
    """Run this script with ``--row`` in its own process; print a failure and return None.

    Args:
        row: what to run.
        words: further command-line arguments.
        threads: number of threads of the process.
        options: further options by name; those that are None are left out.
    """
    named = [w for k, v in options.items() if v is not None for w in (f"--{k}", str(v))]
    begun = origin()  # now: the code may have changed by the end
    ran = subprocess.run(
        [sys.executable, sys.argv[0], "--row", json.dumps(asdict(row)), *words, *named],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=False,
    )
    if ran.returncode:
        print(f"FAILED {row}: {ran.stderr[-2000:]}", flush=True)
        return None
    return {
        **begun,
        **json.loads(ran.stdout.splitlines()[-1]),
        "command": "python " + " ".join(sys.argv),
    }


def append(out: Path, names: list[str], row: dict[str, Any]) -> None:
    """Append a row to a CSV; a new file starts with a header."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.exists()
    if not new and out.read_text("utf-8").partition("\n")[0] != ",".join(names):
        raise SystemExit(f"{out} has other columns than these rows: give another --out")
    with out.open("a", newline="") as f:
        writer = csv.DictWriter(f, names, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(out: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV; an empty list if the file does not exist."""
    if not out.exists():
        return []
    with out.open() as f:
        return list(csv.DictReader(f))


def origin() -> dict[str, str]:
    """Return the origin of a measurement: commit, machine and date."""
    return {
        "commit": commit(),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M"),
    }


def commit() -> str:
    """Return the commit of the code, with "-dirty" if it has changed since."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False)

    changed = git("diff", "--quiet", "HEAD", "--", "src", "benchmarks/*.py").returncode == 1
    return git("rev-parse", "--short", "HEAD").stdout.strip() + "-dirty" * changed


def machine() -> str:
    """Return the kind of machine; seconds are comparable only within one kind.

    That is its widest vector unit and, since one kind with the same unit was found to take half
    of another's time, the vendor, family and model of its processor.
    """
    cpu = Path("/proc/cpuinfo")
    first = cpu.read_text("utf-8").partition("\n\n")[0] if cpu.exists() else ""
    facts = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in first.splitlines())}
    units = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    widest = next((name for name in units if name in facts.get("flags", "").split()), "")
    model = "-".join(facts[k] for k in ("vendor_id", "cpu family", "model") if k in facts)
    kind = " ".join(word for word in (platform.machine(), widest, model) if word)
    return f"{kind}, {os.cpu_count()} cores"
