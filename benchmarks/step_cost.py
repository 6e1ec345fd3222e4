"""Measure a training step against the cost of its declared passes and against peers' steps.

    python benchmarks/step_cost.py                    # LeNet+, batch 32 and 128
    python benchmarks/step_cost.py --model preactresnet18 --batch-size 64 --methods fgsm sat-r2
    python benchmarks/step_cost.py --peers --out benchmarks/results/step_cost.csv
    python benchmarks/step_cost.py --methods all      # every method, with its default parameters
    OMP_NUM_THREADS=1 python benchmarks/step_cost.py --methods sat-r2 pgd-40   # one core

After a warm-up, all steps run in one process in turn, round after round, and the median over rounds
counts, so that other load on the machine affects all of them alike. Columns:

- ms/step, with the quartiles, and microseconds per image
- / standard: ratio to a step of standard training with the same engine; / dearest: ratio to the
  most expensive surestep step of this run
- over passes: the ratio / standard over the one that the declared passes predict; 1 is the limit
- of peak: FLOP/s of these passes over those of a matrix product, measured in the same precision
- peer / ours: with --peers, time of the same mathematics in the way of public training scripts (see
  _peers.py) over ours (for sat-r1 x4 our mean step; four of its steps regularise as many images as
  four of theirs); with --compile, time of our own step with the network compiled over ours

Run it on an idle machine. --memory measures peak memory instead, with one process per method that
takes --rounds steps:

    python benchmarks/step_cost.py --memory --model wrn-28-10 --batch-size 128 --rounds 1 \\
        --methods sat-r2 --max-memory 6
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import _peers
import torch
from _table import append, origin, read
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from surestep import Linf, data, methods, models
from surestep.training import Engine, make_optimizer, make_step
from surestep.training.engine import TrainStep
from surestep.training.memory import fit_into

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "fgsm": ("fgsm", {}),
    "sat-r1": ("sat-r1", {"fraction": 1 / 32}),
    "sat-r1 x4": ("sat-r1", {"fraction": 1 / 32, "every": 4}),
    "sat-r2": ("sat-r2", {}),
    "sat-r3": ("sat-r3", {}),
    "pgd-7": ("pgd", {"steps": 7, "alpha": 0.06}),
    # Measured only on request, as are all other methods (with their default parameters).
    "pgd-40": ("pgd", {"steps": 40, "alpha": 0.01}),
}
EPS = 0.3


def spec(name: str) -> tuple[str, dict[str, Any]]:
    """Return method and parameters for a name in ``METHODS``, or for a method's own name."""
    return METHODS.get(name, (name, {}))


def build_model(name: str, device: torch.device) -> tuple[nn.Module, int, int]:
    """Return a network with random weights, and the channels and size of its images."""
    channels, size = (1, 28) if name == "lenet+" else (3, 32)
    torch.manual_seed(0)
    model = models.create(name, in_channels=channels, image_size=size).train()
    return model.to(device), channels, size


def now(device: torch.device) -> float:
    """Return the time once the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def our_step(
    model_name: str,
    name: str,
    engine: str,
    batch: int,
    device: torch.device,
    max_memory: float | None = None,
    *,
    compiled: bool = False,
) -> tuple[TrainStep, methods.Method]:
    model, channels, size = build_model(model_name, device)
    slug, params = spec(name)
    method = methods.build(slug, Linf(EPS), params)
    method.progress = methods.Progress(images=batch)
    # With the peers' weight decay.
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.01, weight_decay=5e-4)
    chosen = Engine.choose(engine, device=device)
    if max_memory:
        shape = torch.Size([channels, size, size])
        model = fit_into(chosen.place(model), method, chosen, shape, batch, max_memory)
    if compiled:
        model = cast(nn.Module, torch.compile(chosen.place(model)))
    return make_step(model, method, optimizer, chosen), method


def say_what_is_missing() -> None:
    """Report which of the libraries that --peers measures are not installed."""
    for module, name in (("art", "adversarial-robustness-toolbox"), ("torchattacks",) * 2):
        if not importlib.util.find_spec(module):
            print(f"{name} is not installed: left out", file=sys.stderr)


def peer_steps(
    model_name: str, name: str, batch: int, device: torch.device
) -> dict[str, _peers.Step]:
    """Return the peers' implementations of one method's step, by peer."""

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = _peers.plain(build_model(model_name, device)[0])
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    makers: dict[str, Callable[..., _peers.Step]] = {
        "fgsm": _peers.fgsm,
        "sat-r1": lambda m, o, e: _peers.sat_r1(m, o, e, max(1, round(batch / 32))),
        "sat-r1 x4": lambda m, o, e: _peers.sat_r1(m, o, e, max(1, round(batch / 32))),
        "sat-r2": _peers.sat_r2,
        "sat-r3": _peers.sat_r3,
        "pgd-7": lambda m, o, e: _peers.pgd(m, o, e, 7, 0.06),
    }
    steps = {}
    if name in makers:
        steps["scripts"] = makers[name](*made(), EPS)
    if importlib.util.find_spec("torchattacks") and name in ("fgsm", "pgd-7"):
        make = _peers.torchattacks_fgsm if name == "fgsm" else _peers.torchattacks_pgd
        more: tuple[Any, ...] = () if name == "fgsm" else (7, 0.06)
        steps["torchattacks"] = make(*made(), EPS, *more)
    if importlib.util.find_spec("art") and name in ("fgsm", "pgd-7"):
        _, channels, size = build_model(model_name, device)
        more = () if name == "fgsm" else (7, 0.06)
        steps["art"] = _peers.art_step(*made(), EPS, (channels, size, size), *more)
    return steps


def images(model_name: str, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch: MNIST for LeNet+, random pixels (the cost is the same) for the others."""
    if model_name == "lenet+":
        x, y, _ = next(iter(data.Batches(data.load("mnist"), batch, device=device).epoch(0)))
        return x, y
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (batch,), generator=generator)
    return torch.rand(batch, 3, 32, 32, generator=generator).to(device), y.to(device)


