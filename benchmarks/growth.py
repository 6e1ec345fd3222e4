"""Measure how time and memory grow with batch, image size, classes and data set.

    python benchmarks/growth.py                      # every axis
    python benchmarks/growth.py --only images        # one of them
    python benchmarks/growth.py --table              # the rows so far, as Markdown
    python benchmarks/growth.py --plot docs/growth.svg

Each point has its own process, which takes SAT-R2 steps on batches drawn from a data set. It
reports the median time of --rounds steps after a warm-up, and the peak resident memory without
mapped files. Pixels are random and labels arbitrary (the cost is the same). The data sets of the
last axis are in a memory-mapped file, one of them larger than memory. "Waiting" is the mean time
that a step waits for its batch. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _table import append, origin, read

AXES: dict[str, list[dict[str, Any]]] = {
    "batch": [{"batch": n} for n in (8, 32, 128, 512, 2048)],
    "image": [
        {"model": "preactresnet10-slim", "channels": 3, "size": size, "batch": 16}
        for size in (28, 32, 64, 224)
    ],
    "classes": [
        {"model": "preactresnet10-slim", "channels": 3, "size": 32, "batch": 64, "classes": k}
        for k in (10, 100, 1000)
    ],
    "images": [{"images": n, "mapped": True} for n in (1_000, 10_000, 100_000, 1_000_000)]
    + [
        # 31 GB: more than the memory of the machine it was first run on.
        {
            "images": n,
            "mapped": True,
            "model": "preactresnet10-slim",
            "channels": 3,
            "size": 64,
            "batch": 32,
        }
        for n in (1_000, 2_500_000)
    ],
}
DEFAULTS = {"model": "lenet+", "channels": 1, "size": 28, "classes": 10, "batch": 128}
DEFAULTS |= {"images": 2048, "mapped": False}
FIELDS = [
    *("axis", *DEFAULTS, "method", "us_per_image", "us_low", "us_high", "us_waiting"),
    *("peak_mb", "start_mb", "file_mb", "threads", "rounds", "torch", "machine", "commit", "date"),
]


def own_mb() -> float:
    """Return the resident memory in MB, without mapped files if the system tells them apart."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return float(lines["RssAnon"].split()[0]) / 1024


def point(settings: dict[str, Any], rounds: int, folder: str) -> dict[str, Any]:
    """Measure one point in this process."""
    import torch

    from surestep import Linf, methods, models
    from surestep.data import Batches, as_images
    from surestep.training import make_optimizer, make_step

    shape = (settings["images"], settings["channels"], settings["size"], settings["size"])
    x: Any
    if settings["mapped"]:
        # Write real bytes, a repeated random block; a sparse file would have holes.
        path = Path(folder) / "x.npy"
        x = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        piece = np.random.default_rng(0).integers(0, 256, (1000, *shape[1:]), dtype=np.uint8)
        for start in range(0, len(x), 1000):
            x[start : start + 1000] = piece[: len(x) - start]
        x.flush()
        del x
        x = np.load(path, mmap_mode="r")
    else:
        x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    y = np.arange(len(x)) % settings["classes"]
    images = as_images((x, y), num_classes=settings["classes"])
    torch.manual_seed(0)
    model = models.create(
        settings["model"],
        settings["classes"],
        in_channels=settings["channels"],
        image_size=settings["size"],
    ).train()
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.01)
    step = make_step(model, methods.build("sat-r2", Linf(0.1), {}), optimizer)
    source = Batches(images, settings["batch"])
    seconds: list[float] = []
    waiting: list[float] = []
    epoch, start_mb = 0, own_mb()
    peak = start_mb
    while len(seconds) < rounds + 2:
        batches = source.epoch(epoch)
        epoch += 1
        while len(seconds) < rounds + 2:
            begin = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            waiting.append(time.perf_counter() - begin)
            step(*batch)
            seconds.append(time.perf_counter() - begin)
            # The engine keeps freed memory, so after a step the process is as large as during it.
            peak = max(peak, own_mb())
    micros = [1e6 * s / settings["batch"] for s in seconds[2:]]
    low, _, high = statistics.quantiles(micros, n=4)
    return {
        "us_per_image": round(statistics.median(micros), 1),
        "us_low": round(low, 1),
        "us_high": round(high, 1),
        "us_waiting": round(1e6 * statistics.mean(waiting[2:]) / settings["batch"], 1),
        "peak_mb": round(peak),
        "start_mb": round(start_mb),
        "file_mb": round(int(np.prod(shape)) / 1e6) if settings["mapped"] else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def table(rows: list[dict[str, str]]) -> None:
    """Print a table for each axis."""
    for axis in AXES:
        mine = [row for row in rows if row["axis"] == axis]
        if not mine:
            continue
        print("\n| network | image | classes | batch | images | us/image | quartiles | MB |")
        print("|---|---|---|---|---|---|---|---|")
        for r in mine:
            file = f" ({int(r['file_mb']):,} MB file)" if r["file_mb"] else ""
            cells = [r["model"], f"{r['channels']}x{r['size']}x{r['size']}", r["classes"]]
            cells += [r["batch"], f"{int(r['images']):,}{file}", r["us_per_image"]]
            cells += [f"{r['us_low']}-{r['us_high']}", r["peak_mb"]]
            print(f"| {' | '.join(cells)} |")


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Plot time and memory against each axis on logarithmic scales."""
    import altair as alt

    names = {"batch": "batch", "image": "size", "classes": "classes", "images": "images"}
    measured = {"us_per_image": "microseconds per image", "peak_mb": "MB of the process"}
    lines = []
    for column, title in measured.items():
        charts = []
        for axis, along in names.items():
            data = [
                {
                    "x": float(r[along]),
                    title: float(r[column]),
                    "network": "preactresnet10-slim"
                    if axis == "image"
                    else f"{r['model']}, {r['size']} px",
                }
                for r in rows
                if r["axis"] == axis
            ]
            charts.append(
                alt.Chart(alt.Data(values=data), width=170, height=150)
                .mark_line(point=True)
                .encode(
                    x=alt.X("x:Q", scale=alt.Scale(type="log"), title=axis),
                    y=alt.Y(f"{title}:Q", scale=alt.Scale(type="log")),
                    color=alt.Color("network:N", legend=alt.Legend(orient="bottom", columns=3)),
                )
            )
        lines.append(alt.hconcat(*charts))
    alt.vconcat(*lines).save(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/growth.csv"))
    parser.add_argument("--table", action="store_true", help="print the rows of --out as tables")
    parser.add_argument("--plot", type=Path, help="plot the rows of --out to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            print(json.dumps(point(json.loads(args.one), args.rounds, folder)))
        return None
    rows = read(args.out)
    if args.table:
        return table(rows)
    if args.plot:
        return plot(rows, args.plot)
    for axis in args.only:
        for changes in AXES[axis]:
            settings = {**DEFAULTS, **changes}
            command = [sys.executable, __file__, "--one", json.dumps(settings)]
            command += ["--rounds", str(args.rounds)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                print(f"FAILED {changes}: {done.stderr[-500:]}", flush=True)
                continue
            row = {"axis": axis, **settings, "method": "sat-r2", **json.loads(done.stdout)}
            row |= {"rounds": args.rounds, **origin()}
            append(args.out, FIELDS, row)
            print(f"{axis} {changes}: {row['us_per_image']} us/image, {row['peak_mb']} MB")
    return None


if __name__ == "__main__":
    main()
