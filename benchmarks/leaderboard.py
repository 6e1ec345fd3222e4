"""The leaderboard: train, judge and audit every method under one protocol.

    python benchmarks/leaderboard.py mnist                     # LeNet+, eps 0.3, all methods
    python benchmarks/leaderboard.py cifar10 --data DIR        # slim PreActResNet, 8/255 and 16/255
    python benchmarks/leaderboard.py fastat --data DIR --jobs 1  # ResNet-18, 100 epochs: for a GPU
    python benchmarks/leaderboard.py mnist --plain             # without the combinations of SAT
    python benchmarks/leaderboard.py mnist --only fgsm sat-r2 --seeds 0
    python benchmarks/leaderboard.py --table docs/leaderboard.md

A row is a method, a radius and a seed. It is trained by the board's protocol with the method's own
parameters (and label smoothing, growth of eps, clipping) for the data, judged on test images by
FGSM and PGD on cross entropy and margin, and audited, so that masked rows can be marked. Every
row runs on one thread, and its seconds are CPU time (on a GPU, the time of the training steps).
They are held against those of standard training, estimated in the same process from some of its
steps just before: what else runs on a machine slows both.
Rows already in the CSV are skipped, unless their settings have changed since; then the later row
counts. A stopped board continues where it was. It runs seed after seed, so that all methods have
one seed before any has two.

The protocol of the first two boards is the FastAT benchmark's (arXiv 2604.22853), scaled down to
two cores: fewer epochs, smaller networks, and at most 7 steps for multi-step attacks in training.
Nothing is selected: the last weights are judged. The third board has the benchmark's own settings
(label smoothing for all, averaged weights selected on 1,000 held-out images, AutoAttack), except
that it trains on 40,000 images, since surestep holds out a fifth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _board_page import DIVERGED, write
from _table import QUICK, Row, append, read, run_alone

if TYPE_CHECKING:
    import torch

    from surestep.config import RunConfig

FIELDS = [
    *(
        "board",
        "entry",
        "method",
        "eps",
        "seed",
        "passes",
        "train_seconds",
        "standard_seconds",
        "clean",
        "fgsm",
        "pgd",
    ),
    *("pgd_margin", "worst_case", "n", "verdict", "found", "found_by", "flags", "audit_n"),
    *("audit_seconds", "settings", "params", "commit", "torch", "machine", "date", "command"),
]
MULTI_STEP = {"steps": 7, "alpha": 0.1}
"""Parameters of training attacks that by their presets take 40 steps of 0.01 on MNIST."""


@dataclass(frozen=True)
class Board:
    """A protocol.

    Attributes:
        settings: training settings, which override the methods' presets.
        eps: the radii.
        seeds: number of seeds.
        steps: steps of the PGD that judges.
        n: number of test images to judge on.
        audit_n: number of test images to audit on.
        params: for some methods, hyperparameters that the protocol changes.
        only: the methods; all if empty.
        combined: the entries of ``COMBINED`` to run, too; all if None.
        own: for some methods, settings that override the board's.
        preset: the methods' preset; by default the one named after the board.
        autoattack: whether AutoAttack judges, too.
    """

    settings: dict[str, Any]
    eps: tuple[float, ...]
    seeds: int
    steps: int
    n: int
    audit_n: int
    params: dict[str, dict[str, Any]] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    combined: tuple[str, ...] | None = None
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    preset: str | None = None
    autoattack: bool = False

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks that judge; PGD is second and third."""
        pgd = f"pgd-{self.steps}"
        return ("fgsm", pgd, f"{pgd}-margin", *(("autoattack",) if self.autoattack else ()))


