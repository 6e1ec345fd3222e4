"""Kill evaluations with SIGKILL at random moments, resume, compare with an uninterrupted one.

python benchmarks/evaluate_kills.py RUN --trials 10
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ATTACKS = "fgsm,noise-5,pgd-20,pgd-20-margin,square-50,transfer"


def command(run: str, n: int, state: Path, out: Path) -> list[str]:
    args = [sys.executable, "-m", "surestep", "evaluate", run, "--attacks", ATTACKS]
    args += ["--source", run, "--n", str(n), "--batch-size", "50"]
    return [*args, "--state", str(state), "--json", str(out)]


def without_times(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text("utf-8"))
    for name in ("seconds", "attack_seconds", "command"):
        values.pop(name)
    for attack in values["attacks"]:
        attack.pop("seconds")
    return dict(values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluate_kills.csv"))
    args = parser.parse_args()
    chance = random.Random(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        start = time.time()
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        whole = here / "whole.json"
        subprocess.run(command(args.run, args.n, here / "whole", whole), check=True, **quiet)
        lasts = time.time() - start
        for trial in range(args.trials):
            state, out = here / f"state-{trial}", here / f"{trial}.json"
            kills = 0
            while not out.exists():
                process = subprocess.Popen(command(args.run, args.n, state, out), **quiet)
                try:
                    process.wait(chance.uniform(0.2, 1.0) * lasts)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
            same = without_times(out) == without_times(whole)
            rows.append({"trial": trial, "kills": kills, "identical": same, "n": args.n})
            print(rows[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as f:
        writer = csv.DictWriter(f, [*rows[0], "date"])
        writer.writeheader()
        today = datetime.date.today().isoformat()
        writer.writerows({**row, "date": today} for row in rows)
    print(f"{sum(r['identical'] for r in rows)} of {len(rows)} identical")
    sys.exit(not all(row["identical"] for row in rows))


if __name__ == "__main__":
    main()
