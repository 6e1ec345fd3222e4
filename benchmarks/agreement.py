"""Compare surestep's attacks with foolbox's, ART's and AutoAttack's on the same model and images.

    pip install foolbox adversarial-robustness-toolbox
    surestep train --method sat-r2 --preset mnist-demo --out runs/sat-r2
    python benchmarks/agreement.py runs/sat-r2 --n 1000 --seeds 3

Every PGD takes 100 steps of eps / 30 on cross entropy, from a random start in the whole ball.
Accuracy is the share of images classified correctly both clean and at the attack's point, in
float32.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import surestep
from surestep import attacks, runs
from surestep.evaluation import suite

Make = Callable[[nn.Module, Tensor, Tensor, surestep.Linf], Tensor]
STEPS = 100


def ours(model: nn.Module, x: Tensor, y: Tensor, threat: surestep.Linf) -> Tensor:
    return attacks.pgd(model, x, y, threat, STEPS, threat.eps / 30, stop_when_wrong=True)


def foolbox_pgd(model: nn.Module, x: Tensor, y: Tensor, threat: surestep.Linf) -> Tensor:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=threat.eps / 30, steps=STEPS, random_start=True)
    _, found, _ = attack(wrapped, x, y, epsilons=threat.eps)
    return found


def art_pgd(model: nn.Module, x: Tensor, y: Tensor, threat: surestep.Linf) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), model(x[:1]).shape[1], clip_values=(0, 1)
    )
    attack = ProjectedGradientDescent(
        classifier,
        eps=threat.eps,
        eps_step=threat.eps / 30,
        max_iter=STEPS,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()).astype(np.float32))


def autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: surestep.Linf) -> Tensor:
    """Run the AutoAttack package itself, as its users do."""
    from pyautoattack import AutoAttack

    with torch.random.fork_rng():
        found, _ = AutoAttack(model, eps=threat.eps, seed=0).run_standard_evaluation(x, y)
    return found


PEERS: dict[str, Make] = {"surestep": ours, "foolbox": foolbox_pgd, "art": art_pgd}


def accuracy(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor) -> float:
    with torch.no_grad():
        right = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    return right.double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--autoattack", action="store_true", help="also AutoAttack and our suite")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/agreement.csv"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name in args.runs:
        run = runs.load(name, "cpu")
        model, threat = run.model, run.threat
        assert isinstance(threat, surestep.Linf)
        x, y = runs.load_data(run.config, "test").first(args.n).tensors()
        makers = dict(PEERS)
        if args.autoattack:
            makers["autoattack"] = autoattack
        for seed in range(args.seeds):
            for peer, make in makers.items():
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002 (ART draws from it)
                start = time.perf_counter()
                x_adv = make(model.eval(), x.clone(), y.clone(), threat)
                seconds = time.perf_counter() - start
                row = {"run": name, "method": run.config.method, "attack": peer, "seed": seed}
                row |= {"accuracy": accuracy(model.eval(), x, y, x_adv), "n": len(x)}
                row["eps_used"] = round((x_adv - x).abs().max().item(), 7)
                rows.append({**row, "seconds": round(seconds, 1)})
                print(rows[-1], flush=True)
            if args.autoattack:
                start = time.perf_counter()
                found = surestep.evaluate(
                    model, (x, y), threat, suite.BUDGETS["standard"], seed=seed, batch_size=250
                )
                row = {"run": name, "method": run.config.method, "attack": "surestep suite"}
                row |= {"seed": seed, "accuracy": found.worst_case_accuracy, "n": len(x)}
                rows.append({**row, "eps_used": "", "seconds": round(found.seconds, 1)})
                print(rows[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as f:
        writer = csv.DictWriter(f, [*rows[0], "torch", "date"])
        writer.writeheader()
        today = datetime.date.today().isoformat()
        writer.writerows({**row, "torch": torch.__version__, "date": today} for row in rows)


if __name__ == "__main__":
    main()
