"""Kill training with SIGKILL at random moments, resume, compare with an uninterrupted run.

    python benchmarks/resume_trials.py --out benchmarks/results/resume.csv
    python benchmarks/resume_trials.py --trials 3 --method sat-r2

In each trial a separate process trains on 512 embedded MNIST images and is killed some time after
its first checkpoint. Another process resumes; in one trial of three it is killed, too, and resumed.
Identical means that ``model.safetensors`` has the same bytes and ``metrics.jsonl`` the same
numbers, except times. Exits with 1 if any trial differs. Processes are forked, so this does not run
on Windows.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import multiprocessing
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
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 32,
    "checkpoint_every": 3,
    "lr": 0.05,
    "val_attacks": ("fgsm", "pgd-5"),
    # The best epoch may precede the kill; the last weights depend on every step.
    "select": "last",
}
AGAIN = 1 / 3


def work(method: str, images: Any, out: Path, resume: bool, log: Path) -> None:
    """Train in this process; write one line per step to the log."""
    import torch

    import surestep
    from surestep import methods, models
    from surestep.training import TrainStep

    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    take = TrainStep.__call__

    def step(self: TrainStep, *batch: Any) -> Any:
        result = take(self, *batch)
        print("step", flush=True)
        return result

    TrainStep.__call__ = step  # type: ignore[method-assign, assignment]
    torch.manual_seed(0)
    model = models.create("cnn-small")
    step_of = methods.get(method)(surestep.Linf(0.3))
    surestep.fit(model, images, step_of, out=out, resume=resume, quiet=True, **SETTINGS)


def checkpoints(out: Path) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return sorted(int(p.stem.split("-")[1]) for p in out.glob("checkpoints/step-*.safetensors"))


@dataclass
class Attempt:
    """One process: its last step, whether it was killed, seconds from first to last checkpoint."""

    step: int
    killed: bool
    seconds: float


def attempt(
    method: str, images: Any, out: Path, *, resume: bool, kill_after: float | None
) -> Attempt:
    """Run a process; kill it ``kill_after`` seconds after its first checkpoint, unless None."""
    seen = before = checkpoints(out)
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work, args=(method, images, out, resume, log))
    process.start()
    first = last = 0.0
    while process.is_alive():
        now = checkpoints(out)
        if now != seen:
            seen, last = now, time.monotonic()
            first = first or last
        if first and kill_after is not None and time.monotonic() - first >= kill_after:
            process.kill()
            break
        time.sleep(0.005)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        sys.exit(f"{method}: the process failed\n{log.read_text()[-3000:]}")
    steps = log.read_text().splitlines().count("step") if log.exists() else 0
    return Attempt((before or [0])[-1] + steps, process.exitcode != 0, last - first)


def trial(
    method: str, images: Any, span: float, out: Path, rng: random.Random
) -> tuple[Path, list[int]]:
    """Kill and resume until the run is done; return its folder and the steps of the kills."""
    killed: list[int] = []
    while not killed:
        began = attempt(method, images, out, resume=False, kill_after=rng.uniform(0, span))
        if began.killed:
            killed.append(began.step)
        else:  # It finished before the kill: try again in another folder, with a shorter span.
            span /= 2
            out = out.with_name(out.name + "x")
    if rng.random() < AGAIN:
        again = attempt(method, images, out, resume=True, kill_after=rng.uniform(0, span / 2))
        if not again.killed:
            return out, killed
        killed.append(again.step)
    attempt(method, images, out, resume=True, kill_after=None)
    return out, killed


def identical(one: Path, other: Path) -> bool:
    """Compare the weights of two runs byte by byte, and their metrics except times."""

    def rows(out: Path) -> list[dict[str, Any]]:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if "second" not in k} for x in lines]

    weights = "model.safetensors"
    same = (one / weights).read_bytes() == (other / weights).read_bytes()
    return same and rows(one) == rows(other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, help="in all, cycling through the methods [one each]")
    parser.add_argument("--method", help="only this one")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of killing")
    parser.add_argument("--out", type=Path, help="CSV to write")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Import everything once here: forked children start as copies of this process. Torch defers
    # seconds of imports to the first optimizer, so make one, too.
    from surestep import data, methods, models, training

    training.make_optimizer("sgd", models.create("cnn-small").parameters(), lr=1.0)
    images = data.load("mnist").first(IMAGES)

    names = [methods.get(args.method).slug] if args.method else methods.names()
    args.trials = args.trials or len(names)
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
                span = attempt(name, images, place, resume=False, kill_after=None).seconds
                whole[name] = place, span
            reference, span = whole[name]
            out, killed = trial(name, images, span, Path(folder, f"trial-{number}"), rng)
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
