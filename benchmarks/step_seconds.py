"""Seconds of one training step by method, interleaved in one process: ratios, not records.

    OMP_NUM_THREADS=1 python benchmarks/step_seconds.py      # as the accuracy table runs
    python benchmarks/step_seconds.py --batch-size 32

Prints the median of many steps on LeNet+, its ratio to a standard step and to one of PGD-40, and
beside it the ratio that the declared passes predict. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from surestep import Linf, data, methods, models
from surestep.training import make_optimizer, make_step

RUNS = {
    "standard": ("standard", {}),
    "fgsm": ("fgsm", {}),
    "sat-r1": ("sat-r1", {"fraction": 1 / 32}),
    "sat-r2": ("sat-r2", {}),
    "sat-r3": ("sat-r3", {}),
    "pgd-40": ("pgd", {"steps": 40, "alpha": 0.01}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--engine", default="auto", choices=("auto", "fast", "reference"))
    args = parser.parse_args()
    batches = data.Batches(data.load("mnist"), args.batch_size).epoch(0)
    x, y, _ = next(batches)
    steps, costs = {}, {}
    for name, (slug, params) in RUNS.items():
        torch.manual_seed(0)
        model = models.create("lenet+").train()
        method = methods.build(slug, Linf(0.3), params)
        optimizer = make_optimizer("sgd", model.parameters(), lr=0.01)
        steps[name] = make_step(model, method, optimizer, args.engine)
        costs[name] = method.cost(args.batch_size).total
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(args.rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step(x, y)
            if round_number >= 3:  # the first ones warm up
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"batch {args.batch_size}, {torch.get_num_threads()} threads, n {args.rounds}")
    print("method     ms/step  (quartiles)      / standard  (passes)  / pgd-40  (passes)")
    for name in steps:
        low, _, high = statistics.quantiles(seconds[name], n=4)
        print(
            f"{name:9} {1e3 * median[name]:8.1f}  ({1e3 * low:.1f}-{1e3 * high:.1f})".ljust(38)
            + f"{median[name] / median['standard']:8.2f}  ({costs[name] / costs['standard']:.2f})"
            + f"{median[name] / median['pgd-40']:13.3f}  ({costs[name] / costs['pgd-40']:.3f})"
        )


if __name__ == "__main__":
    main()
