from __future__ import annotations

import copy
import json
import math
import random
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import surestep
from surestep import files, methods
from surestep.config import FitSettings
from surestep.errors import UserError
from surestep.methods._registry import METHODS
from surestep.training import (
    TrainingDiverged,
    TrainStep,
    _fit,
    checkpoint,
    display,
    picking,
    validating,
)
from surestep.training.run_folder import RunFolder
from surestep.training.schedules import learning_rate, momentum
from surestep.weights import load_weights


class TestARun:
    @pytest.mark.parametrize("method", methods.names())
    def test_every_method_trains(self, tiny, tmp_path, method):
        out = tmp_path / "deep" / "run"
        result = tiny.train(method, out=out)
        assert {p.name for p in out.iterdir()} == {
            "config.yaml",
            "environment.json",
            "metrics.jsonl",
            "model.safetensors",
            "checkpoints",
        }
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == result.history
        assert [row["epoch"] for row in result.history] == [1, 2]
        replays = tiny.method(method).replays
        assert [row["step"] for row in result.history] == [5 * replays, 10 * replays]
        for row in result.history:
            assert all(math.isfinite(v) for v in row.values())
            assert row["val_n"] == 6
            assert row["val_worst_case"] <= min(row["val_fgsm"], row["val_pgd-2"])
        kept = tiny.net()
        load_weights(out / "model.safetensors", kept)
        assert tiny.same_weights(kept, result.model)
        assert not any(m.training for m in result.model.modules())
        assert result.out == out
        assert result.best_epoch == 2
        assert result.train_seconds > 0

    def test_config_has_every_setting(self, tiny, tmp_path):
        method = tiny.method("sat-r3", tau=0.6)
        tiny.train(method, out=tmp_path / "run", ema=0.9, val_attacks=("fgsm",))
        config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert config.items() >= {"method": "sat-r3", "ema": 0.9, "val_attacks": ["fgsm"]}.items()
        assert config["params"] == method.params()
        assert set(FitSettings.model_fields) <= config.keys()

    def test_config_is_what_describe_says(self, tiny, tmp_path):
        describe = {"method": "standard", "params": {}, "dataset": "mnist", "eps": 0.1}
        tiny.train(out=tmp_path / "run", describe=describe)
        config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert config.items() >= describe.items()

    def test_nothing_is_written_without_out(self, tiny, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = tiny.train()
        assert result.out is None
        assert not list(tmp_path.iterdir())
        assert not result.model.training

    def test_out_does_not_change_the_result(self, tiny, tmp_path):
        one, other = tiny.train("sat-r2"), tiny.train("sat-r2", out=tmp_path / "run")
        assert tiny.same_weights(one.model, other.model)

    @pytest.mark.parametrize("engine", ["reference", "fast"])
    def test_the_same_seed_gives_the_same_weights_and_another_does_not(self, tiny, engine):
        one, again, other = (
            tiny.train("sat-r2", seed=seed, engine=engine).model for seed in (1, 1, 2)
        )
        assert tiny.same_weights(one, again)
        assert not tiny.same_weights(one, other)

    def test_it_learns(self, tiny):
        result = tiny.train("standard", epochs=8, val_images=0)
        assert result.history[-1]["loss"] < result.history[0]["loss"] / 2

    def test_a_batch_larger_than_the_data(self, tiny):
        assert tiny.train(batch_size=1000).history[-1]["step"] == 2

    def test_only_the_last_two_checkpoints_are_kept(self, tiny, tmp_path):
        tiny.train(out=tmp_path / "run", epochs=3, checkpoint_every=1)
        kept = checkpoint.found(tmp_path / "run" / "checkpoints")
        assert [p.name for p in kept] == ["step-00000014.safetensors", "step-00000015.safetensors"]
        assert set(kept) == set((tmp_path / "run" / "checkpoints").iterdir())

    def test_the_average_is_what_is_judged_and_kept(self, tiny, monkeypatch):
        judged = []
        evaluate = validating.evaluate
        monkeypatch.setattr(
            validating,
            "evaluate",
            lambda model, *args, **kwargs: (
                judged.append(copy.deepcopy(model)) or evaluate(model, *args, **kwargs)
            ),
        )
        plain, averaged = tiny.train(), tiny.train(ema=0.9)
        assert len(judged) == 4
        assert tiny.same_weights(judged[1], plain.model)
        assert tiny.same_weights(judged[3], averaged.model)
        assert not tiny.same_weights(plain.model, averaged.model)

    def test_the_rate_follows_the_schedule(self, tiny):
        history = tiny.train(epochs=4, schedule="step", lr=0.1).history
        # The last step of epochs 1 to 4; each quarter of training is one epoch.
        assert [row["lr"] for row in history] == pytest.approx([0.1, 0.02, 0.004, 0.0008])

    def test_the_rate_warms_up_over_its_epochs(self, tiny):
        history = tiny.train(epochs=4, schedule="step", lr=0.1, warmup=2.5).history
        # The share of the warm-up that each epoch's last step has reached, times the schedule.
        assert [row["lr"] for row in history] == pytest.approx(
            [0.1 / 2.5, 0.02 * 2 / 2.5, 0.004, 0.0008]
        )

    def test_the_rates_reach_the_optimizer(self, tiny, monkeypatch):
        seen, take = [], TrainStep.__call__

        def step(self, *batch):
            seen.append(self.optimizer.param_groups[0]["lr"])
            assert self.optimizer.param_groups[0]["momentum"] == momenta[len(seen) - 1]
            return take(self, *batch)

        momenta = [momentum("onecycle", 0.9, k / 10) for k in range(10)]
        monkeypatch.setattr(TrainStep, "__call__", step)
        tiny.train(schedule="onecycle", lr=0.1, warmup=0.6)
        expected = [learning_rate("onecycle", 0.1, k / 10) * min(1, (k + 1) / 3) for k in range(10)]
        assert seen == pytest.approx(expected)
        assert len({round(lr, 9) for lr in expected}) > 7
        assert len(set(momenta)) > 5

    @pytest.mark.parametrize("replays", [1, 2])
    def test_the_course_that_methods_follow(self, tiny, replays):
        seen = []

        class Noting(methods.Standard):
            def craft(self, model: nn.Module, x: Tensor, *rest: Any) -> Any:
                seen.append(self.progress)
                return super().craft(model, x, *rest)

        Noting.replays = replays
        history = tiny.train(Noting(tiny.threat), epochs=2.4, schedule="step", lr=0.1).history
        steps = 5 * replays
        assert len(seen) == round(2.4 * steps)
        for k, at in enumerate(seen):
            assert (at.step, at.steps_per_epoch, at.images) == (k, steps, 58)
            assert at.epoch == k // steps
            assert at.epochs == pytest.approx(2.4)
            assert at.done == pytest.approx(k / len(seen))
        assert [at.lr for at in seen][steps - 1 :: steps] == pytest.approx(
            [row["lr"] for row in history[:2]]
        )

    def test_the_crops_and_flips_that_memory_is_told(self, tiny, stopping, tmp_path, monkeypatch):
        x, y = tiny.data()
        looked = []

        class Noting(methods.Standard):
            needs_index = True

            def craft(self, model: nn.Module, seen: Tensor, y: Tensor) -> Any:
                at = self.positions
                assert torch.equal(seen, at.draw.apply(x[at.index]))
                looked.append(seen)
                return super().craft(model, seen, y)

        monkeypatch.setitem(METHODS, Noting.slug, Noting)

        def train(**place: Any) -> Any:
            settings = {"augment": "crop-flip", "checkpoint_every": 1, "val_images": 0}
            return tiny.train(Noting(tiny.threat), data=(x, y), **settings, **place)

        train()
        assert len(looked) == 12
        assert not torch.equal(looked[0], looked[6])
        stopping(8, lambda: train(out=tmp_path / "run"))
        train(out=tmp_path / "run", resume=True)

    def test_a_model_given_in_eval_mode_is_trained_all_the_same(self, tiny):
        one = tiny.train(model=tiny.net().train(), epochs=1).model
        other = tiny.train(model=tiny.net().eval(), epochs=1).model
        assert tiny.same_weights(one, other)
        before = one[1].running_mean.clone()
        tiny.train(model=one, epochs=1)
        assert not torch.equal(one[1].running_mean, before)

    def test_eps_and_step_sizes_warm_up_but_validation_does_not(self, tiny, monkeypatch):
        method = methods.build("sat-r3", tiny.threat, {"alpha": 0.02, "eps_low": 0.04})
        seen, judged = [], []
        step, evaluate = methods.SATR3.craft, validating.evaluate

        def watched(self, *args):
            seen.append((self.threat.eps, self.alpha, self.eps_low))
            return step(self, *args)

        def judge(model, data, threat, *args, **kwargs):
            judged.append(threat.eps)
            return evaluate(model, data, threat, *args, **kwargs)

        monkeypatch.setattr(methods.SATR3, "craft", watched)
        monkeypatch.setattr(validating, "evaluate", judge)
        tiny.train(method, epochs=2, eps_warmup=1.6)  # 8 of 10 steps
        shares = [k / 8 for k in range(1, 8)] + [1.0] * 3
        for (eps, alpha, low), share in zip(seen, shares, strict=True):
            assert (eps, alpha, low) == pytest.approx((0.1 * share, 0.02 * share, 0.04 * share))
        assert seen[-1] == (0.1, 0.02, 0.04)
        assert judged == [0.1, 0.1]
        assert (method.threat.eps, method.alpha) == (0.1, 0.02)

    @pytest.mark.parametrize(("epochs", "steps"), [(0.4, [2]), (1.5, [5, 8]), (2.0, [5, 10])])
    def test_the_last_epoch_may_be_a_part(self, tiny, epochs, steps):
        history = tiny.train("fgsm", epochs=epochs, schedule="onecycle", lr=1.0).history
        assert [row["step"] for row in history] == steps
        # Whatever its length, the learning rate has come down at the end.
        assert history[-1]["lr"] < 0.4 or steps == [2]

    def test_less_than_a_step_is_refused(self, tiny):
        with pytest.raises(UserError, match=r"0\.01 epochs of 5 steps"):
            tiny.train("fgsm", epochs=0.01)

    def test_a_term_that_few_steps_have_is_not_thinned(self, tiny, monkeypatch):
        terms = []
        take = methods.SATR1.take

        def watched(self, *args):
            result = take(self, *args)
            terms.append(result.terms.get("distance"))
            return result

        monkeypatch.setattr(methods.SATR1, "take", watched)
        (row,) = tiny.train(methods.SATR1(tiny.threat, every=2, steps=2), epochs=1).history
        known = [float(t) for t in terms if t is not None]
        assert len(known) == 2
        assert row["distance"] == pytest.approx(sum(known) / 2)

    def test_an_average_of_a_model_with_a_part_called_module(self, tiny):
        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = tiny.net()
                self.register_buffer("mean", torch.full((1,), 0.4))

            def forward(self, x: Tensor) -> Tensor:
                return self.module(x - self.mean)

        result = tiny.train(model=Outer(), ema=0.9)
        assert "module.0.weight" in result.model.state_dict()

    def test_label_smoothing_reaches_the_method_inside(self, tiny, monkeypatch):
        seen = []
        craft = methods.get("rs-fgsm").craft

        def watched(self, *args):
            seen.append(self.label_smoothing)
            return craft(self, *args)

        monkeypatch.setattr(methods.get("rs-fgsm"), "craft", watched)
        tiny.train("converge-smooth", label_smoothing=0.3, epochs=0.4)
        assert seen == [0.3, 0.3]

    def test_validation_attacks_as_many_images_as_a_step_has(self, tiny, sizes):
        """Where there is no room for more."""
        tiny.train(epochs=1)
        tiny.train(epochs=1, batch_size=4)
        tiny.train(epochs=1, batch_size=1000)
        assert sizes == [10, 4, 500]

    def test_tensorboard(self, tiny, tmp_path):
        tiny.train(out=tmp_path / "run", tensorboard=True)
        (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
        assert b"val_worst_case" in events.read_bytes()
        assert (tmp_path / "run" / "metrics.jsonl").exists()


class NotANumber(nn.Module):
    """Return NaN, or only send NaN back as gradient, at the k-th step."""

    def __init__(self, net: nn.Module, k: int, backward: bool) -> None:
        super().__init__()
        self.net, self.k, self.backward_only, self.steps = net, k, backward, 0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        if self.training:
            self.steps += 1
            if self.steps == self.k and self.backward_only:
                logits.register_hook(lambda grad: grad * math.nan)
            elif self.steps >= self.k:
                return logits * math.nan
        return logits


class TestDivergence:
    @pytest.mark.parametrize(("step", "good"), [(1, None), (4, 2), (5, 4), (6, 5), (10, 8)])
    def test_it_is_named_and_the_last_good_checkpoint_kept(self, tiny, tmp_path, step, good):
        out = tmp_path / "run"
        model = NotANumber(tiny.net(), step, backward=False)
        with pytest.raises(TrainingDiverged) as caught:
            tiny.train(model=model, out=out, checkpoint_every=2)
        message = str(caught.value)
        assert f"at step {step} (epoch {(step + 4) // 5})" in message
        assert "lower lr (0.05)" in message
        kept = checkpoint.found(out / "checkpoints")
        if good is None:
            assert "no checkpoint was written yet" in message
            assert not kept
            return
        assert kept[-1].name == f"step-{good:08d}.safetensors"
        assert str(kept[-1]) in message
        self.is_good(files.load_tree(kept[-1]))

    def is_good(self, state: dict[str, Any]) -> None:
        tensors = [*state["model"].values()]
        tensors += [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
        assert all(torch.isfinite(t).all() for t in tensors)

    @pytest.mark.parametrize("step", [4, 5, 10])
    def test_a_gradient_that_is_not_finite(self, tiny, tmp_path, step):
        out = tmp_path / "run"
        model = NotANumber(tiny.net(), step, backward=True)
        with pytest.raises(TrainingDiverged):
            tiny.train(model=model, out=out, checkpoint_every=2)
        self.is_good(files.load_tree(checkpoint.found(out / "checkpoints")[-1]))

    @pytest.mark.parametrize("step", [3, 7])
    def test_the_first_bad_step_is_named(self, tiny, step):
        """The loss stays NaN to the end of the epoch, where it is looked for."""
        with pytest.raises(TrainingDiverged, match=rf"at step {step} \("):
            tiny.train(model=NotANumber(tiny.net(), step, backward=False), quiet=True)

    def test_without_a_folder(self, tiny):
        with pytest.raises(UserError, match=r"at step 7 \(epoch 2\); no checkpoint"):
            tiny.train(model=NotANumber(tiny.net(), 7, backward=False))

    def test_a_rate_far_too_high(self, tiny):
        with pytest.raises(TrainingDiverged, match="lower lr"):
            tiny.train(lr=1e30, epochs=5, schedule="constant")


class TestSettings:
    def test_dropout_without_a_place_is_told_at_once(self, tiny, tmp_path):
        tiny.train(out=tmp_path / "run")
        before = tiny.snapshot(tmp_path)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        with pytest.raises(UserError, match="acts after activation modules, but"):
            tiny.train("sads", model=net, out=tmp_path / "run", overwrite=True)
        assert tiny.snapshot(tmp_path) == before

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"epoch": 3}, "unknown setting 'epoch': did you mean 'epochs'"),
            ({"learning_rate": 3}, "unknown setting 'learning_rate'"),
            ({"epochs": 0}, "epochs 0 is invalid"),
            ({"schedule": "stp"}, "schedule 'stp' is invalid"),
            ({"device": "gpu"}, "gpu"),
            ({"device": "cuda:99"}, "cuda:99"),
            ({"tensorboard": True}, "tensorboard=True needs a run folder"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(self, tiny, settings, said):
        with pytest.raises(UserError, match=said) as caught:
            tiny.train(**settings)
        assert "\n" not in str(caught.value)

    def test_tensorboard_that_is_not_installed(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        with pytest.raises(UserError, match=r"pip install 'surestep\[tensorboard\]'"):
            tiny.train(out=tmp_path / "run", tensorboard=True)
        assert not list(tmp_path.iterdir())

    def test_the_method_is_left_as_it_was(self, tiny):
        method = tiny.method("standard")
        tiny.train(method, label_smoothing=0.2)
        assert method.label_smoothing == 0.0

    def test_config_has_the_smoothing_that_was_used(self, tiny, tmp_path):
        method = methods.Standard(tiny.threat, label_smoothing=0.2)
        tiny.train(method, out=tmp_path / "run")
        config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert config["label_smoothing"] == 0.2

    def test_config_has_the_threat_model(self, tiny, tmp_path):
        tiny.train("fgsm", out=tmp_path / "run")
        config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert config.items() >= {"norm": "linf", "eps": 0.1}.items()

    def test_numbers_of_numpy_are_numbers(self, tiny, tmp_path):
        threat = surestep.Linf(np.float64(0.1))
        tiny.train(tiny.method("sat-r2", threat, lam=np.float64(2)), out=tmp_path / "run")
        config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert (config["eps"], config["params"]["lam"]) == (0.1, 2.0)

    def test_a_frozen_model_is_refused(self, tiny):
        with pytest.raises(UserError, match="parameters"):
            tiny.train(model=tiny.net().requires_grad_(False))

    def test_quiet_is_quiet(self, tiny, capfd):
        tiny.train()
        assert capfd.readouterr() == ("", "")

    def test_progress_has_a_line_an_epoch(self, tiny, capsys):
        tiny.train(quiet=False)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert all(word in lines[1] for word in ("epoch 2/2", "loss", "clean", "robust", "img/s"))


def test_a_launchers_precision_is_not_followed(tiny, monkeypatch):
    """`accelerate launch` exports its configuration, which would change the model itself."""
    asked = []

    class Noting(_fit.Accelerator):
        def __init__(self, **options: Any) -> None:
            asked.append(options)
            super().__init__(**options)

    monkeypatch.setattr(_fit, "Accelerator", Noting)
    monkeypatch.setattr(_fit.AcceleratorState, "_shared_state", {})
    tiny.train(epochs=0.4)
    tiny.train(epochs=0.4)  # now there is one, which may be the user's
    alone = {"cpu": False}
    (waits,) = asked[0].pop("kwargs_handlers")
    assert waits.timeout.total_seconds() > 3600, "one may evaluate in on_epoch for long"
    assert asked == [{"mixed_precision": "no", "dynamo_backend": "no", **alone}, alone]


def test_an_accelerator_of_the_users_changes_nothing(tiny, monkeypatch):
    monkeypatch.setattr(_fit.AcceleratorState, "_shared_state", {})
    _fit.Accelerator(cpu=True, mixed_precision="bf16")
    net, dtypes = tiny.net(), set()
    net[0].register_forward_hook(lambda _m, _a, out: dtypes.add(out.dtype))
    tiny.train(model=net, epochs=0.4)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("AcceleratorState has already been initialized"),
            r"has an Accelerator with other settings .*: train in a new",
        ),
        (NotImplementedError("Please set\nNCCL_P2P_DISABLE"), "^Please set NCCL_P2P_DISABLE$"),
    ],
    ids=["another device in the same process", "GPUs that reach each other only over the host"],
)
def test_where_accelerate_cannot_begin(tiny, monkeypatch, error, said):
    def refuse(**_: Any) -> Any:
        raise error

    monkeypatch.setattr(_fit, "Accelerator", refuse)
    with pytest.raises(UserError, match=said):
        tiny.train()


