"""What the accuracy tables share: rows run one core each, a CSV that can be continued."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surestep.config import RunConfig

FIELDS = [
    *("method", "recipe", "seed", "epochs", "batch_size", "lr", "params", "train_seconds"),
    *("clean", "fgsm", "pgd", "pgd_margin", "worst_case", "n", "val_worst_case"),
    *("selected_epoch", "threads", "commit", "torch", "machine", "date", "command"),
]


QUICK = {"val_images": 0, "select": "last", "engine": "fast"}
"""Settings of a run whose training alone is of interest."""


@dataclass(frozen=True)
class Row:
    """One training run to be judged: a method's preset, with settings changed by name."""

    method: str
    recipe: str
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.method, self.recipe, self.seed)

    def resolve(self, data: str | None = None) -> RunConfig:
        """Return all settings, the preset's among them; ``data`` is where the data set lies."""
        from surestep import runs

        settings = {"method": self.method, "seed": self.seed, "data": data, **self.changes}
        return runs.resolve(settings, self.recipe)


def train_and_judge(
    row: Row, steps: int, n: int, data: str | None, split: str = "test"
) -> dict[str, Any]:
    """Train a row, judge it on n images by FGSM and by PGD on cross entropy and margin."""
    import torch

    from surestep import evaluate, runs
    from surestep.training import Engine

    config = row.resolve(data)
    fitted = runs.train(config, None)
    engine = Engine.choose(device=next(fitted.model.parameters()).device)
    pgd = f"pgd-{steps}"
    # The points are made in the engine's precision and judged in float32; see
    # benchmarks/precision.py for what that changes.
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
    """Run the rows that the CSV does not hold yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time, one core each")
    parser.add_argument("--n", type=int, default=n, help="test images")
    parser.add_argument("--out", type=Path, default=Path(out), help="the CSV")
    parser.add_argument("--only", nargs="*", default=[], help="METHOD/RECIPE of rows to run")
    parser.add_argument("--set", default="{}", help="JSON of settings to change, for searches")
    parser.add_argument("--data", default=data, help="where the data set lies")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        row = Row(**json.loads(args.row))
        print(json.dumps(train_and_judge(row, steps, args.n, args.data)))
        return
    done = {(r["method"], r["recipe"], int(r["seed"])) for r in read(args.out)}
    changes = json.loads(args.set)
    todo = [
        Row(r.method, r.recipe, r.seed, {**r.changes, **changes})
        for r in rows
        if r.key not in done and (not args.only or f"{r.method}/{r.recipe}" in args.only)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda row: _run_and_record(row, args), todo))


def _run_and_record(row: Row, args: argparse.Namespace) -> None:
    start = time.time()
    result = run_alone(row, threads=1, n=args.n, data=args.data)
    if result is None:
        return
    append(args.out, FIELDS, result)
    shown = {k: v for k, v in result.items() if k in FIELDS[:15]}
    print(f"{time.time() - start:.0f} s {json.dumps(shown)}", flush=True)


def run_alone(row: Row, *words: str, threads: int, **options: Any) -> dict[str, Any] | None:
    """Run this script's ``--row`` in a process of its own; None, and said, if that fails.

    Args:
        row: what to run.
        words: for the command line, as they are.
        threads: of the process.
        options: by name, for those that are not None.
    """
    named = [w for k, v in options.items() if v is not None for w in (f"--{k}", str(v))]
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
        **origin(),
        **json.loads(ran.stdout.splitlines()[-1]),
        "command": "python " + " ".join(sys.argv),
    }


def append(out: Path, names: list[str], row: dict[str, Any]) -> None:
    """Add a row to a CSV, with a header if it is the first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.exists()
    with out.open("a", newline="") as f:
        writer = csv.DictWriter(f, names, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(out: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV; none if there is no such file yet."""
    if not out.exists():
        return []
    with out.open() as f:
        return list(csv.DictReader(f))


def origin() -> dict[str, str]:
    """Return where and when a row is measured: commit, machine and date."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "commit": subprocess.run(
            command, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
    }


def machine() -> str:
    """Return the kind of machine: seconds of two kinds do not compare."""
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text("utf-8").split()) if cpu.exists() else set()
    units = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    widest = next((name for name in units if name in flags), "")
    return f"{platform.machine()} {widest}".rstrip() + f", {os.cpu_count()} cores"
