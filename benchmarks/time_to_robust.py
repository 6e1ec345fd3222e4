"""Measure seconds of training from random weights until a model is robust.

    python benchmarks/time_to_robust.py                        # MNIST, every recipe, five seeds
    python benchmarks/time_to_robust.py cifar10 --data DIR     # CIFAR-10, a slim PreActResNet
    python benchmarks/time_to_robust.py --only sat-r2/mnist-speed --seeds 0 1 2 3 4
    python benchmarks/time_to_robust.py --table                # the rows so far, as Markdown

The MNIST race trains LeNet+ at eps 0.3, the CIFAR-10 race a slim PreActResNet at 8/255. A recipe
passes a threshold if the mean of its seeds' worst cases does: per image over FGSM and PGD-100 on
cross entropy and on the margin, from a full-radius start, on test images. Seconds are those of the
training steps, on all cores, with the same engine for all; no validation runs, and nothing is
selected. Each run has its own process. Run it on an idle machine; each seed runs all the recipes
asked for in turn, so that slow minutes affect all of them. All rows count for accuracy, whatever
the machine. Seconds are reported separately for each machine, and only of rows that had all cores
(--threads 1 is for training two seeds side by side, for their accuracy).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _table import FIELDS, QUICK, Row, append, machine, read, run_alone, spread, train_and_judge


@dataclass(frozen=True)
class Race:
    """A data set's recipes, and how they are compared.

    Attributes:
        recipes: by METHOD/PRESET[/EPOCHS], the changes to the preset.
        thresholds: thresholds of the worst case, in percent.
        dear: recipes relative to whose seconds, on the same kind of machine, others are reported.
        n: number of test images.
    """

    recipes: dict[str, dict[str, Any]]
    thresholds: tuple[int, ...]
    dear: tuple[str, ...]
    n: int


RACES = {
    "mnist": Race(
        {
            "sat-r1/mnist-speed": {},
            "sat-r2/mnist-speed": {},
            # The same engine, batch and growth of eps; SAT-R1 trains a quarter of an epoch longer.
            "pgd/mnist-speed": {},
            # About as long as 40 steps need for 85%.
            "pgd/mnist-speed/1.25": {"epochs": 1.25},
            # Seven long steps, as on the board: about as good, at a fifth of the cost of 40.
            "pgd/mnist-speed/1.5": {"epochs": 1.5, "params": {"steps": 7, "alpha": 0.1}},
            # In about the time that SAT takes.
            "pgd/mnist-speed/1": {"epochs": 1, "params": {"steps": 7, "alpha": 0.1}},
            # The published "Fast" recipe for MNIST, on its own network; known to mask at times.
            "rs-fgsm/mnist": {},
        },
        thresholds=(80, 85, 90),
        dear=("pgd/mnist-speed/1.25", "pgd/mnist-speed", "pgd/mnist-speed/1.5"),
        n=10_000,
    ),
    "cifar10": Race(
        {
            "sat-r1/cifar10-speed": {},
            "sat-r2/cifar10-speed": {},
            "pgd/cifar10-speed": {},
            # Cut short, for a fair ratio of times at a lower threshold.
            "pgd/cifar10-speed/2": {"epochs": 2},
            "rs-fgsm/cifar10-speed": {},
        },
        thresholds=(20, 22, 24),
        dear=("pgd/cifar10-speed/2", "pgd/cifar10-speed"),
        n=2000,
    ),
}
ACCURACIES = ("clean", "fgsm", "worst_case")
RECIPES = {name: changes for race in RACES.values() for name, changes in race.recipes.items()}


def table(rows: list[dict[str, str]], race: Race) -> None:
    """Print one line per recipe: accuracy over all seeds, seconds for each kind of machine."""
    head = ("recipe", "epochs", "runs", "clean", "FGSM", "worst case", "above, %")
    over = ", ".join(f"over {name}'s" for name in race.dear)
    print(f"| {' | '.join(head)} | seconds, {over} |\n|{'---|' * (len(head) + 1)}")
    recipes: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if name_of(row) in race.recipes:
            recipes.setdefault(name_of(row), []).append(row)
    for name, mine in recipes.items():
        # Accuracy counts from any machine. Where another one rounds otherwise, the same seed leads
        # to another network, which counts too; to the same one, it counts once.
        results = {tuple(row[key] for key in ("seed", *ACCURACIES)): row for row in mine}
        runs = list(results.values())
        cells = [name, mine[0]["epochs"], str(len(runs))]
        cells += [spread(runs, key, 100) for key in ACCURACIES]
        worst = 100 * mean(runs, "worst_case")
        cells.append(", ".join(str(t) for t in race.thresholds if worst >= t) or "none")
        places = []
        for where in sorted({row["machine"] for row in mine}):
            here = timed(mine, where)
            if not here:
                continue
            said = [spread(here, "train_seconds", 1)]
            for dear_one in race.dear:
                dear = timed(recipes.get(dear_one, []), where)
                ratio = mean(here, "train_seconds") / mean(dear, "train_seconds") if dear else None
                said.append("–" if ratio is None else f"{ratio:.3f}")
            places.append(f"{', '.join(said)} (n = {len(here)}, {where})")
        print(f"| {' | '.join([*cells, '; '.join(places) or '–'])} |")


def timed(rows: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    """Return the rows of one kind of machine whose seconds count: those run on all its cores.

    Seconds that were measured beside other work have been blanked.
    """
    here = [r for r in rows if r["machine"] == where and r["train_seconds"]]
    return [r for r in here if where.endswith(f", {r['threads']} cores")]


def name_of(row: dict[str, str]) -> str:
    """Return a row's name for --only: METHOD/PRESET, with the epochs if those were changed."""
    name = f"{row['method']}/{row['recipe']}"
    changed = f"{name}/{row['epochs']}"
    return changed if changed in RECIPES else name


def mean(rows: list[dict[str, str]], key: str) -> float:
    return statistics.mean(float(row[key]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("race", nargs="?", choices=list(RACES), default="mnist")
    parser.add_argument("--only", nargs="*", help="METHOD/PRESET[/EPOCHS]")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--data", help="location of the data set, if not embedded")
    parser.add_argument("--n", type=int, help="test images, instead of the race's")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/time_to_robust.csv"))
    parser.add_argument("--table", action="store_true", help="print the rows of --out as Markdown")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    race = RACES[args.race]
    only = args.only or list(race.recipes)
    if unknown := [name for name in only if name not in race.recipes]:
        parser.error(f"{unknown[0]} is none of {', '.join(race.recipes)}: add it to RACES")
    if args.row:
        print(json.dumps(train_and_judge(Row(**json.loads(args.row)), 100, args.n, args.data)))
        return
    rows = read(args.out)
    if args.table:
        return table(rows, race)
    here = [row for row in rows if row["machine"] == machine()]
    done = {
        (name_of(r), int(r["seed"]), int(r["threads"]), int(r["n"]))
        for r in here
        if r["train_seconds"]
    }
    for seed in args.seeds:
        for name in only:
            n = args.n or race.n
            if (name, seed, args.threads, n) in done:
                continue
            method, recipe = name.split("/")[:2]
            row = Row(method, recipe, seed, {**QUICK, **race.recipes[name]})
            result = run_alone(row, threads=args.threads, n=n, data=args.data)
            if result:
                append(args.out, FIELDS, result)
                said = f"{result['train_seconds']} s, worst case {result['worst_case']:.3f}"
                print(f"{name} seed {seed}: {said}", flush=True)


if __name__ == "__main__":
    main()