BOARDS = {
    "mnist": Board(
        {
            **{"model": "lenet+", "epochs": 2, "batch_size": 64, "lr": 0.05},
            **{"optimizer": "sgd", "weight_decay": 5e-4, "schedule": "onecycle", "warmup": 0.0},
        },
        (0.3,),
        seeds=3,
        steps=100,
        n=1000,
        audit_n=100,
        params={
            **dict.fromkeys(("pgd", "pgd-wa", "trades", "mart", "alp", "fat", "iaat"), MULTI_STEP),
            "uat": MULTI_STEP,
            # The published fraction on LeNet+: one image in 32.
            "sat-r1": {"fraction": 1 / 32},
            # Comparing epochs, it is inactive in the first two, and here there are only two.
            "converge-smooth": {"compare": "batch"},
        },
    ),
    "cifar10": Board(
        {
            **{"model": "preactresnet10-slim", "normalize": True, "epochs": 4, "batch_size": 128},
            **{"lr": 0.1, "optimizer": "sgd", "weight_decay": 5e-4, "schedule": "onecycle"},
            **{"warmup": 0.0, "augment": "crop-flip"},
        },
        (8 / 255, 16 / 255),
        seeds=2,
        steps=20,
        n=1000,
        audit_n=100,
        params={"pgd": {"steps": 7}, "trades": {"steps": 7}},
        # Not GradAlign: torch differentiates batch norm's gradients pixel by pixel, and on two
        # cores its step takes as long as 21 standard steps (step_cost.py).
        only=(
            *("standard", "fgsm", "rs-fgsm", "n-fgsm", "sat-r1", "sat-r2", "sat-r3", "pgd"),
            *("aaer", "nuat", "fgsm-cuap", "fgsm-mep", "trades"),
        ),
    ),
    "fastat": Board(
        {
            **{"model": "resnet18", "normalize": True, "epochs": 100, "batch_size": 128},
            **{"lr": 0.1, "optimizer": "sgd", "weight_decay": 5e-4, "schedule": "onecycle"},
            **{"warmup": 0.0, "augment": "crop-flip", "label_smoothing": 0.4, "ema": 0.9995},
            **{"val_images": 1000, "val_attacks": ["fgsm", "pgd-10"], "select": "best"},
        },
        (8 / 255,),
        seeds=3,
        steps=50,
        n=10_000,
        audit_n=1000,
        params={"pgd": {"steps": 10, "alpha": 2 / 255}, "nuat": {"lam": 4.0}},
        combined=("sat-r2 + hypersphere", "sat-r2 + awp", "sat-r2 on n-fgsm"),
        # LIET and TDAT smooth the labels themselves.
        own={
            "pgd": {"ema": None},
            "liet": {"label_smoothing": 0.0},
            "tdat": {"label_smoothing": 0.0},
        },
        preset="cifar10",
        autoattack=True,
    ),
}
COMBINED: dict[str, dict[str, Any]] = {
    "sat-r2 + hypersphere": {"method": "sat-r2", "head": "hypersphere"},
    "sat-r2 + ema": {"method": "sat-r2", "ema": 0.99},
    "sat-r2 + awp": {"method": "sat-r2", "awp": 0.001},
    "sat-r2 on n-fgsm": {"method": "sat-r2", "params": {"perturbation": "n-fgsm noise=1/2"}},
    "sat-r2 on rs-fgsm": {"method": "sat-r2", "params": {"perturbation": "rs-fgsm"}},
    "sat-r2 + eps warm-up": {"method": "sat-r2", "eps_warmup": 0.7},
    "sat-r1 (a quarter, K = 5, lam 1) + eps warm-up": {
        "method": "sat-r1",
        "eps_warmup": 0.7,
        "params": {"fraction": 1 / 4, "steps": 5, "lam": 1.0},
    },
    "sat-r1 (half, K = 7, lam 1) + eps warm-up": {
        "method": "sat-r1",
        "eps_warmup": 0.7,
        "params": {"fraction": 1 / 2, "steps": 7, "lam": 1.0},
    },
    "sat-r1 (all, K = 5, lam 1) + eps warm-up": {
        "method": "sat-r1",
        "eps_warmup": 0.7,
        "params": {"fraction": 1.0, "steps": 5, "lam": 1.0},
    },
    "sat-r1 (all, K = 7, lam 1) + eps warm-up": {
        "method": "sat-r1",
        "eps_warmup": 0.7,
        "params": {"fraction": 1.0, "steps": 7, "lam": 1.0},
    },
}
"""SAT combined with parts that work with any method, or built on another single step."""
CHANGED = {
    # Attacks in train mode had no gradient on images that the network was sure of.
    **dict.fromkeys(
        ("rs-fgsm", "zerograd", "multigrad", "ssat", "gradalign", "elle", "elle-a"),
        "2026-11-28T18:22",
    ),
    **dict.fromkeys(("n-fgsm", "sat-r2 on n-fgsm", "eat", "converge-smooth"), "2026-11-29T16:46"),
    "iaat": "2026-11-29T22:05",
    **dict.fromkeys(("aaer", "sads", "gat", "r-mgm", "nuat"), "2026-11-29T17:09"),
}
"""When an entry's mathematics last changed (UTC): older rows are marked and measured anew."""


