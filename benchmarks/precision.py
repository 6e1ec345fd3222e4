"""Measure how much weaker attacks are when crafted in bf16 and judged in float32.

    python benchmarks/precision.py RUN --n 1000

The accuracy tables craft points in bf16; this prints the accuracies for points crafted in float32
and in bf16.
"""

from __future__ import annotations

import argparse

import torch

from surestep import evaluate, runs
from surestep.training import Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--n", type=int, default=1000, help="test images")
    args = parser.parse_args()
    run = runs.load(args.run)
    model = Engine.choose().place(run.model)
    for precision in (torch.float32, torch.bfloat16):
        found = evaluate(
            model,
            runs.load_data(run.config, "test"),
            run.threat,
            ("fgsm", "pgd-100", "pgd-100-margin"),
            n=args.n,
            precision=precision,
        )
        accuracies = {**found.robust_accuracy, "worst case": found.worst_case_accuracy}
        text = "  ".join(f"{k} {v:.4f}" for k, v in accuracies.items())
        print(f"{precision!s:15} n {found.n}  {text}  {found.seconds:.0f} s")


if __name__ == "__main__":
    main()