def peak_rate(precision: torch.dtype, device: torch.device) -> float:
    """Return the best FLOP/s over 20 large matrix products in the given precision."""
    side = 2048 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(precision)
    best = 0.0
    for _ in range(20):
        start = now(device)
        a @ a
        best = max(best, 2 * side**3 / (now(device) - start))
    return best


def flops(model_name: str, x: torch.Tensor) -> float:
    """Return the FLOPs of one image's forward pass."""
    model, _, _ = build_model(model_name, x.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x[:2])
    return counter.get_total_flops() / 2


def measure(args: argparse.Namespace, batch: int) -> list[dict[str, Any]]:
    x, y = images(args.model, batch, args.device)
    index = torch.arange(batch, device=args.device)
    steps: dict[tuple[str, str], Callable[..., Any]] = {}
    costs: dict[str, float] = {}
    names = ["standard", *(m for m in args.methods if m != "standard")]
    for name in names:
        step, method = our_step(args.model, name, args.engine, batch, args.device)
        steps[name, "surestep"] = partial(step, index=index)
        costs[name] = method.cost(batch).total
        if args.compile:
            step, _ = our_step(args.model, name, args.engine, batch, args.device, compiled=True)
            steps[name, "compiled"] = partial(step, index=index)
        if args.peers:
            steps |= {
                (name, k): v for k, v in peer_steps(args.model, name, batch, args.device).items()
            }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for round_number in range(args.rounds + 3):
        for key, take in steps.items():
            # If a method's steps differ cyclically, take the mean over one cycle.
            turn = spec(key[0])[1].get("every", 1)
            start = now(args.device)
            for _ in range(turn):
                take(x, y)
            if round_number >= 3:  # the first ones warm up
                seconds[key].append((now(args.device) - start) / turn)
    precision = Engine.choose(args.engine, device=args.device).precision
    image_flops, peak = flops(args.model, x), peak_rate(precision, args.device)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    dearest = max(median[name, "surestep"] for name in names)
    rows = []
    for (name, who), values in seconds.items():
        ours, standard = median[name, "surestep"], median["standard", "surestep"]
        low, _, high = statistics.quantiles(values, n=4)
        ratio = ours / standard
        row: dict[str, Any] = {"model": args.model, "batch": batch, "method": name, "by": who}
        row |= {"ms": 1e3 * median[name, who], "ms_low": 1e3 * low, "ms_high": 1e3 * high}
        row["us_per_image"] = 1e6 * median[name, who] / batch
        if who == "surestep":
            predicted = costs[name] / costs["standard"]
            rate = costs[name] * image_flops * batch / ours
            row["over_dearest"] = ours / dearest
            row |= {"over_standard": ratio, "passes": costs[name], "predicted": predicted}
            row |= {"over_passes": ratio / predicted, "share_of_peak": rate / peak}
        else:
            row["peer_over_ours"] = median[name, who] / ours
        rows.append(row)
    return rows


FIELDS = [
    *("model", "batch", "method", "by", "ms", "ms_low", "ms_high", "us_per_image"),
    *(
        "over_standard",
        "over_dearest",
        "passes",
        "predicted",
        "over_passes",
        "share_of_peak",
        "peer_over_ours",
    ),
    *("peak_mb", "engine", "threads", "rounds", "torch", "machine", "commit", "date"),
]


def show(rows: list[dict[str, Any]]) -> None:
    head = f"{'method':11} {'by':12} {'ms/step':>9} {'quartiles':>15} {'us/image':>9}"
    head += f" {'/standard':>10} {'/dearest':>9} {'over passes':>12}"
    print(f"{head} {'of peak':>8} {'peer/ours':>10}")
    for r in rows:
        between = f"{r['ms_low']:.2f}-{r['ms_high']:.2f}"
        line = (
            f"{r['method']:11} {r['by']:12} {r['ms']:9.2f} {between:>15} {r['us_per_image']:9.1f}"
        )
        if r["by"] == "surestep":
            line += f" {r['over_standard']:10.2f} {r['over_dearest']:9.3f}"
            line += f" {r['over_passes']:12.2f} {r['share_of_peak']:8.1%}"
        else:
            line += f" {'':10} {'':9} {'':12} {'':8} {r['peer_over_ours']:10.2f}"
        print(line)