def entries(board: Board) -> dict[str, dict[str, Any]]:
    """Return the board's entries: by name, the settings, including the method."""
    from surestep import methods

    names = board.only or tuple(methods.names())
    combined = {k: v for k, v in COMBINED.items() if board.combined is None or k in board.combined}
    return {**{name: {"method": name, **board.own.get(name, {})} for name in names}, **combined}


def rows(
    name: str, only: list[str], seeds: list[int] | None, plain: bool = False
) -> Iterator[tuple[str, Row]]:
    """Yield the board's rows, seed after seed."""
    board = BOARDS[name]
    wanted = only or [k for k in entries(board) if not (plain and k in COMBINED)]
    chosen = {k: v for k, v in entries(board).items() if k in wanted}
    for seed in range(board.seeds) if seeds is None else seeds:
        for entry, own in chosen.items():
            for eps in board.eps:
                params = {**board.params.get(own["method"], {}), **own.get("params", {})}
                changes = {**QUICK, **board.settings, **own, "params": params, "eps": eps}
                del changes["method"]
                yield entry, Row(own["method"], board.preset or name, seed, changes)


def missing(
    name: str, pairs: Iterator[tuple[str, Row]], found: list[dict[str, str]]
) -> list[tuple[str, Row]]:
    """Return the rows of a board that have not been measured as their entries are now."""
    done = {(r["board"], r["entry"], r["eps"], r["seed"]): r for r in found if not outdated(r)}
    todo = []
    for entry, row in pairs:
        config = row.resolve()
        key = (name, entry, str(round(config.eps, 4)), str(row.seed))
        if key not in done or differs(config, done[key]):
            todo.append((entry, row))
    return todo


def outdated(row: dict[str, str]) -> bool:
    """Tell whether a row was measured before its entry's mathematics last changed."""
    return row["date"] < CHANGED.get(row["entry"], "")


def trained_with(config: RunConfig) -> dict[str, Any]:
    """Return the settings that affect training, except those with their own CSV columns."""
    columns = {"method", "params", "seed"}
    of_no_matter = {"data", "device", "max_memory", "tensorboard", "checkpoint_every"}
    unselected = set() if config.val_images else {"val_attacks"}
    return config.model_dump(mode="json", exclude={*columns, *of_no_matter, *unselected})


def differs(config: RunConfig, row: dict[str, str]) -> bool:
    """Tell whether a row has other settings; older rows recorded only the board's."""
    now, then = trained_with(config), json.loads(row["settings"])
    return json.loads(row["params"]) != config.params or {**now, **then} != now


