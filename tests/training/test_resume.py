from __future__ import annotations

import os
import random
import shutil
import threading
import time
import weakref
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
    TensorDataset,
)

from surestep import methods
from surestep.errors import UserError
from surestep.methods._registry import METHODS
from surestep.training import (
    TrainStep,
    _fit,
    checkpoint,
    loop,
    validating,
)

EVERY = 2
STOPS = {"mid-epoch": 4, "boundary": 5, "mid-epoch 2": 9}
"""Steps done before the crash. With 5 steps an epoch and a checkpoint every second step the
newest checkpoint is at 4 (in epoch 1), 5 (between the epochs) and 8 (in epoch 2)."""
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


class Misspelt(nn.Linear):
    """A model whose forward names a layer that it has not."""

    def __init__(self):
        super().__init__(64, 4)

    def forward(self, x):
        return self.fc3(x.flatten(1))


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
        before = tiny.snapshot(out)
        with pytest.raises(UserError, match=r"has 2 epochs and no checkpoint; train it anew"):
            tiny.train(out=out, epochs=3, resume=True)
        assert tiny.snapshot(out) == before

    @pytest.mark.parametrize(
        "settings", [{}, {"epochs": 1}, {"select": "best", "epochs": 3}, {"val_images": 0}]
    )
    def test_a_finished_run_needs_no_checkpoints(self, tiny, tmp_path, settings):
        out = tmp_path / "run"
        done = tiny.train(out=out, **settings)
        shutil.rmtree(out / "checkpoints")
        before = tiny.snapshot(out)
        again = tiny.train(out=out, model=tiny.net(seed=9), resume=True, **settings)
        assert tiny.same_weights(done.model, again.model)
        assert (again.history, again.best_epoch) == (done.history, done.best_epoch)
        assert again.train_seconds == pytest.approx(done.train_seconds)
        assert tiny.snapshot(out) == before

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
        before = tiny.snapshot(out)
        monkeypatch.setattr(loop.Trainer, "_epoch", lambda *_: pytest.fail("trained"))
        again = tiny.train(out=out, model=tiny.net(seed=9), resume=True)
        assert tiny.same_weights(done.model, again.model)
        assert again.history == done.history
        assert again.best_epoch == done.best_epoch
        assert tiny.snapshot(out) == before

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
        before = tiny.snapshot(out)
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(2 found\).*--ov"):
            tiny.train(out=out, checkpoint_every=EVERY, resume=True)
        assert tiny.snapshot(out) == before

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
        before = tiny.snapshot(tmp_path)
        with pytest.raises(UserError, match=r"exists already.*--out.*--resume.*--overwrite"):
            tiny.train(out=out, seed=1, tensorboard=tensorboard)
        assert tiny.snapshot(tmp_path) == before

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
        assert tiny.snapshot(out).keys() == tiny.snapshot(first).keys()

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
        before = tiny.snapshot(tmp_path)
        with pytest.raises(UserError, match=r"not a run folder|holds no settings|holds thesis"):
            tiny.train(out=out, overwrite=True)
        assert tiny.snapshot(tmp_path) == before

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
        before = tiny.snapshot(tmp_path)
        with pytest.raises(UserError, match=said):
            tiny.train(out=out, overwrite=True, **settings)
        assert tiny.snapshot(tmp_path) == before

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
        before = tiny.snapshot(tmp_path)
        said = r"labels from 7 to 7" if kind == "labels" else r"expected \[0, 1\]"
        with pytest.raises(UserError, match=said):
            tiny.train(out=out, overwrite=True, **settings)
        assert tiny.snapshot(tmp_path) == before

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
