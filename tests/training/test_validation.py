from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surestep
from surestep import methods
from surestep.evaluation import Evaluation
from surestep.training import (
    validating,
)
from surestep.weights import load_weights


def evaluation(clean: float, robust: dict[str, float], worst: float) -> Evaluation:
    """Make what an evaluation of 100 images returns that found these accuracies."""
    shares = {"clean": clean, **robust, "worst case": worst}
    right = {name: torch.arange(100) < round(100 * share) for name, share in shares.items()}
    return Evaluation(clean, robust, worst, 100, 0, {}, 0.0, {}, {}, [], [], [], right)


def scripted(
    monkeypatch: pytest.MonkeyPatch, worst: list[float], fgsm: list[float] | None = None
) -> list[nn.Module]:
    """Let validation find these accuracies, epoch by epoch; return the models it was shown."""
    shown: list[nn.Module] = []

    def evaluate(model: nn.Module, *_: Any, **__: Any) -> Evaluation:
        k = len(shown)
        shown.append(copy.deepcopy(model))
        robust = {"fgsm": (fgsm or worst)[k], "pgd-2": worst[k]}
        return evaluation(0.9, robust, worst[k])

    monkeypatch.setattr(validating, "evaluate", evaluate)
    return shown


class TestValidation:
    @pytest.mark.parametrize("out", [False, True])
    @pytest.mark.parametrize(
        ("select", "worst", "kept"),
        [
            ("best", [0.3, 0.5, 0.4], 2),
            ("best", [0.5, 0.5, 0.5], 1),
            ("best", [0.0, 0.0, 0.1], 3),
            ("best", [0.0, 0.0, 0.0], 1),
            ("last", [0.3, 0.5, 0.4], 3),
        ],
    )
    def test_which_weights_are_kept(self, tiny, monkeypatch, tmp_path, select, worst, kept, out):
        shown = scripted(monkeypatch, worst)
        place = tmp_path / "run" if out else None
        result = tiny.train(select=select, epochs=3, out=place)
        assert result.best_epoch == kept
        assert tiny.same_weights(result.model, shown[kept - 1])
        if place:
            loaded = tiny.net()
            load_weights(place / "model.safetensors", loaded)
            assert tiny.same_weights(loaded, shown[kept - 1])

    def test_a_weak_attack_does_not_choose(self, tiny, monkeypatch):
        shown = scripted(monkeypatch, [0.5, 0.3, 0.1], fgsm=[0.6, 0.8, 0.9])
        result = tiny.train(select="best", epochs=3)
        assert result.best_epoch == 1
        assert tiny.same_weights(result.model, shown[0])

    @pytest.mark.parametrize("stop", [5, 9, 10, 14])
    def test_the_best_survives_a_stop(self, tiny, stopping, monkeypatch, tmp_path, stop):
        worst = [0.3, 0.5, 0.4]
        out = tmp_path / "run"
        shown = scripted(monkeypatch, worst)
        tiny.train(select="best", epochs=3)
        again = scripted(monkeypatch, worst)
        stopping(stop, lambda: tiny.train(select="best", epochs=3, out=out))
        assert len(again) == stop // 5
        result = tiny.train(select="best", epochs=3, out=out, resume=True)
        assert result.best_epoch == 2
        assert tiny.same_weights(result.model, shown[1])

    @pytest.mark.parametrize(
        ("worst", "fgsm", "warned"),
        [
            ([0.6, 0.7, 0.8], None, []),
            ([0.8, 0.61, 0.42], None, []),
            ([0.8, 0.8, 0.5], None, [3]),
            ([0.8, 0.3, 0.3], None, [2]),
            ([0.0, 0.0, 0.0], [0.95, 0.97, 0.98], [1, 2, 3]),
            ([0.3, 0.3, 0.3], [0.45, 0.45, 0.45], []),
            ([0.55, 0.55, 0.55], [0.9, 0.9, 0.9], []),  # apart by more than 20 points, not by half
            ([0.8, 0.16, 0.16], [0.85, 0.18, 0.18], [2]),  # FGSM falls, too: nothing is masked
        ],
    )
    def test_collapse(self, tiny, monkeypatch, capsys, worst, fgsm, warned):
        scripted(monkeypatch, worst, fgsm)
        result = tiny.train("fgsm", epochs=3, quiet=False)
        assert [row["epoch"] for row in result.history if row.get("collapse")] == warned
        said = capsys.readouterr().err
        what = "robust accuracy fell" if worst[0] else "gradient masking"
        assert said.count(f"warning: {what}") == said.count("warning: ") == len(warned)
        assert all(f"after epoch {epoch}" in said for epoch in warned)

    def test_collapse_is_seen_whatever_attacks_are_asked_for(self, tiny, monkeypatch, capsys):
        """Zero from the first epoch on: only FGSM tells it from what never was robust."""
        asked = []

        def evaluate(
            model: nn.Module, data: Any, threat: Any, attacks: Any, **_: Any
        ) -> Evaluation:
            asked.append(tuple(attacks))
            robust = {name: 0.95 if name == "fgsm" else 0.0 for name in attacks}
            return evaluation(0.98, robust, 0.0)

        monkeypatch.setattr(validating, "evaluate", evaluate)
        result = tiny.train("rs-fgsm", epochs=1, quiet=False, val_attacks=("pgd-2",))
        assert result.history[0]["collapse"] is True
        assert "accuracy under FGSM is 95.0%" in " ".join(capsys.readouterr().err.split())
        tiny.train("rs-fgsm", epochs=1, val_attacks=("pgd-2", "fgsm"))
        assert asked == [("fgsm", "pgd-2")] * 2

    def test_collapse_is_seen_across_a_resume(self, tiny, stopping, monkeypatch, tmp_path):
        scripted(monkeypatch, [0.8, 0.1])
        stopping(7, lambda: tiny.train(out=tmp_path / "run"))
        result = tiny.train(out=tmp_path / "run", resume=True)
        assert result.history[1]["collapse"]

    def test_a_real_collapse_is_noticed(self, tiny):
        # Its gradients point the wrong way: FGSM finds nothing, what asks for answers only does.
        class Masked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(64, 3)
                with torch.no_grad():  # each class's own rows
                    rows = torch.arange(64).div(8, rounding_mode="floor").remainder(3)
                    self.head.weight.copy_(rows == torch.arange(3)[:, None])

            def forward(self, x: Tensor) -> Tensor:
                flat = x.flatten(1)
                return self.head(2 * flat.detach() - flat)

        method = methods.Standard(surestep.Linf(0.6))
        attacks = ("fgsm", "square-500")
        run = {"epochs": 1, "lr": 1e-6, "val_attacks": attacks, "val_images": 20}
        (row,) = tiny.train(method, model=Masked(), **run).history
        assert row["val_fgsm"] == row["val_clean"] > 0.9
        assert row["val_worst_case"] < 0.3
        assert row["collapse"] is True

    def test_no_validation(self, tiny, monkeypatch):
        monkeypatch.setattr(validating, "evaluate", lambda *_, **__: pytest.fail("validated"))
        result = tiny.train(val_images=0, select="best")
        assert result.best_epoch == 2
        assert not [name for name in result.history[-1] if name.startswith("val")]

    def test_validation_does_not_change_training(self, tiny):
        one = tiny.train("sat-r2", validation=tiny.data(20))
        other = tiny.train("sat-r2", val_images=0)
        assert tiny.same_weights(one.model, other.model)
