"""What a run, an evaluation, an audit and a comparison may look like."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surestep
from surestep import report

THREAT = {"norm": "linf", "eps": 0.3, "bounds": [0.0, 1.0]}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    robust = {"fgsm": 0.93, "pgd-50": 0.88, "autoattack": 0.85}
    shares = {"clean": 0.98, **robust, "worst case": 0.85}
    return {
        "format": "surestep-evaluation",
        "version": 1,
        "clean_accuracy": 0.98,
        "robust_accuracy": robust,
        "worst_case_accuracy": 0.85,
        "n": 1000,
        "seed": 3,
        "seconds": 92.5,
        "attack_seconds": {"fgsm": 0.25, "pgd-50": 12.5, "autoattack": 77.25},
        "intervals": {k: [v - 0.02, min(1.0, v + 0.02)] for k, v in shares.items()},
        "threat": THREAT,
        "attacks": [
            {
                "name": name,
                "scope": "survivors" if name == "autoattack" else "all",
                "accuracy": share,
                "seconds": 1.0,
                "by_step": [0.98, 0.9, 0.88] if name == "pgd-50" else None,
            }
            for name, share in robust.items()
        ],
        "per_class": [
            {"label": k, "n": 100, "clean_accuracy": 0.98, "worst_case_accuracy": 0.9 - 0.01 * k}
            for k in range(10)
        ],
        "curve": [
            {
                "eps": eps,
                "clean_accuracy": 0.98,
                "robust_accuracy": {"fgsm": 0.98 - eps},
                "worst_case_accuracy": 0.98 - 2 * eps,
                "n": 1000,
            }
            for eps in (0.1, 0.2, 0.3)
        ],
        "command": "surestep evaluate runs/one --json result.json",
        "versions": {"surestep": "0.1.0", "torch": "2.13.0"},
    }


@pytest.fixture
def audit() -> dict[str, Any]:
    evidence: dict[int, dict[str, Any]] = {
        1: {"share": 0.125, "exact": True, "samples": [4, 8], "values": [0.5, 0.25]},
        10: {"eps": [0.1, 0.3, 1.0], "accuracy": [0.9, 0.4, 0.0]},
        11: {
            "steps": [1, 10, 50],
            "accuracy": [0.9, 0.2, 0.01],
            "restarts": [1, 5],
            "restart_accuracy": [0.05, 0.01],
        },
        18: {"step": [0.0, 0.5, 1.0], "loss": [0.1, 2.5, 0.4]},
    }
    names = {10: "eps-sweep", 11: "convergence", 18: "sat-properties"}
    status = {1: "flagged", 2: "skipped"}
    return {
        "format": "surestep-audit",
        "version": 1,
        "verdict": "pseudo-robust",
        "sentence": "It looks 95% robust, and a stronger attack leaves 1%.",
        "budget": "quick",
        "n": 500,
        "seed": 4,
        "seconds": 95.0,
        "threat": THREAT,
        "chance": 0.1,
        "clean_accuracy": 0.98,
        "claims": {"fgsm": 0.954, "pgd-10": 0.4},
        "found_accuracy": 0.012,
        "found_interval": [0.005, 0.027],
        "found_by": "pgd-50-margin",
        "attacks": {"fgsm": 0.954, "pgd-50-margin": 0.012},
        "escalation": [{"name": "bpda-pgd-50", "why": "zero gradients", "accuracy": 0.02}],
        "checks": [
            {
                "number": k,
                "name": names.get(k, f"check-{k}"),
                "title": f"Check number {k}",
                "status": status.get(k, "passed"),
                "value": None if k == 2 else k / 100,
                "threshold": f"more than {k}",
                "sentence": f"Sentence {k}.",
                "source": "Athalye et al. 2018",
                "evidence": evidence.get(k, {}),
            }
            for k in range(1, 21)
        ],
    }


@pytest.fixture
def history() -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "step": 390 * epoch,
            "lr": 0.1,
            "loss": math.nan if epoch == 3 else 2.0 / epoch,
            "ce": 1.5 / epoch,
            "adv_accuracy": 0.2 * epoch,
            "images_per_second": 2000.0,
            "train_seconds": 20.0 * epoch,
            "val_n": 1000,
            "val_clean": 0.9,
            "val_pgd-20x2": 0.5,
            "val_worst_case": 0.4,
            "val_seconds": 5.0,
        }
        for epoch in (1, 2, 3)
    ]


@pytest.fixture
def comparison() -> list[dict[str, Any]]:
    def seeds(mean: float, std: float = 0.01) -> dict[str, float]:
        return {"mean": mean, "std": std, "n": 3}

    return [
        {
            "method": "fgsm",
            "clean_accuracy": seeds(0.986),
            "fgsm": seeds(0.948),
            "pgd": seeds(0.004),
            "autoattack": None,
            "worst_case_accuracy": seeds(0.0),
            "verdict": "pseudo-robust",
            "passes": 5,
            "seconds": seeds(61, 1.5),
            "peak_memory_mb": None,
        },
        {
            "method": "sat-r2",
            "clean_accuracy": 0.978,
            "fgsm": 0.935,
            "pgd": 0.892,
            "autoattack": 0.87,
            "worst_case_accuracy": 0.868,
            "verdict": "robust",
            "passes": 10,
            "seconds": 98,
            "peak_memory_mb": None,
        },
    ]


@pytest.fixture
def images(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Twelve images; the labels are the net's own, but for every third."""
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    net.train()
    y[::3] = (y[::3] + 1) % 3
    return x, y


@pytest.fixture
def gathered(net: nn.Module, images: tuple[Tensor, Tensor]) -> dict[str, Any]:
    return report.gather(net, *images, surestep.Linf(0.3), samples=3, points=5, steps=3)


@pytest.fixture
def full(
    evaluation: dict[str, Any],
    audit: dict[str, Any],
    history: list[dict[str, Any]],
    comparison: list[dict[str, Any]],
    gathered: dict[str, Any],
) -> Callable[..., report.Report]:
    """Return a report that has everything, with changes by name."""

    def make(**changes: Any) -> report.Report:
        parts: dict[str, Any] = {
            "title": "sat-r2 on MNIST",
            "evaluation": evaluation,
            "audit": audit,
            "history": history,
            "comparison": comparison,
            **gathered,
            "config": {"method": "sat-r2", "seed": 7, "params": {"lam": 5.0}},
        }
        return report.Report(**{**parts, **changes})

    return make


@pytest.fixture(scope="session")
def made() -> dict[str, str]:
    return {}


@pytest.fixture
def full_html(request: pytest.FixtureRequest, made: dict[str, str]) -> str:
    """The page of the full report; made once, for that takes long."""
    if not made:
        made["full"] = request.getfixturevalue("full")().to_html()
    return made["full"]