def test_a_log_has_a_line_a_minute(tiny, monkeypatch, capsys):
    """A run without a terminal, whose epochs take hours, must not look as if it hung."""
    monkeypatch.setattr(display, "_SECONDS_UNSEEN", 0.0)
    tiny.train(epochs=1, quiet=False)
    quiet_minute = capsys.readouterr().err
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    tiny.train(epochs=1, quiet=False)
    lines = capsys.readouterr().err.splitlines()
    assert "step 3/5" not in quiet_minute
    assert [line for line in lines if line.startswith("epoch 1/1  step 3/5  loss ")]
    tiny.train(epochs=1, quiet=True)
    assert not capsys.readouterr().err


def test_what_is_no_method(tiny):
    with pytest.raises(UserError, match=r"'sat-r2' is not a method: give one such as"):
        surestep.fit(tiny.net(), tiny.data(), "sat-r2")  # type: ignore[arg-type]


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_logger_is_called_after_each_epoch(tiny, tmp_path, ema):
    seen: list[dict[str, Any]] = []

    def note(row: dict[str, Any], model: nn.Module) -> None:
        assert len(tiny.rows(tmp_path / "run")) == row["epoch"]
        with torch.no_grad():
            seen.append({"weights": model[0].weight.clone(), **row})
        row.clear()

    result = tiny.train("fgsm", out=tmp_path / "run", ema=ema, on_epoch=note)
    assert [row["epoch"] for row in seen] == [1, 2]
    assert [row["loss"] for row in seen] == [row["loss"] for row in result.history]
    assert torch.equal(seen[-1]["weights"], result.model[0].weight)
    assert not torch.equal(seen[0]["weights"], seen[1]["weights"])


