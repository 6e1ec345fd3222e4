from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import remembering
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

import surestep
from surestep import data, files, methods, processes
from surestep.config import FitSettings
from surestep.errors import UserError
from surestep.evaluation import Evaluation
from surestep.methods._base import METHODS
from surestep.training import (
    TrainingDiverged,
    TrainStep,
    _fit,
    checkpoint,
    display,
    loop,
    picking,
    preparing,
    validating,
)
from surestep.training.loaders import first_item_as_batch
from surestep.training.run_folder import RunFolder
from surestep.training.schedules import learning_rate, momentum
from surestep.training.source import make_source
from surestep.weights import load_weights

EVERY = 2
STOPS = {"mid-epoch": 4, "boundary": 5, "mid-epoch 2": 9}
"""Steps done before the crash. With 5 steps an epoch and a checkpoint every second step the
newest checkpoint is at 4 (in epoch 1), 5 (between the epochs) and 8 (in epoch 2)."""


class Misspelt(nn.Linear):
    """A model whose forward names a layer that it has not."""

    def __init__(self):
        super().__init__(64, 4)

    def forward(self, x):
        return self.fc3(x.flatten(1))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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

            def craft(self, model: nn.Module, seen: Tensor, y: Tensor, index: Tensor | None) -> Any:
                assert index is not None
                assert torch.equal(seen, self.draw.apply(x[index]))
                looked.append(seen)
                return super().craft(model, seen, y, index)

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

    def test_validation_attacks_as_many_images_as_a_step_has(self, tiny, monkeypatch):
        """Where there is no room for more."""
        sizes, evaluate = [], validating.evaluate

        def judge(*args, batch_size, **kwargs):
            sizes.append(batch_size)
            return evaluate(*args, batch_size=batch_size, **kwargs)

        monkeypatch.setattr(validating, "evaluate", judge)
        monkeypatch.setattr(preparing, "ROOM_TO_JUDGE", 0)
        tiny.train(epochs=1)
        tiny.train(epochs=1, batch_size=4)
        tiny.train(epochs=1, batch_size=1000)
        assert sizes == [10, 4, 500]

    def test_tensorboard(self, tiny, tmp_path):
        tiny.train(out=tmp_path / "run", tensorboard=True)
        (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
        assert b"val_worst_case" in events.read_bytes()
        assert (tmp_path / "run" / "metrics.jsonl").exists()


RESUMED = {
    "ema": {"ema": 0.9},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "crop-flip": {"augment": "crop-flip"},
    "bf16": {"engine": "fast", "precision": "bf16"},
    "channels-last": {"engine": "fast", "precision": "fp32", "ema": 0.9},
    "clip and smooth": {"clip_grad": 0.5, "label_smoothing": 0.1},
    "step": {"schedule": "step", "warmup": 1.5},
    "triangular": {"schedule": "triangular"},
    "eps warm-up": {"eps_warmup": 1.5},
    "no validation": {"val_images": 0},
    "a part of an epoch": {"epochs": 2.4},
    "swa": {"swa": 0.3},
    "awp": {"awp": 0.02},
    "awp after an epoch and a half": {"awp": 0.02, "awp_from": 1.4},
    "fp16": {"engine": "fast", "precision": "fp16"},
    "dropout": {"dropout": 0.4},
    "best": {"select": "best", "epochs": 3},
}


TELLING = "mid-epoch 2"
"""The stop for what keeps nothing of its own: there are rows, sums, and a step to take again."""
EVERYWHERE = {
    *("ema", "swa", "awp after an epoch and a half", "eps warm-up", "fp16", "a part of an epoch"),
    "best",
}
"""The settings whose state depends on where in the run it is."""


class TestResume:
    def check(
        self, tiny: Any, stopping: Any, whole: Path, out: Path, after: int, train: Any
    ) -> None:
        stopping(after, lambda: train(out=out))
        assert not (out / "metrics.jsonl").exists() or len(tiny.rows(out)) < len(tiny.rows(whole))
        result = train(out=out, resume=True)
        assert tiny.weights(out) == tiny.weights(whole)
        assert tiny.rows(out) == tiny.rows(whole)
        assert [tiny.without_times(row) for row in result.history] == tiny.rows(whole)
        # The selected weights could agree by chance: everything else must, too.
        assert tiny.equal(tiny.state_of(out), tiny.state_of(whole))

    @pytest.mark.parametrize(
        ("method", "stop"),
        [
            (slug, stop)
            for slug in methods.names()
            for stop in (STOPS if slug in remembering() else [TELLING])
        ],
    )
    def test_every_method(self, tiny, stopping, whole, tmp_path, method, stop):
        def train(**place: Any) -> Any:
            return tiny.train(method, checkpoint_every=EVERY, **place)

        self.check(tiny, stopping, whole(method, train), tmp_path / "run", STOPS[stop], train)

    def test_a_run_begun_before_its_method_had_a_parameter(self, tiny, stopping, whole, tmp_path):
        def train(**place: Any) -> Any:
            out = tmp_path / "run"
            if "resume" in place:
                begun = yaml.safe_load((out / "config.yaml").read_text("utf-8"))
                del begun["params"]["every"]
                (out / "config.yaml").write_text(yaml.safe_dump(begun))
            return tiny.train("sat-r2", checkpoint_every=EVERY, **place)

        stop = STOPS[next(iter(STOPS))]
        self.check(tiny, stopping, whole("sat-r2", train), tmp_path / "run", stop, train)
        method = methods.SATR2(tiny.threat, lam=3.0, alpha=0.03)
        with pytest.raises(UserError, match=r"with params .*'lam': 3.0.* begun with .*'lam': 5.0"):
            tiny.train(method, checkpoint_every=EVERY, out=tmp_path / "run", resume=True)

    @pytest.mark.parametrize(
        ("setting", "stop"),
        [
            (setting, stop)
            for setting in RESUMED
            for stop in (STOPS if setting in EVERYWHERE else [TELLING])
        ],
    )
    def test_every_setting(self, tiny, stopping, whole, tmp_path, setting, stop):
        def train(**place: Any) -> Any:
            return tiny.train("sat-r2", checkpoint_every=EVERY, **RESUMED[setting], **place)

        self.check(tiny, stopping, whole(setting, train), tmp_path / "run", STOPS[stop], train)

    @pytest.mark.parametrize(
        "kind",
        [
            "Dataset",
            "DataLoader",
            "DataLoader with its own generator",
        ],
    )
    def test_at_the_end_of_an_epoch_of_a_loader(self, tiny, stopping, whole, tmp_path, kind):
        def train(**place: Any) -> Any:
            pairs = TensorDataset(*tiny.data())
            own = torch.Generator().manual_seed(3) if "own" in kind else None
            loader = DataLoader(pairs, 10, shuffle=True, generator=own)
            source = pairs if kind == "Dataset" else loader
            return tiny.train("sat-r2", data=source, validation=tiny.data(), **place)

        # 64 images: 6 steps by Dataset (the last, incomplete one dropped), 7 by DataLoader.
        self.check(tiny, stopping, whole(kind, train), tmp_path / "run", 9, train)

    def test_a_model_that_draws_random_numbers(self, tiny, stopping, whole, tmp_path):
        class Noisy(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x + 0.1 * torch.randn_like(x))

        def train(**place: Any) -> Any:
            return tiny.train(model=Noisy(*tiny.net()), checkpoint_every=EVERY, **place)

        self.check(tiny, stopping, whole("noisy", train), tmp_path / "run", 4, train)

    def test_stopped_again_and_again(self, tiny, stopping, whole, tmp_path):
        def train(**place: Any) -> Any:
            return tiny.train("sat-r3", checkpoint_every=EVERY, ema=0.9, **place)

        out = tmp_path / "run"
        stopping(3, lambda: train(out=out))
        for after in (1, 2, 3, 2):  # steps of each attempt; the first gets nowhere
            stopping(after, lambda: train(out=out, resume=True))
        self.resumes_to(tiny, whole("again", train), out, train)

    def resumes_to(self, tiny: Any, whole: Path, out: Path, train: Any) -> None:
        train(out=out, resume=True)
        assert tiny.weights(out) == tiny.weights(whole)
        assert tiny.rows(out) == tiny.rows(whole)
        assert tiny.equal(tiny.state_of(out), tiny.state_of(whole))

    def test_the_checkpoint_does_not_stay_in_memory(self, tiny, stopping, monkeypatch, tmp_path):
        stopping(4, lambda: tiny.train(checkpoint_every=EVERY, out=tmp_path / "run"))
        load, loaded, alive = checkpoint.load_newest, [], []

        def loading(*args: Any) -> Any:
            state = load(*args)
            loaded.extend(weakref.ref(value) for value in state["model"].values())
            return state

        def step(self: TrainStep, *batch: Any) -> Any:
            alive.extend(one for one in loaded if one() is not None)
            return take(self, *batch)

        take = TrainStep.__call__
        monkeypatch.setattr(checkpoint, "load_newest", loading)
        monkeypatch.setattr(TrainStep, "__call__", step)
        tiny.train(checkpoint_every=EVERY, out=tmp_path / "run", resume=True)
        assert loaded
        assert not alive

    def test_before_the_first_checkpoint(self, tiny, stopping, whole, tmp_path):
        def train(**place: Any) -> Any:
            return tiny.train("sat-r2", checkpoint_every=EVERY, **place)

        stopping(1, lambda: train(out=tmp_path / "run"))
        self.resumes_to(tiny, whole("sat-r2", train), tmp_path / "run", train)

    def test_without_its_checkpoints_a_run_is_not_begun_again(self, tiny, stopping, tmp_path):
        out = tmp_path / "run"
        stopping(11, lambda: tiny.train(out=out, epochs=3))
        shutil.rmtree(out / "checkpoints")
        before = snapshot(out)
        with pytest.raises(UserError, match=r"has 2 epochs and no checkpoint; train it anew"):
            tiny.train(out=out, epochs=3, resume=True)
        assert snapshot(out) == before

    @pytest.mark.parametrize(
        "settings", [{}, {"epochs": 1}, {"select": "best", "epochs": 3}, {"val_images": 0}]
    )
    def test_a_finished_run_needs_no_checkpoints(self, tiny, tmp_path, settings):
        out = tmp_path / "run"
        done = tiny.train(out=out, **settings)
        shutil.rmtree(out / "checkpoints")
        before = snapshot(out)
        again = tiny.train(out=out, model=tiny.net(seed=9), resume=True, **settings)
        assert tiny.same_weights(done.model, again.model)
        assert (again.history, again.best_epoch) == (done.history, done.best_epoch)
        assert again.train_seconds == pytest.approx(done.train_seconds)
        assert snapshot(out) == before

    @pytest.mark.parametrize("epochs", [0.4, 1.4])
    def test_stopped_before_the_end_of_a_part_of_an_epoch_is_judged(
        self, tiny, tmp_path, monkeypatch, epochs
    ):
        """The last step is one at which a checkpoint is due: it must not pass for the end."""

        def train(**place: Any) -> Any:
            return tiny.train("fgsm", epochs=epochs, checkpoint_every=1, **place)

        out, whole, evaluate = tmp_path / "run", tmp_path / "whole", validating.evaluate
        train(out=whole)
        steps = round(5 * epochs)

        def killed(model: Any, *args: Any, **kwargs: Any) -> Any:
            if checkpoint.found(out / "checkpoints")[-1].stem == f"step-{steps - 1:08d}":
                raise tiny.Stopped
            return evaluate(model, *args, **kwargs)

        monkeypatch.setattr(validating, "evaluate", killed)
        with pytest.raises(tiny.Stopped):
            train(out=out)
        monkeypatch.setattr(validating, "evaluate", evaluate)
        train(out=out, resume=True)
        assert tiny.rows(out) == tiny.rows(whole)
        assert tiny.weights(out) == tiny.weights(whole)

    def test_a_finished_run_is_only_loaded(self, tiny, tmp_path, monkeypatch):
        out = tmp_path / "run"
        done = tiny.train(out=out)
        before = snapshot(out)
        monkeypatch.setattr(loop.Trainer, "_epoch", lambda *_: pytest.fail("trained"))
        again = tiny.train(out=out, model=tiny.net(seed=9), resume=True)
        assert tiny.same_weights(done.model, again.model)
        assert again.history == done.history
        assert again.best_epoch == done.best_epoch
        assert snapshot(out) == before

    @pytest.mark.parametrize("stop", STOPS)
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
    def test_a_truncated_checkpoint_is_passed_over(
        self, tiny, stopping, whole, tmp_path, capsys, stop, share
    ):
        def train(**place: Any) -> Any:
            return tiny.train("sat-r2", checkpoint_every=EVERY, **place, quiet=False)

        out = tmp_path / "run"
        stopping(STOPS[stop], lambda: train(out=out))
        older, newest = checkpoint.found(out / "checkpoints")
        content = newest.read_bytes()
        newest.write_bytes(content[: int(len(content) * share)])
        capsys.readouterr()
        self.resumes_to(tiny, whole("loud", train), out, train)
        said = capsys.readouterr().err
        assert f"skipping a damaged checkpoint: {newest}" in said
        assert f"at step {int(older.stem.split('-')[1])} of 10" in said

    def test_every_checkpoint_is_damaged(self, tiny, stopping, tmp_path):
        out = tmp_path / "run"
        stopping(9, lambda: tiny.train(out=out, checkpoint_every=EVERY))
        for path in checkpoint.found(out / "checkpoints"):
            path.write_bytes(path.read_bytes()[:-1])
        before = snapshot(out)
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(2 found\).*--ov"):
            tiny.train(out=out, checkpoint_every=EVERY, resume=True)
        assert snapshot(out) == before

    @pytest.mark.parametrize("other", ["the model", "ema", "the method"])
    def test_with_other_settings(self, tiny, stopping, tmp_path, other):
        out = tmp_path / "run"
        stopping(5, lambda: tiny.train(out=out))
        with pytest.raises(UserError, match="resume"):
            tiny.train(
                "fgsm" if other == "the method" else "standard",
                model=tiny.net(norm=other != "the model"),
                ema=0.9 if other == "ema" else None,
                out=out,
                resume=True,
            )

    @pytest.mark.parametrize("where", [None, "nowhere"])
    def test_without_a_run(self, tiny, tmp_path, where):
        with pytest.raises(UserError, match="resume"):
            tiny.train(out=where and tmp_path / where, resume=True)
        assert not list(tmp_path.iterdir())

    def test_the_speed_is_that_of_the_steps_taken_since(
        self, tiny, stopping, tmp_path, monkeypatch
    ):
        class Slow(methods.Standard):
            def craft(self, *batch: Any) -> Any:
                time.sleep(0.05)
                return super().craft(*batch)

        monkeypatch.setitem(METHODS, Slow.slug, Slow)

        def train(**place: Any) -> Any:
            return tiny.train(Slow(tiny.threat), checkpoint_every=3, **place)

        stopping(9, lambda: train(out=tmp_path / "run"))
        # 10 images in at least 0.05 s: at most 200 a second.
        history = train(out=tmp_path / "run", resume=True).history
        assert [row["images_per_second"] <= 200 for row in history] == [True, True]


class TestRunFolders:
    @pytest.mark.parametrize("tensorboard", [False, True])
    def test_one_that_exists_is_left_alone(self, tiny, tmp_path, tensorboard):
        out = tmp_path / "run"
        tiny.train(out=out)
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=r"exists already.*--out.*--resume.*--overwrite"):
            tiny.train(out=out, seed=1, tensorboard=tensorboard)
        assert snapshot(tmp_path) == before

    def test_an_empty_one_is_used(self, tiny, tmp_path):
        tiny.train(out=tmp_path)
        assert (tmp_path / "model.safetensors").exists()

    def test_overwrite_starts_anew(self, tiny, tmp_path):
        first, out = tmp_path / "first", tmp_path / "run"
        tiny.train(out=first, seed=1)
        tiny.train(out=out, epochs=3, tensorboard=True)
        tiny.train(out=out, seed=1, overwrite=True)
        assert tiny.weights(out) == tiny.weights(first)
        assert tiny.rows(out) == tiny.rows(first)
        assert snapshot(out).keys() == snapshot(first).keys()

    @pytest.mark.parametrize(
        "kind",
        ["file", "folder", "project with a config.yaml", "empty config.yaml", "run with a thesis"],
    )
    def test_overwrite_of_what_is_no_run(self, tiny, tmp_path, kind):
        out = tmp_path / "thesis"
        if kind == "file":
            out.write_text("ten years of work")
        else:
            out.mkdir()
        if kind == "run with a thesis":
            tiny.train(out=out)
        elif "config" in kind:
            (out / "config.yaml").write_text("title: thesis\n" if "project" in kind else "")
        if kind in ("folder", "run with a thesis"):
            (out / "thesis.tex").write_text("ten years of work")
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=r"not a run folder|holds no settings|holds thesis"):
            tiny.train(out=out, overwrite=True)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            pytest.param({"epoch": 3}, "did you mean 'epochs'", id="misspelt"),
            pytest.param({"device": "gpu"}, "gpu", id="device"),
            pytest.param({"data": (torch.rand(4, 1, 8, 8), [0])}, "y is", id="data"),
            pytest.param({"validation": "test"}, "give a pair", id="validation"),
            pytest.param({"val_attacks": ("pgd",)}, "unknown attack 'pgd'", id="attack"),
            pytest.param({"model": nn.Flatten()}, "no parameters", id="model"),
            pytest.param({"model": Misspelt()}, "Misspelt' object has no attribute 'fc3", id="fc3"),
        ],
    )
    def test_settings_that_are_refused_cost_no_run(self, tiny, tmp_path, settings, said):
        out = tmp_path / "run"
        tiny.train(out=out)
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=said):
            tiny.train(out=out, overwrite=True, **settings)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("part", ["data", "validation"])
    @pytest.mark.parametrize("kind", ["Dataset", "DataLoader", "labels"])
    def test_data_that_are_refused_cost_no_run(self, tiny, tmp_path, kind, part):
        """What a loader holds is looked at before an old run makes room, or an epoch is trained."""
        x, y = tiny.data()
        pairs = TensorDataset(x * 3, y) if kind != "labels" else TensorDataset(x, y + 7)
        bad = DataLoader(pairs, 8) if kind == "DataLoader" else pairs
        settings = {"validation": tiny.data(8), part: bad}
        out = tmp_path / "run"
        tiny.train(out=out)
        before = snapshot(tmp_path)
        said = r"labels from 7 to 7" if kind == "labels" else r"expected \[0, 1\]"
        with pytest.raises(UserError, match=said):
            tiny.train(out=out, overwrite=True, **settings)
        assert snapshot(tmp_path) == before

    def test_a_place_where_no_folder_can_be(self, tiny, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot make the run folder"):
            tiny.train(out=tmp_path / "file" / "run")

    @pytest.mark.parametrize(
        ("last", "said"),
        [(6, "step-00000010.*--resume"), (7, "model.safetensors"), (8, "metrics.jsonl")],
    )
    def test_a_full_disk(self, tiny, tmp_path, monkeypatch, last, said):
        whole, out = tmp_path / "whole", tmp_path / "run"
        tiny.train(out=whole)
        replace, writes = os.replace, 0

        def full(*args: Any) -> None:
            nonlocal writes
            writes += 1
            if writes == last:  # config, environment; checkpoint, weights, row of each epoch
                raise OSError(28, "No space left on device")
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(UserError, match=f"no space left.*{said}"):
                tiny.train(out=out)
        assert not list(out.rglob(".*"))
        tiny.train(out=out, resume=True)
        assert tiny.weights(out) == tiny.weights(whole)
        assert tiny.rows(out) == tiny.rows(whole)


class Pairs(Dataset):
    """A user's own data set: labels are plain integers."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y.tolist()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], self.y[i]


class TestData:
    @pytest.mark.parametrize(
        "kind", ["pair", "numpy", "Images", "uint8 Images", "Dataset", "DataLoader"]
    )
    def test_every_kind(self, tiny, kind):
        x, y = tiny.data()
        source: Any = {
            "pair": (x, y),
            "numpy": (x.numpy(), y.numpy()),
            "Images": data.Images(x, y),
            "uint8 Images": data.Images((x * 255).byte(), y),
            "Dataset": Pairs(x, y),
            "DataLoader": DataLoader(Pairs(x, y), 10, shuffle=True),
        }[kind]
        result = tiny.train(data=source, validation=(x, y) if kind == "DataLoader" else None)
        last = result.history[-1]
        assert last["val_n"] == (64 if kind == "DataLoader" else 6)
        assert last["step"] == (14 if kind == "DataLoader" else 10)

    def test_pixels_of_a_pair_and_of_images_are_the_same(self, tiny):
        x, y = tiny.data()
        x = (x * 255).byte()
        one = tiny.train(data=(x.float() / 255, y))
        assert tiny.same_weights(one.model, tiny.train(data=data.Images(x, y)).model)

    def test_features(self, tiny):
        x, y = tiny.data()
        net = nn.Sequential(nn.Linear(64, 3))
        assert tiny.train("fgsm", model=net, data=(x.flatten(1), y), engine="auto").history

    @pytest.mark.parametrize("kind", ["pair", "Dataset", "DataLoader"])
    def test_validation_data_of_every_kind(self, tiny, kind):
        x, y = tiny.data(20)
        held: Any = {
            "pair": (x, y),
            "Dataset": TensorDataset(x, y),
            "DataLoader": DataLoader(TensorDataset(x, y), 7),
        }[kind]
        settings = {"val_images": 15, "val_attacks": ("fgsm", "i-fgsm-2")}
        history = tiny.train(validation=held, **settings).history
        assert history[0]["val_n"] == 15
        # Of a Dataset a part is drawn from all, of the others it is the first.
        rows = data.some(20, 15) if kind == "Dataset" else slice(0, 15)
        expected = tiny.train(validation=(x[rows], y[rows]), **settings).history
        assert [r["val_worst_case"] for r in history] == [r["val_worst_case"] for r in expected]

    @pytest.mark.parametrize("kind", ["pair", "Dataset"])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_held_out_images_are_never_trained_on(self, tiny, monkeypatch, kind, seed):
        x, y = tiny.data()
        trained, judged = set(), set()
        evaluate = validating.evaluate

        def spy(model: nn.Module, held: Any, *args: Any, **kwargs: Any) -> Evaluation:
            images = held.x if kind == "pair" else [image for image, _ in held]
            judged.update(image.numpy().tobytes() for image in images)
            return evaluate(model, held, *args, **kwargs)

        class Noting(methods.Standard):
            def craft(self, model: nn.Module, x: Tensor, *rest: Any) -> Any:
                trained.update(image.numpy().tobytes() for image in x)
                return super().craft(model, x, *rest)

        monkeypatch.setattr(validating, "evaluate", spy)
        source = (x, y) if kind == "pair" else TensorDataset(x, y)
        tiny.train(Noting(tiny.threat), data=source, seed=seed, epochs=8)
        assert len(judged) == 6
        assert len(trained) == 58
        assert not judged & trained

    def test_index_finds_the_image(self, tiny):
        x, y = tiny.data()
        seen = []

        class Noting(methods.Standard):
            def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Any:
                assert index is not None
                seen.append((x, y, index))
                return super().craft(model, x, y, index)

        tiny.train(Noting(tiny.threat), data=(x, y), val_images=0)
        assert len(seen) == 12
        for images, labels, index in seen:
            assert torch.equal(images, x[index])
            assert torch.equal(labels, y[index])

    def test_too_few_images_to_hold_any_out(self, tiny):
        x, y = tiny.data(9)
        result = tiny.train(data=(x, y), batch_size=3, select="best")
        assert "val_n" not in result.history[0]
        assert result.best_epoch == 2

    @pytest.mark.parametrize(
        ("source", "settings", "said"),
        [
            (DataLoader, {}, "nothing can be held out of a DataLoader: pass validation"),
            (Pairs, {"augment": "crop-flip"}, "'crop-flip' works on tensors in memory"),
        ],
    )
    def test_what_cannot_be(self, tiny, source, settings, said):
        pairs = Pairs(*tiny.data())
        with pytest.raises(UserError, match=said):
            tiny.train(data=DataLoader(pairs, 10) if source is DataLoader else pairs, **settings)

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("mnist", "is of type str: give a pair"),
            ((torch.rand(8, 1, 8, 8) * 255, torch.zeros(8).long()), "divide x by 255"),
            ((torch.rand(8, 1, 8, 8), torch.zeros(7).long()), "8 images but y has 7 labels"),
            ((torch.rand(20, 1, 8, 8), torch.arange(20)), "labels from .* but the model has 3"),
            (DataLoader([], 10), "no batch to train on"),
        ],
    )
    def test_data_that_make_no_sense(self, tiny, source, said):
        with pytest.raises(UserError, match=said) as caught:
            tiny.train(data=source, val_images=0)
        assert "\n" not in str(caught.value)

    def test_data_without_a_length(self, tiny):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self) -> Iterator[Any]:
                return zip(*tiny.data(), strict=True)

        with pytest.raises(UserError, match="length"):
            tiny.train(data=Stream(), val_images=0)

    @pytest.mark.parametrize("wrong", ["item", "collate", "validation"])
    def test_a_mistake_in_a_dataset_costs_no_run(self, tiny, tmp_path, wrong):
        class Wrong(Pairs):
            def __getitem__(self, i: int) -> Any:
                if wrong == "item":
                    raise KeyError("no such column")
                return object(), self.y[i]  # such as an image of PIL

        tiny.train(out=tmp_path / "run")
        before = snapshot(tmp_path)
        given: Any = {"data": Wrong(*tiny.data())}
        if wrong == "validation":
            given = {"validation": DataLoader(given["data"], 4)}
        error, said = UserError, r"cannot be made part of a batch \(default_collate: .*: return a"
        if wrong == "item":
            error, said = KeyError, "no such column"
        with pytest.raises(error, match=said):
            tiny.train(out=tmp_path / "run", overwrite=True, **given)
        assert snapshot(tmp_path) == before

    def test_the_first_item_is_fetched_as_a_loader_fetches_it(self, tiny):
        class Many(Dataset):
            def __len__(self) -> int:
                return 4

            def __getitems__(self, rows: list[int]) -> Any:
                return [(torch.zeros(1, 8, 8), row) for row in rows]

        class Empty(Many):
            def __len__(self) -> int:
                return 0

            def __getitems__(self, rows: list[int]) -> Any:
                raise IndexError

        batch = first_item_as_batch(Many())
        assert batch is not None
        assert batch[1].tolist() == [0]
        assert first_item_as_batch(Empty()) is None

    def test_batches_that_are_no_pairs(self, tiny):
        rows = [{"x": image, "y": label} for image, label in Pairs(*tiny.data())]
        with pytest.raises(UserError, match="pair"):
            tiny.train(data=DataLoader(rows, 10), val_images=0)


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
            tiny.train(model=model, out=out, checkpoint_every=EVERY)
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
            tiny.train(model=model, out=out, checkpoint_every=EVERY)
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


class TestSettings:
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


class TestTwoAtOnce:
    def test_the_second_run_does_not_delete_the_first(self, tiny, tmp_path, monkeypatch):
        """Both look at an empty place; while one gets ready, the other begins."""
        out, plan = tmp_path / "run", _fit.RunFolder.plan

        def planned(*args: Any, **kwargs: Any) -> Any:
            place = plan(*args, **kwargs)
            monkeypatch.setattr(_fit.RunFolder, "plan", plan)
            tiny.train(out=out, seed=1)
            return place

        monkeypatch.setattr(_fit.RunFolder, "plan", planned)
        with pytest.raises(UserError, match="taken by another run just now: choose another --out"):
            tiny.train(out=out)
        assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 1
        assert (out / "model.safetensors").is_file()

    @pytest.mark.parametrize("links", [True, False])
    def test_only_one_claims_it(self, tmp_path, monkeypatch, links):
        """Both find it empty, and both are about to write."""
        meet, link = threading.Barrier(2), os.link

        def linked(*args: Any) -> None:
            meet.wait(timeout=20)
            if not links:
                raise OSError(95, "Operation not supported")
            link(*args)

        monkeypatch.setattr(os, "link", linked)

        def claim(seed: int) -> str:
            try:
                _fit.RunFolder(tmp_path / "run").make({"method": "fgsm", "seed": seed})
            except UserError as e:
                return str(e)
            return ""

        with ThreadPoolExecutor(2) as pool:
            said = sorted(pool.map(claim, (1, 2)))
        assert said[0] == ""
        assert "taken by another run just now" in said[1]
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]
        config = tmp_path / "run" / "config.yaml"
        assert yaml.safe_load(config.read_text())["seed"] in (1, 2)
        plain = tmp_path / "plain"
        plain.touch()
        assert config.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("kind", ["pair", "validation"])
def test_images_in_memory_are_pixels(tiny, kind):
    """Else the first steps would run, and the first validation would not."""
    x, y = tiny.data()
    method = methods.Standard(surestep.Linf(0.1, bounds=(-1.0, 1.0)))
    loader = DataLoader(TensorDataset(2 * x - 1, y), 8)
    given = {"data": loader, "validation": (x, y)} if kind == "validation" else {"data": (x, y)}
    with pytest.raises(UserError, match=r"pixels in \[0, 1\].*data range is \(-1\.0, 1\.0\)"):
        tiny.train(method, **given)
    result = tiny.train(method, data=loader, validation=loader)
    assert result.history[-1]["val_n"] == 64


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


class TestImagesWithoutALabel:
    @pytest.fixture
    def partly(self, tiny):
        x, y = tiny.data()
        y[: 2 * len(y) // 3] = -1
        return x, y

    def test_uat_takes_them_and_holds_out_others(self, tiny, partly, monkeypatch):
        method, seen = methods.get("uat")(tiny.threat, labelled=1.0, steps=1), []
        craft = type(method).craft
        monkeypatch.setattr(
            type(method),
            "craft",
            lambda self, m, x, y, i: (
                seen.append((y, self.progress.labelled)) or craft(self, m, x, y, i)
            ),
        )
        (row,) = tiny.train(method, data=partly, epochs=1, val_images=6).history
        assert math.isfinite(row["loss"])
        labelled = int((partly[1] >= 0).sum())
        assert row["val_n"] == min(6, labelled // 10)
        held = row["val_n"]
        assert seen[0][1] == (labelled - held) / (len(partly[1]) - held)
        assert any((y == -1).any() for y, _ in seen)

    def test_accuracy_is_of_those_that_have_a_label(self, tiny, partly):
        always = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        for parameter in always.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(always[1].bias[0], 1.0)
        (row,) = tiny.train("uat", model=always, data=partly, epochs=1, lr=1e-6).history
        share = float((partly[1] == 0).sum() / (partly[1] >= 0).sum())
        assert row["adv_accuracy"] == pytest.approx(share, abs=0.1)

    def test_others_refuse_them_before_the_first_step(self, tiny, partly):
        with pytest.raises(UserError, match="only training with uat takes -1, no label"):
            tiny.train("fgsm", data=partly, epochs=1)

    def test_validation_must_have_labels(self, tiny, partly):
        with pytest.raises(UserError, match="validation holds images without a label"):
            tiny.train("uat", data=tiny.data(), validation=partly, val_images=4)


def source_of(
    given: Any,
    *,
    device: str = "cpu",
    shard: Callable[[Any], Any] = lambda loader: loader,
    steps: int | None = None,
) -> Any:
    config = FitSettings(batch_size=4, augment="none")
    place, bounds = torch.device(device), (0.0, 1.0)
    return make_source(given, config, place, shard=shard, workers=0, bounds=bounds, steps=steps)


@pytest.fixture
def second_of_two(monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)


def test_what_a_gpu_fetches_is_pinned():
    """A Dataset's loader, which the loop makes itself."""
    pairs = TensorDataset(torch.rand(8, 1, 4, 4), torch.arange(8))
    for device, pinned in (("cuda", True), ("cpu", False)):
        source = source_of(pairs, device=device)
        assert source.loader.pin_memory is pinned


class TestLoaders:
    def test_bytes_are_made_pixels(self, tiny):
        x, y = tiny.data()
        grey = (255 * x).round().to(torch.uint8)
        found = [
            tiny.train(data=DataLoader(TensorDataset(given, y), 8), validation=(grey, y))
            for given in (grey, grey.float() / 255)
        ]
        assert tiny.same_weights(found[0].model, found[1].model)

    def test_a_loader_of_the_users_own_kind_is_used_as_it_is(self, tiny):
        class Counting(DataLoader):
            epochs = 0

            def __iter__(self):
                self.epochs += 1
                for x, y in super().__iter__():
                    yield x.flip(3), y

        class Sampler(torch.utils.data.SequentialSampler):
            told: list[int] = []  # once an epoch, though two places lead to it

            def set_epoch(self, epoch):
                self.told.append(epoch)

        x, y = tiny.data()
        pairs = TensorDataset(x.flip(3), y)
        loader = Counting(pairs, 8, sampler=Sampler(pairs))
        plain = tiny.train(data=DataLoader(TensorDataset(x, y), 8), validation=(x, y))
        own = tiny.train(data=loader, validation=(x, y))
        assert loader.epochs == 2
        assert Sampler.told == [0, 1]
        assert tiny.same_weights(own.model, plain.model)
        batches = torch.utils.data.BatchSampler(Sampler(pairs), 8, drop_last=False)
        tiny.train(data=DataLoader(pairs, batch_sampler=batches), validation=(x, y))
        assert Sampler.told == [0, 1, 0, 1]

    def test_batches_that_mix_images(self, tiny):
        """Their collate_fn wants two; the shape of one is known all the same."""

        def mix(pairs):
            x, y = torch.utils.data.default_collate(pairs)
            return torch.stack([(x[0] + x[1]) / 2, *x[1:]]), y

        loader = DataLoader(TensorDataset(*tiny.data()), 8, collate_fn=mix, drop_last=True)
        assert tiny.train(data=loader, val_images=0, max_memory=1.0).history

    def test_validation_in_doubles(self, tiny):
        x, y = tiny.data(12)
        held = DataLoader(TensorDataset(x.double(), y), 6)
        assert tiny.train(validation=held).history[0]["val_n"] == 12

    def test_dropout_without_a_place_is_told_at_once(self, tiny, tmp_path):
        tiny.train(out=tmp_path / "run")
        before = snapshot(tmp_path)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        with pytest.raises(UserError, match="acts after activation modules, but"):
            tiny.train("sads", model=net, out=tmp_path / "run", overwrite=True)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            ("subclass", "of a Own, which changes"),
            ("batch_size=None", "batch_size=None cannot be spl"),
            ("any sizes", "of a list without an attribute batch_size may differ in size"),
        ],
    )
    def test_but_not_shared_out(self, tiny, second_of_two, kind, said):
        class Own(DataLoader):
            def __iter__(self):
                return super().__iter__()

        pairs = TensorDataset(*tiny.data())
        loader = Own(pairs, 8) if kind == "subclass" else DataLoader(pairs, batch_size=None)
        if kind == "any sizes":
            loader = DataLoader(pairs, batch_sampler=[[0, 1], [2]])
        with pytest.raises(UserError, match=said):
            source_of(loader, shard=lambda _: pytest.fail("was shared out"))

    def test_full_memory_names_the_loaders_own_size(self, tiny, monkeypatch):
        def full(*_: Any) -> Any:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(TrainStep, "__call__", full)
        loader = DataLoader(TensorDataset(*tiny.data()), 8)
        with pytest.raises(UserError, match=r"lower the DataLoader's batch_size \(8\), or set max"):
            tiny.train(data=loader, val_images=0)

    def test_a_datasets_images_are_loaded_by_workers(self, tiny, monkeypatch):
        seen, made = [], DataLoader.__init__

        def noted(self, *args, num_workers=0, **kwargs):
            seen.append(num_workers)
            made(self, *args, num_workers=num_workers, **kwargs)

        monkeypatch.setattr(DataLoader, "__init__", noted)
        x, y = tiny.data(32)
        results = [
            tiny.train(data=TensorDataset(x, y), validation=tiny.data(8), epochs=1, workers=workers)
            for workers in (0, 2)
        ]
        assert {0, 2} <= set(seen)
        assert tiny.same_weights(*(result.model for result in results))
        with pytest.raises(UserError, match="workers -1: give 0 or more"):
            tiny.train(workers=-1)

    def test_validation_attacks_as_many_as_the_loader_has_at_a_time(self, tiny, monkeypatch):
        sizes, evaluate = [], validating.evaluate

        def judge(*args, batch_size, **kwargs):
            sizes.append(batch_size)
            return evaluate(*args, batch_size=batch_size, **kwargs)

        monkeypatch.setattr(validating, "evaluate", judge)
        monkeypatch.setattr(preparing, "ROOM_TO_JUDGE", 0)
        pairs = DataLoader(TensorDataset(*tiny.data()), 4)
        tiny.train(data=pairs, validation=tiny.data(8), epochs=1)
        assert sizes == [4]

    def test_a_resume_with_other_batches_is_refused(self, tiny, stopping, tmp_path):
        def train(size: int, **place: Any) -> Any:
            loader = DataLoader(TensorDataset(*tiny.data()), size)
            return tiny.train(
                data=loader, val_images=0, steps_per_epoch=8, out=tmp_path / "run", **place
            )

        stopping(9, lambda: train(8))
        config = (tmp_path / "run" / "config.yaml").read_text("utf-8")
        assert yaml.safe_load(config)["batch_size"] == 8
        said = r"took 8 images in a step from its DataLoader, but this one gives 4: resume with the"
        with pytest.raises(UserError, match=said):
            train(4, resume=True)
        assert [row["step"] for row in train(8, resume=True).history] == [8, 16]

    def test_a_resume_with_other_generators_is_refused(self, tiny, stopping, tmp_path):
        def train(generator: torch.Generator | None, **place: Any) -> Any:
            pairs = TensorDataset(*tiny.data())
            loader = DataLoader(pairs, 8, shuffle=True, generator=generator)
            return tiny.train(data=loader, val_images=0, out=tmp_path / "run", **place)

        stopping(9, lambda: train(torch.Generator()))
        said = "drew from 1 random generators of its DataLoader and samplers, but these have 0: res"
        with pytest.raises(UserError, match=said):
            train(None, resume=True)

    @pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}])
    def test_each_epoch_is_judged_on_the_same_images(self, tiny, monkeypatch, workers):
        """And those that a loader of a resume, made anew, would begin with."""
        evaluate, judged = validating.evaluate, []

        def noted(*args: Any, **kwargs: Any) -> Any:
            found = evaluate(*args, **kwargs)
            judged.append([row["n"] for row in found.per_class])
            return found

        monkeypatch.setattr(validating, "evaluate", noted)
        generator = torch.Generator().manual_seed(1)
        before = generator.get_state()
        pairs = TensorDataset(*tiny.data())
        held = DataLoader(pairs, 8, shuffle=True, generator=generator, **workers)
        tiny.train(validation=held, val_images=20, epochs=3)
        assert judged[0] == judged[1] == judged[2]
        assert torch.equal(generator.get_state(), before)

    def test_a_last_batch_of_one_image(self, tiny):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        loader = DataLoader(TensorDataset(*tiny.data(21)), 10)
        with pytest.raises(
            UserError, match=r"step 3, of 1 image, leaves .*: choose another .*drop_last=True"
        ):
            tiny.train(model=net, data=loader, val_images=0)

    def test_batches_are_moved_here(self, tiny, monkeypatch):
        """Accelerate would wait for the device before it fetches the next."""
        given: list[Any] = []

        def noted(*args: Any, shard: Any, **options: Any) -> Any:
            given.append(shard)
            return make_source(*args, shard=shard, **options)

        monkeypatch.setattr(preparing, "make_source", noted)
        tiny.train(data=TensorDataset(*tiny.data()), validation=tiny.data(8), epochs=1)
        (shard,) = given
        assert shard.func.__name__ == "prepare_data_loader"
        assert shard.keywords == {"device_placement": False}

    def test_shares_are_not_shared_out_again(self, tiny, monkeypatch):
        pairs = TensorDataset(*tiny.data())
        sampler = DistributedSampler(pairs, num_replicas=2, rank=0)
        loader = DataLoader(pairs, 4, sampler=sampler)
        assert source_of(loader).steps_per_epoch == 8
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        with pytest.raises(UserError, match=r"has a DistributedSampler, .*: give one without"):
            source_of(loader)

    @pytest.mark.parametrize(
        ("kind", "lacking"),
        [
            ("own", "Own has no generator"),
            ("own with a generator", None),
            ("own of batches", "Own has no set_epoch"),  # whose generator Accelerate does not share
            ("shuffle", None),
            ("in order", None),
        ],
    )
    def test_an_order_that_each_process_would_draw_for_itself_is_said(
        self, tiny, recwarn, monkeypatch, kind, lacking
    ):
        class Own(torch.utils.data.Sampler):
            def __iter__(self) -> Any:
                return iter(torch.randperm(64).tolist())

            def __len__(self) -> int:
                return 64

        pairs, sampler = TensorDataset(*tiny.data()), Own() if "own" in kind else None
        if "generator" in kind:
            sampler.generator = None
        loader = DataLoader(pairs, 4, sampler=sampler, shuffle=kind == "shuffle" or None)
        if "batches" in kind:
            sampler.generator, sampler.batch_size = None, 4
            loader = DataLoader(pairs, batch_sampler=sampler)
        source_of(loader)
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        source_of(loader)
        said = [str(w.message) for w in recwarn if "has no" in str(w.message)]
        assert len(said) == (lacking is not None)
        assert all(f"the DataLoader's {lacking}: if it draws" in one for one in said)

    def test_an_iterable_that_knows_its_length(self, tiny):
        x, y = tiny.data(40)

        class Stream(IterableDataset):
            def __len__(self) -> int:
                return len(x)

            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                return iter(zip(x, y, strict=True))

        loader = DataLoader(Stream(), 10)
        result = tiny.train("sat-r2", data=loader, validation=tiny.data(8), engine="fast")
        assert [row["step"] for row in result.history] == [4, 8]
        with pytest.raises(UserError, match=r"max_memory \(1\) needs the shape of an image"):
            tiny.train(data=loader, validation=tiny.data(8), max_memory=1.0)


