"""Kill training with SIGKILL at random moments, resume, compare with the run never stopped.

    python benchmarks/resume_trials.py --trials 20 --out benchmarks/results/resume.csv
    python benchmarks/resume_trials.py --trials 3 --method sat-r2

Each trial is a fresh process on 512 embedded MNIST images, killed some time after its first
checkpoint, one time in three killed again after the resume. Identical means that
``model.safetensors`` holds the same bytes and ``metrics.jsonl`` the same numbers. Exits with 1 if any trial differs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ["trial", "method", "killed_at_step", "identical", "commit", "date", "command"]
IMAGES = 512
SETTINGS = {
    "epochs": 2,
    "batch_size": 32,
    "checkpoint_every": 3,
    "lr": 0.05,
    "val_attacks": ("fgsm", "pgd-5"),
    # The best epoch may lie before the kill; the last weights come from every step.
    "select": "last",
}
AGAIN = 1 / 3


def work(method: str, out: Path, resume: bool) -> None:
    """Train in this process; print a line a step."""
    import torch

    import surestep
    from surestep import data, methods, models
    from surestep.training import TrainStep

    take = TrainStep.__call__

    def step(self: TrainStep, *batch: Any) -> Any:
        result = take(self, *batch)
        print("step", flush=True)
        return result

    TrainStep.__call__ = step
    torch.manual_seed(0)
    model = models.create("cnn-small")
    images = data.load("mnist").first(IMAGES)
    step_of = methods.get(method)(surestep.Linf(0.3))
    surestep.fit(model, images, step_of, out=out, resume=resume, quiet=True, **SETTINGS)


def checkpoints(out: Path) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return sorted(int(p.stem.split("-")[1]) for p in out.glob("checkpoints/step-*.safetensors"))


@dataclass
class Attempt:
    """One process: until which step it came, and how long after its first checkpoint it ran."""

    step: int
    killed: bool
    seconds: float


def attempt(method: str, out: Path, *, resume: bool, kill_after: float | None) -> Attempt:
    """Run a process; kill it ``kill_after`` seconds after the first checkpoint it writes."""
    before = checkpoints(out)
    command = [sys.executable, __file__, "--worker", method, str(out), *["resume"] * resume]
    log = out.with_suffix(".log")
    with log.open("w") as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)
        first = last = None
        seen = before
        while process.poll() is None:
            now = checkpoints(out)
            if now != seen:
                seen, last = now, time.monotonic()
                first = first or last
            if first and kill_after is not None and time.monotonic() - first >= kill_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        code = process.wait()
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"{method}: the process failed\n{log.read_text()[-3000:]}")
    steps = log.read_text().splitlines().count("step")
    seconds = last - first if first and last else 0.0
    return Attempt((before or [0])[-1] + steps, code != 0, seconds)


def trial(method: str, span: float, out: Path, rng: random.Random) -> tuple[Path, list[int]]:
    """Kill and resume until the run is done; return it and the steps at which it was killed."""
    killed: list[int] = []
    while not killed:
        began = attempt(method, out, resume=False, kill_after=rng.uniform(0, span))
        if began.killed:
            killed.append(began.step)
        else:  # It was faster than the uninterrupted run: once more, in another folder.
            span /= 2
            out = out.with_name(out.name + "x")
    if rng.random() < AGAIN:
        again = attempt(method, out, resume=True, kill_after=rng.uniform(0, span / 2))
        if not again.killed:
            return out, killed
        killed.append(again.step)
    attempt(method, out, resume=True, kill_after=None)
    return out, killed


def identical(one: Path, other: Path) -> bool:
    """Compare the weights of two runs byte by byte, and their metrics but for the times."""

    def rows(out: Path) -> list[dict[str, Any]]:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if "second" not in k} for x in lines]

    weights = "model.safetensors"
    same = (one / weights).read_bytes() == (other / weights).read_bytes()
    return same and rows(one) == rows(other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="in all, going round the methods")
    parser.add_argument("--method", help="only this one")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.worker:
        method, out, *resume = args.worker
        work(method, Path(out), bool(resume))
        return
    from surestep import methods

    names = [methods.get(args.method).slug] if args.method else methods.names()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    common = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/resume_trials.py " + " ".join(sys.argv[1:]),
    }
    rng = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    whole: dict[str, tuple[Path, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, args.trials + 1):
            name = names[(number - 1) % len(names)]
            begin = time.monotonic()
            if name not in whole:
                place = Path(folder, f"whole-{name}")
                span = attempt(name, place, resume=False, kill_after=None).seconds
                whole[name] = place, span
            reference, span = whole[name]
            out, killed = trial(name, span, Path(folder, f"trial-{number}"), rng)
            same = identical(out, reference)
            steps = " ".join(map(str, killed))
            row = {"trial": number, "method": name, "killed_at_step": steps, "identical": same}
            rows.append(row | common)
            print(
                f"trial {number:2}  {name:10}  killed at step {steps:7}  "
                f"{'identical' if same else 'DIFFERENT'}  {time.monotonic() - begin:.1f} s",
                flush=True,
            )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as f:
            writer = csv.DictWriter(f, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    good = sum(row["identical"] for row in rows)
    print(f"{good} of {len(rows)} bit-identical")
    sys.exit(good < len(rows))


if __name__ == "__main__":
    main()