def standard_seconds(config: RunConfig, device: torch.device) -> float:
    """Return the seconds that standard training of a row's network would take at this moment.

    The median of 30 steps, times their number; as a row's own seconds, CPU time or, on a GPU, that
    of the clock.
    """
    from surestep import methods, runs
    from surestep.data import Batches, augment
    from surestep.training import make_optimizer, make_step

    images = runs.load_data(config, "train")
    model = runs.build_model(config, images).to(device).train()
    optimizer = make_optimizer(
        config.optimizer, model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    method = methods.get("standard")(runs.build_threat(config))
    step = make_step(model, method, optimizer, "fast")
    change = augment.get(config.augment)
    batches = Batches(images, config.batch_size, augment=change, device=device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken, begin = [], clock()
    for x, y, _ in itertools.islice(batches.epoch(0), 35):
        float(step(x, y).loss)  # waits for the device
        taken.append(clock() - begin)
        begin = clock()
    return statistics.median(taken[5:]) * config.epochs * batches.steps_per_epoch


def train_judge_audit(name: str, row: Row, data: str | None) -> dict[str, Any]:
    """Train, judge and audit a row of a board."""
    import torch

    from surestep import audit, evaluate, runs
    from surestep.devices import pick_device
    from surestep.training import Engine, TrainingDiverged

    board, config = BOARDS[name], row.resolve(data)
    device = pick_device(config.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    standard = standard_seconds(config, device)
    begin = time.process_time()
    about = {
        **({"machine": gpu} if gpu else {}),
        "board": name,
        "method": row.method,
        "eps": round(config.eps, 4),
        "seed": row.seed,
        "passes": round(runs.passes_of(config), 2),
        "settings": json.dumps(trained_with(config)),
        "params": json.dumps(config.params),
        "torch": torch.__version__,
    }
    try:
        fitted = runs.train(config, None, quiet=True)
    except TrainingDiverged as e:
        return {**about, "verdict": DIVERGED, "found_by": str(e).partition(";")[0]}
    seconds, model = time.process_time() - begin, fitted.model
    if gpu:  # CPU time would miss the GPU's work
        seconds = fitted.train_seconds
    engine, threat = Engine.choose(device=device), runs.build_threat(config)
    test = runs.load_data(config, "test")
    # AutoAttack stops at points that bf16 misclassifies by a hair, so it runs in float32.
    precision = torch.float32 if board.autoattack else engine.precision
    judged = evaluate(
        engine.place(model), test, threat, board.attacks, n=board.n, precision=precision
    )
    audited = audit(model, test, threat, budget="quick", n=board.audit_n)
    _, pgd, margin, *_ = board.attacks
    return {
        **about,
        "train_seconds": round(seconds, 1),
        "standard_seconds": round(standard, 1),
        "clean": judged.clean_accuracy,
        "fgsm": judged.robust_accuracy["fgsm"],
        "pgd": judged.robust_accuracy[pgd],
        "pgd_margin": judged.robust_accuracy[margin],
        "worst_case": judged.worst_case_accuracy,
        "n": judged.n,
        "verdict": audited.verdict,
        "found": audited.found_accuracy,
        "found_by": audited.found_by,
        "flags": sum(check.flagged for check in audited.checks),
        "audit_n": audited.n,
        "audit_seconds": round(audited.seconds, 1),
    }


def run(entry: str, row: Row, args: argparse.Namespace) -> None:
    """Run a row in its own process and append it to the CSV."""
    begin = time.time()
    result = run_alone(row, args.board, threads=1, data=args.data)
    if result:
        append(args.out, FIELDS, {**result, "entry": entry})
        if result["verdict"] == DIVERGED:
            print(f"{entry} seed {row.seed}: {result['found_by']}", flush=True)
            return
        print(
            f"{time.time() - begin:4.0f} s  {entry} eps {result['eps']} seed {row.seed}: clean "
            f"{result['clean']:.3f} fgsm {result['fgsm']:.3f} worst {result['worst_case']:.3f} "
            f"found {result['found']:.2f} {result['verdict']}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("board", nargs="?", choices=list(BOARDS))
    parser.add_argument("--only", nargs="*", default=[], help="entries to run")
    parser.add_argument(
        "--plain", action="store_true", help="leave out the combinations of SAT with other parts"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="*", help="seeds to run instead of all the board's"
    )
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time, one core each")
    parser.add_argument("--data", help="location of the data set")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/leaderboard.csv"))
    parser.add_argument(
        "--table", type=Path, metavar="PAGE", help="write the page from the rows of --out"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(train_judge_audit(args.board, Row(**json.loads(args.row)), args.data)))
        return
    found = read(args.out)
    if args.table:
        radii = {name: board.eps for name, board in BOARDS.items()}
        return write(found, args.table, radii, outdated)
    if args.board is None:
        parser.error(f"name a board to run, one of {', '.join(BOARDS)}; or --table PAGE")
    todo = missing(args.board, rows(args.board, args.only, args.seeds, args.plain), found)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda pair: run(pair[0], pair[1], args), todo))


if __name__ == "__main__":
    main()
