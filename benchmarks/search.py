"""Grid search for the settings of the short recipes, judged on validation images.

    python benchmarks/search.py sat-r2/mnist-fast '{"epochs": [2, 3], "params.lam": [2, 5]}'
    python benchmarks/search.py --best 2     # points with two seeds or more, cheapest first

Each point trains without validation, on one core and one thread, and is judged by FGSM and PGD-100
on cross entropy and margin on the first --n of the 10,000 held-out images, never on test images.
Its cost is epochs times passes per step, divided by the passes of a standard step, so that points
measured on a busy machine are comparable. Points already in the CSV, with --n images or more, are
skipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _table import QUICK, Row, append, read, run_alone, train_and_judge

FIELDS = [
    *("method", "recipe", "changes", "seed", "cost", "clean", "fgsm", "pgd", "pgd_margin"),
    *("worst_case", "n", "train_seconds", "commit", "torch", "machine", "date"),
]


def points(grid: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the settings of each point of a grid; "params.NAME" is a method's parameter."""
    for values in itertools.product(*grid.values()):
        settings: dict[str, Any] = {}
        for name, value in zip(grid, values, strict=True):
            if name.startswith("params."):
                settings.setdefault("params", {})[name.removeprefix("params.")] = value
            else:
                settings[name] = value
        yield settings


def cost(row: Row) -> float:
    """Return the cost of training in epochs of standard training."""
    from surestep import runs

    config = row.resolve()
    return config.epochs * runs.passes_of(config) / 3


def run(row: Row, args: argparse.Namespace) -> None:
    """Train and judge one point, and append its row to the CSV."""
    full = Row(row.method, row.recipe, row.seed, {**QUICK, **row.changes})
    result = run_alone(full, threads=1, n=args.n, data=args.data)
    if result:
        result |= {"changes": json.dumps(row.changes), "cost": round(cost(row), 2)}
        append(args.out, FIELDS, result)
        print(f"{result['changes']} cost {result['cost']} {result['worst_case']:.3f}", flush=True)


def best(rows: list[dict[str, str]], least: int) -> None:
    """Print means over seeds, cheapest first, of points with at least ``least`` seeds."""
    groups: dict[tuple[str, str, str, str, str], dict[str, float]] = {}
    for row in rows:
        # With another number of images it is another measurement.
        key = (row["cost"], row["n"], row["method"], row["recipe"], row["changes"])
        groups.setdefault(key, {})[row["seed"]] = float(row["worst_case"])
    for key in sorted(groups, key=lambda key: float(key[0])):
        found = list(groups[key].values())
        if len(found) >= least:
            mean, low = sum(found) / len(found), min(found)
            said = f"mean {mean:.3f}  least {low:.3f}  seeds {len(found)}  images {key[1]:>5}"
            print(f"cost {key[0]:>6}  {said}  {key[2:]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", nargs="?", help="METHOD/PRESET to start from")
    parser.add_argument("grid", nargs="?", default="{}", help="JSON: a list of values per setting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--n", type=int, default=1000, help="validation images")
    parser.add_argument("--data", help="location of the data set, if not embedded")
    parser.add_argument("--jobs", type=int, default=2, help="points at a time, one core each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/search.csv"))
    parser.add_argument("--best", type=int, metavar="SEEDS", help="print points with so many seeds")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        row = Row(**json.loads(args.row))
        print(json.dumps(train_and_judge(row, 100, args.n, args.data, "validation")))
        return
    rows = read(args.out)
    if args.best:
        return best(rows, args.best)
    judged = [row for row in rows if int(row["n"]) >= args.n]
    done = {(r["method"], r["recipe"], r["changes"], int(r["seed"])) for r in judged}
    method, _, recipe = args.recipe.partition("/")
    todo = [
        Row(method, recipe, seed, settings)
        for settings in points(json.loads(args.grid))
        for seed in args.seeds
        if (method, recipe, json.dumps(settings), seed) not in done
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda row: run(row, args), todo))


if __name__ == "__main__":
    main()
