"""An evaluation and an audit as their rooms write them."""

from __future__ import annotations

from typing import Any

import pytest

THREAT = {"norm": "linf", "eps": 8 / 255, "bounds": [0.0, 1.0]}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    return {
        "format": "surestep-evaluation",
        "version": 1,
        "clean_accuracy": 0.8236,
        "robust_accuracy": {"fgsm": 0.6, "pgd-100": 0.55, "autoattack": 0.5049},
        "doubts": [],
        "worst_case_accuracy": 0.5049,
        "n": 10_000,
        "seed": 0,
        "seconds": 12.3,
        "attack_seconds": {"fgsm": 0.1, "pgd-100": 2.0, "autoattack": 10.0},
        "intervals": {"clean": [0.81, 0.83], "fgsm": [0.59, 0.61], "worst case": [0.49, 0.51]},
        "threat": THREAT,
        "attacks": [
            {"name": "fgsm", "scope": "all", "accuracy": 0.6, "seconds": 0.1, "by_step": None},
            {
                "name": "pgd-100",
                "scope": "all",
                "accuracy": 0.55,
                "seconds": 2.0,
                "by_step": [0.8, 0.55],
            },
            {
                "name": "autoattack",
                "scope": "survivors",
                "accuracy": 0.5049,
                "seconds": 10.0,
                "by_step": None,
            },
        ],
        "per_class": [
            {"label": 0, "n": 98, "clean_accuracy": 0.9, "worst_case_accuracy": 0.6},
        ],
        "curve": [
            {
                "eps": 4 / 255,
                "clean_accuracy": 0.8236,
                "robust_accuracy": {"fgsm": 0.7},
                "worst_case_accuracy": 0.7,
                "n": 10_000,
            }
        ],
    }


@pytest.fixture
def audit() -> dict[str, Any]:
    return {
        "format": "surestep-audit",
        "version": 1,
        "verdict": "pseudo-robust",
        "sentence": "The model only looks robust.",
        "budget": "quick",
        "n": 1000,
        "seed": 0,
        "seconds": 95.0,
        "threat": THREAT,
        "chance": 0.1,
        "clean_accuracy": 0.98,
        "claims": {"fgsm": 0.98, "pgd-10": 0.4},
        "found_accuracy": 0.01,
        "found_interval": [0.005, 0.02],
        "found_by": "pgd-50-margin",
        "attacks": {"fgsm": 0.98, "pgd-50": 0.02},
        "escalation": [{"name": "bpda", "why": "zero gradients", "accuracy": 0.02}],
        "checks": [
            {
                "number": 10,
                "name": "eps-sweep",
                "title": "Accuracy falls with eps",
                "status": "skipped",
                "value": None,
                "threshold": "accuracy rises with eps",
                "sentence": "No image was right.",
                "source": "Carlini et al. 2019",
                "evidence": {"eps": [0.0, 0.1], "note": None, "by": {"name": [True, "x"]}},
            }
        ],
    }
