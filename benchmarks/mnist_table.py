"""The accuracy table on MNIST: LeNet+, eps 0.3, 10,000 test images, PGD-100 ce and margin.

    python benchmarks/mnist_table.py --jobs 2            # all rows, two at a time, a core each
    python benchmarks/mnist_table.py --only sat-r2/fast  # some of them

Rows that the CSV already holds are skipped, so a stopped table goes on where it was. Every run
has one core and one thread, so that their seconds can be compared with each other.
"""

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
from pathlib import Path

FIELDS = [
    *("method", "recipe", "seed", "epochs", "batch_size", "lr", "params", "train_seconds"),
    *("clean", "fgsm", "pgd_100", "pgd_100_margin", "worst_case", "n", "val_worst_case"),
    *("selected_epoch", "threads", "commit", "torch", "machine", "date", "command"),
]


def jobs(epochs: int, seeds: int) -> list[tuple[str, str, int, int | None]]:
    """Return (method, preset, seed, epochs), the longest first."""
    rows: list[tuple[str, str, int, int | None]] = [("pgd", "mnist-fast", 0, epochs)]
    rows += [(f"sat-r{k}", "mnist", 0, None) for k in (2, 1, 3)]
    rows += [
        (m, "mnist-fast", s, epochs)
        for s in range(seeds)
        for m in ("sat-r2", "sat-r3", "sat-r1", "fgsm")
    ]
    return rows


def run(method: str, recipe: str, seed: int, epochs: int | None, changes: dict, n: int) -> dict:
    """Train and judge one row."""
    import torch

    import surestep
    from surestep import data, methods, models
    from surestep.training.engine import Engine

    preset = methods.preset(method, recipe)
    changes = dict(changes)
    params = {**preset.params, **changes.pop("params", {})}
    settings = {**preset.settings, **({"epochs": epochs} if epochs else {}), **changes}
    threat = surestep.Linf(preset.eps)
    torch.manual_seed(seed)
    model = models.create(preset.model)
    fitted = surestep.fit(
        model,
        data.load("mnist"),
        methods.build(method, threat, params),
        validation=data.load("mnist", "validation"),
        seed=seed,
        **settings,
    )
    judged = surestep.evaluate(
        Engine.choose().place(model),
        data.load("mnist", "test"),
        threat,
        n=n,
        # Perturbations are made in bf16, judged in float32; --check compares both ways.
        precision=Engine.choose().precision,
    )
    return {
        "method": method,
        "recipe": recipe,
        "seed": seed,
        "epochs": settings["epochs"],
        "batch_size": settings["batch_size"],
        "lr": settings["lr"],
        "params": json.dumps(params),
        "train_seconds": round(fitted.train_seconds, 1),
        "clean": judged.clean_accuracy,
        "fgsm": judged.robust_accuracy["fgsm"],
        "pgd_100": judged.robust_accuracy["pgd-100"],
        "pgd_100_margin": judged.robust_accuracy["pgd-100-margin"],
        "worst_case": judged.worst_case_accuracy,
        "n": judged.n,
        "val_worst_case": [r.get("val_worst_case") for r in fitted.history],
        "selected_epoch": fitted.best_epoch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8, help="of the equal-epochs rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time, one core each")
    parser.add_argument("--n", type=int, default=10_000, help="test images")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mnist.csv"))
    parser.add_argument("--only", nargs="*", default=[], help="METHOD/RECIPE rows to run")
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--set", default="{}", help="JSON of settings to change, for searches")
    args = parser.parse_args()
    if args.row:
        method, recipe, seed, epochs, n = args.row
        row = run(method, recipe, int(seed), int(epochs) or None, json.loads(args.set), int(n))
        print(json.dumps(row))
        return
    done = set()
    if args.out.exists():
        with args.out.open() as f:
            done = {(r["method"], r["recipe"], int(r["seed"])) for r in csv.DictReader(f)}
    todo = [
        j
        for j in jobs(args.epochs, args.seeds)
        if j[:3] not in done and (not args.only or f"{j[0]}/{j[1]}" in args.only)
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()

    def one(job: tuple[str, str, int, int | None]) -> None:
        method, recipe, seed, epochs = job
        command = [sys.executable, __file__, "--set", args.set, "--row", method, recipe]
        command += [str(seed), str(epochs or 0), str(args.n)]
        start = time.time()
        out = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        if out.returncode:
            print(f"FAILED {job}: {out.stderr[-2000:]}", flush=True)
            return
        row = json.loads(out.stdout.splitlines()[-1])
        row |= {
            "commit": commit,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/mnist_table.py " + " ".join(sys.argv[1:]),
        }
        new = not args.out.exists()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", newline="") as f:
            writer = csv.DictWriter(f, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        shown = {k: row[k] for k in FIELDS[:13]}
        print(f"{time.time() - start:.0f} s", json.dumps(shown), row["val_worst_case"], flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, todo))


if __name__ == "__main__":
    main()