@pytest.mark.parametrize("select", ["best", "last"])
def test_on_epoch_can_end_the_training(tiny, tmp_path, select):
    seen: list[nn.Module] = []

    def end(row: dict[str, Any], model: nn.Module) -> Any:
        seen.append(copy.deepcopy(model))
        return "a logger's" if row["epoch"] == 1 else np.bool_(row["epoch"] == 2)

    def train(**place: Any) -> Any:
        return tiny.train("fgsm", epochs=4, select=select, on_epoch=end, **place)

    out = tmp_path / "run"
    results = [train(out=out), train(), train(out=out, resume=True)]
    shutil.rmtree(out / "checkpoints")
    results.append(train(out=out, resume=True))
    assert len(seen) == 4, "a resume must train no further"
    for result in results:
        assert [row.get("stopped") for row in result.history] == [None, True]
        assert tiny.same_weights(result.model, seen[result.best_epoch - 1])
        assert not result.model.training
    assert [row.get("stopped") for row in tiny.rows(out)] == [None, True]
    assert RunFolder(out).ended(4)


@pytest.mark.parametrize(
    ("method", "epochs", "lengths"),
    [
        ("fgsm", 1.1, [3]),  # 3.3 steps
        ("fgsm", 1.2, [3, 4]),
        ("fgsm", 2, [3, 6]),
        ("fgsm", 0.4, [1]),
        ("free", 1.1, [6, 7]),  # two replays
    ],
)
def test_a_run_ends_with_its_last_whole_step(tiny, tmp_path, capsys, method, epochs, lengths):
    out = tmp_path / "run"

    def train(**place: Any) -> Any:
        return tiny.train(method, batch_size=19, epochs=epochs, out=out, quiet=False, **place)

    train()
    assert [row["step"] for row in tiny.rows(out)] == lengths
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == [f"{n}/{len(lengths)}" for n in range(1, len(lengths) + 1)]
    run = RunFolder(out)
    assert run.ended(epochs)
    shutil.rmtree(run.checkpoints)
    assert len(train(resume=True).history) == len(lengths)
    run.metrics.write_text("".join(run.metrics.read_text().splitlines(keepends=True)[:-1]))
    assert not run.ended(epochs)