class TestStreams:
    """Data without a length, and without an end."""

    @pytest.fixture
    def stream(self, tiny):
        class Stream(IterableDataset):
            epoch = 0

            def set_epoch(self, epoch):
                self.epoch = epoch

            def __iter__(self):
                x, y = tiny.data()
                for i in itertools.count(7 * self.epoch):
                    yield x[i % 64] + 0.1 * torch.rand(1, 8, 8), y[i % 64]

        return lambda: DataLoader(Stream(), 10, collate_fn=Clipped())

    def train(self, tiny, stream, **settings):
        held = {"validation": tiny.data(8), "checkpoint_every": 2}
        return tiny.train("sat-r2", data=stream(), steps_per_epoch=5, **held, **settings)

    def test_epochs_are_as_long_as_is_said(self, tiny, stream, tmp_path):
        result = self.train(tiny, stream, out=tmp_path / "run")
        assert [row["step"] for row in result.history] == [5, 10]

    @pytest.mark.parametrize("after", STOPS.values())
    def test_resume(self, tiny, stream, stopping, tmp_path, after):
        whole, out = tmp_path / "whole", tmp_path / "run"
        self.train(tiny, stream, out=whole)
        stopping(after, lambda: self.train(tiny, stream, out=out))
        self.train(tiny, stream, out=out, resume=True)
        assert tiny.weights(out) == tiny.weights(whole)
        assert tiny.rows(out) == tiny.rows(whole)

    def test_each_process_has_its_own(self, stream, second_of_two):
        options = {"shard": lambda _: pytest.fail("was split")}
        assert len(list(source_of(stream(), steps=3, **options).epoch(0))) == 3
        with pytest.raises(UserError, match="steps_per_epoch and a stream that yields each"):
            source_of(stream(), **options)

    def test_what_is_refused(self, tiny, stream):
        with pytest.raises(UserError, match=r"has no length, .*: give steps_per_epoch with a Data"):
            tiny.train(data=stream(), validation=tiny.data(8))
        with pytest.raises(UserError, match="steps_per_epoch 0: give 1 or more"):
            tiny.train(steps_per_epoch=0)
        with pytest.raises(UserError, match=r"steps_per_epoch \(5\) applies to a DataLoader only"):
            tiny.train(steps_per_epoch=5)
        short = DataLoader(TensorDataset(*tiny.data()), 10)
        with pytest.raises(UserError, match="steps_per_epoch 9: the DataLoader has 7 batches"):
            tiny.train(data=short, validation=tiny.data(8), steps_per_epoch=9)
        fewer = tiny.train(data=short, validation=tiny.data(8), steps_per_epoch=3)
        assert [row["step"] for row in fewer.history] == [3, 6]

        class Ends(IterableDataset):
            def __iter__(self):
                return iter(zip(*tiny.data(), strict=True))

        with pytest.raises(UserError, match="ended after 7 of 9 batches of an epoch: give fewer"):
            tiny.train(data=DataLoader(Ends(), 10), validation=tiny.data(8), steps_per_epoch=9)


