"""Produce the loss surface of a masked model, which reports show beside the judged model's.

    OMP_NUM_THREADS=1 python benchmarks/masked_surface.py

Trains LeNet+ on MNIST with plain FGSM, checks that it is masked, and writes
src/surestep/report/masked_surface.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from surestep import evaluate, files, runs
from surestep.data import Batches
from surestep.report import gather

OUT = Path(__file__).parents[1] / "src" / "surestep" / "report" / "masked_surface.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=1000, help="test images to judge on")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    changes = {"epochs": 4, "lr": 0.03, "engine": "fast", "val_images": 100, "select": "last"}
    config = runs.resolve({"method": "fgsm", "seed": args.seed, **changes}, "mnist-fast")
    model, threat = runs.train(config, None).model, runs.build_threat(config)
    test = runs.load_data(config, "test")
    judged = evaluate(model, test, threat, ("fgsm", "pgd-50"), n=args.n, seed=args.seed)
    looks, holds = (judged.robust_accuracy[name] for name in ("fgsm", "pgd-50"))
    print(f"FGSM {looks:.1%}, PGD-50 {holds:.1%} on {judged.n} images")
    if looks - holds < 0.5:
        sys.exit("this model is not masked: try another seed")
    x, y, _ = next(iter(Batches(test, 256, shuffle=False).epoch(0)))
    surface = gather(model, x, y, threat, seed=args.seed)["surfaces"]["this model"]
    about = {
        "model": f"{config.model} trained on {config.dataset} with plain FGSM "
        "(mnist-fast, 4 epochs, lr 0.03)",
        "fgsm_accuracy": looks,
        "pgd_accuracy": holds,
        "judged_on": judged.n,
        "command": "OMP_NUM_THREADS=1 python " + " ".join(sys.argv),
        "torch": torch.__version__,
    }
    files.write_atomically(args.out, json.dumps({**surface, **about}) + "\n")


if __name__ == "__main__":
    main()