def test_a_logger_changes_nothing_of_what_follows(tiny, tmp_path):
    """One that shows random images, and sets the model to eval mode as it is used to."""

    def look(row: dict[str, Any], model: nn.Module) -> None:
        assert not model.training
        model.eval()
        model(torch.rand(3, 1, 8, 8))
        random.random()
        np.random.rand()  # noqa: NPY002

    one = tiny.train("sat-r2", epochs=3)
    other = tiny.train("sat-r2", epochs=3, on_epoch=look)
    assert tiny.same_weights(one.model, other.model)


def test_a_model_that_cannot_be_copied(tiny):
    """As torch's old weight_norm leaves it: no trial of engines, and no average."""
    net = tiny.net()
    net.kept = net(torch.rand(2, 1, 8, 8))
    assert picking.pick_engine(net, tiny.method("fgsm"), torch.Size([1, 8, 8]), 4) is None
    tiny.train("fgsm", model=net, engine="auto", epochs=20)
    with pytest.raises(UserError, match=r"it cannot be copied .*: leave ema and swa out"):
        tiny.train("fgsm", model=net, ema=0.9)


def test_layers_that_the_user_put_in_eval_mode_stay_there(tiny):
    """As in fine-tuning; of a model in eval mode as a whole, which was loaded, nothing does."""
    frozen, whole = tiny.net().train(), tiny.net().eval()
    frozen[1].eval()
    before = frozen[1].running_mean.clone()
    tiny.train("sat-r2", model=frozen, epochs=0.4, val_images=0)
    tiny.train("sat-r2", model=whole, epochs=0.4, val_images=0)
    assert torch.equal(frozen[1].running_mean, before)
    assert not torch.equal(whole[1].running_mean, before)