def table(rows: list[dict[str, str]]) -> None:
    """Print one line per surestep step, with the peers' ratios beside it."""
    head = (
        "network",
        "batch",
        "method",
        "ms",
        "/ standard",
        "passes",
        "over passes",
        "peer / ours",
    )
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for r in rows:
        if r["by"] != "surestep":
            continue
        same = ("model", "batch", "method", "date", "commit")
        peers = [p for p in rows if p["peer_over_ours"] and all(p[k] == r[k] for k in same)]
        cells = [r["model"], r["batch"], r["method"], f"{float(r['ms']):.1f}"]
        cells += [f"{float(r['over_standard']):.2f}", f"{float(r['passes']):.2f}"]
        cells += [f"{float(r['over_passes']):.2f}"]
        cells += [", ".join(f"{p['by']} {float(p['peer_over_ours']):.2f}" for p in peers)]
        print(f"| {' | '.join(cells)} |")


def peak_memory(args: argparse.Namespace) -> None:
    """Print the peak memory of a few steps of each method, each in its own process.

    On the CPU this is resident memory, on a GPU the memory of the tensors there.
    """
    for batch in args.batch_size:
        for name in args.methods:
            options = ["--model", args.model, "--engine", args.engine, "--batch-size", str(batch)]
            options += ["--rounds", str(args.rounds), "--device", str(args.device)]
            options += ["--max-memory", str(args.max_memory)] if args.max_memory else []
            command = [sys.executable, __file__, *options, "--one", name]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                print(f"batch {batch:4} {name:11} {done.stderr.splitlines()[-1]}", flush=True)
                continue
            found = json.loads(done.stdout)
            print(
                f"batch {batch:4} {name:11} peak {found['peak_mb'] / 1024:.2f} GiB, "
                f"{found['before_mb'] / 1024:.2f} before the model; {found['ms'] / 1e3:.3f} s a "
                f"step, the fastest of {args.rounds}",
                flush=True,
            )
            if args.out:
                limit = f" within {args.max_memory:g} GiB" if args.max_memory else ""
                row = {"model": args.model, "batch": batch, "method": name}
                row |= {"by": f"memory{limit}", **found}
                append(args.out, FIELDS, {**row, **circumstances(args)})


def one(args: argparse.Namespace) -> None:
    x, y = images(args.model, args.batch_size[0], args.device)
    before = memory_so_far(args.device)
    step, _ = our_step(args.model, args.one, args.engine, len(x), args.device, args.max_memory)
    seconds = []
    for _ in range(args.rounds):
        start = now(args.device)
        step(x, y, torch.arange(len(x), device=args.device))
        seconds.append(now(args.device) - start)
    peak = memory_so_far(args.device)
    found = {"peak_mb": round(peak / 2**20), "before_mb": round(before / 2**20)}
    print(json.dumps({**found, "ms": round(1e3 * min(seconds), 1)}))


def memory_so_far(device: torch.device) -> int:
    """Return the process's peak memory so far, in bytes: on the GPU, or on the host for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """Return the entries of every row on how and where it was measured."""
    made = {"engine": args.engine, "threads": torch.get_num_threads(), "rounds": args.rounds}
    told = {**made, "torch": torch.__version__, **origin()}
    if args.device.type == "cuda":
        told["machine"] = torch.cuda.get_device_name(args.device)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lenet+")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS)[:-1],
        choices=["all", *METHODS, *(name for name in methods.names() if name not in METHODS)],
        metavar="NAME",
        help=f"any of {', '.join(METHODS)}, any other method, or all",
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--engine", default="auto", choices=("auto", "fast", "reference"))
    parser.add_argument("--device", default="cpu", help="where the steps run: cpu, cuda, cuda:1")
    parser.add_argument("--peers", action="store_true", help="also measure the peers' steps")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of seconds")
    parser.add_argument("--max-memory", type=float, metavar="GIB", help="limit, with --memory")
    parser.add_argument("--out", type=Path, help="CSV to add the rows to")
    parser.add_argument(
        "--table", type=Path, metavar="CSV", help="print the rows of the file as Markdown"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = torch.device(args.device)
    if "all" in args.methods:
        args.methods = methods.names()
    if args.one:
        return one(args)
    if args.table:
        return table(read(args.table))
    if args.memory:
        return peak_memory(args)
    if args.peers:
        say_what_is_missing()
    for batch in args.batch_size:
        rows = measure(args, batch)
        threads = torch.get_num_threads()
        where = f"{threads} threads" if args.device.type == "cpu" else str(args.device)
        print(f"\n{args.model}, batch {batch}, engine {args.engine}, {where}")
        show(rows)
        if args.out:
            made = circumstances(args)
            for row in rows:
                append(args.out, FIELDS, {**row, **made})
    return None


if __name__ == "__main__":
    main()