class Clipped:
    """Put the pairs of a batch together, and their noise back into the range."""

    def __call__(self, pairs):
        x, y = zip(*pairs, strict=True)
        return torch.stack(x).clamp(0, 1), torch.stack(y)


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


def test_resume_restores_every_library_that_draws(tiny, stopping, tmp_path):
    """Models and transforms may draw from python and numpy, too."""

    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            shift = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
            return super().forward(x + 0.05 * shift)

    def train(**place: Any) -> Any:
        return tiny.train(model=Noisy(*tiny.net()), checkpoint_every=EVERY, **place)

    train(out=tmp_path / "whole")
    stopping(5, lambda: train(out=tmp_path / "run"))
    train(out=tmp_path / "run", resume=True)
    assert tiny.weights(tmp_path / "run") == tiny.weights(tmp_path / "whole")
    assert tiny.rows(tmp_path / "run") == tiny.rows(tmp_path / "whole")


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


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_a_loaders_labels_are_whole_numbers_of_any_kind(tiny, dtype):
    x, y = tiny.data()
    results = []
    for labels in (y, y.to(dtype)):
        pairs = DataLoader(TensorDataset(x, labels), 10)
        results.append(tiny.train(data=pairs, validation=pairs, epochs=1))
    assert tiny.same_weights(*(result.model for result in results))


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