def test_a_wrapped_model_is_refused(tiny):
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    for model in (Wrapped(tiny.net()), torch.compile(Wrapped(tiny.net()), backend="eager")):
        with pytest.raises(UserError, match=r"DistributedDataParallel: give the module inside"):
            tiny.train(model=model)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("FSDP", "wrapped in FullyShardedDataParallel: give the module before it is wrapped"),
        ("sharded", "the model's 0.bias is a DTensor, as after fully_shard: give the model before"),
        ("meta", r"the model's 0.weight is on the meta device, .*: call model.to_empty\(device="),
    ],
)
def test_a_model_whose_weights_are_not_here_is_refused(tiny, kind, said):
    class FullyShardedDataParallel(nn.Sequential):
        pass

    class DTensor(Tensor):
        pass

    net = tiny.net()
    if kind == "FSDP":
        net = nn.Sequential(FullyShardedDataParallel(net))
    elif kind == "sharded":
        net[0].bias = nn.Parameter(net[0].bias.detach().as_subclass(DTensor))
    else:
        net.to("meta")
    with pytest.raises(UserError, match=said):
        tiny.train(model=net)


def test_frees_step_is_of_the_radius_that_its_batch_had(tiny, tmp_path):
    """A checkpoint takes it before the radius grows, a run without one after that."""
    settings = {"eps_warmup": 1.5, "val_images": 0}
    plain = tiny.train("free", **settings)
    kept = tiny.train("free", out=tmp_path / "run", checkpoint_every=1, **settings)
    assert tiny.same_weights(plain.model, kept.model)


@pytest.mark.parametrize("term", ["loss", "lr", "val_clean"])
def test_terms_do_not_take_the_names_of_the_log(tiny, term):
    class Named(methods.Standard):
        def plain_loss(self, y):
            return lambda logits: (logits.sum(), {term: logits.sum()})

    with pytest.raises(UserError, match=f"the term '{term}' has a name that training logs"):
        tiny.train(Named(tiny.threat))
