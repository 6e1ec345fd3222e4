"""A user's mistake is exit code 2 and one line; a fault of ours is 1 and a traceback."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import surestep
from surestep import UserError, comparing, models
from surestep.cli._options import hand_over
from surestep.training.run_folder import RunFolder

ATTACKS = "write one of fgsm[-LOSS], r-fgsm[-LOSS], i-fgsm-STEPS[-LOSS]"


class TestCommands:
    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["trian"], ["'trian'", "did you mean 'train'?"]),
            (["xyz"], ["'xyz'", "known are audit, compare, demo, env, evaluate, harden, "]),
            (["--nope"], ["--nope"]),
            (["train", "--epoch", "3"], ["--epoch", "--epochs"]),
            (["train", "--eps"], ["--eps", "requires an argument"]),
            (["train", "mnist"], ["unexpected extra argument", "mnist"]),
            (["evaluate"], ["MODEL"]),
            (["methods", "sat-r9"], ["'sat-r9'", "did you mean 'sat-r3'?", "known are aaer, "]),
            (["demo", "--n", "0"], ["--n", "0", "1<=x"]),
            (["demo", "--seed", "-1"], ["--seed", "-1", "0<=x"]),
        ],
    )
    def test_what_cannot_be_understood(self, refused, args, said):
        line = refused(*args)
        assert all(s in line for s in said), line

    def test_no_command(self, cli):
        code, out, err = cli()
        assert code in (0, 2)
        assert "\n  train " in (out + err)
        assert "error: Usage" not in err


class TestTraining:
    @pytest.fixture
    def refuse(self, refused, small, tmp_path):
        """Train with wrong options: no run folder may come of it."""

        def train(*args):
            out = tmp_path / "out"
            line = refused("train", "--method", "sat-r3", *small, "--out", out, *args)
            assert not out.exists()
            return line

        return train

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["--method", "sat-r9"], ["method 'sat-r9'", "did you mean 'sat-r3'?"]),
            (["--dataset", "mnits"], ["dataset 'mnits'", "did you mean 'mnist'?", "cifar10"]),
            (["--model", "lenet"], ["model 'lenet'", "did you mean 'lenet+'?", "timm:NAME"]),
            (["--preset", "mnsit"], ["'mnsit'", "did you mean 'mnist'?", "cifar10"]),
            (["--param", "tua=1"], ["parameter of sat-r3 'tua'", "did you mean 'tau'?"]),
            (["--param", "lam"], ["--param 'lam'", "NAME=VALUE", "--param lam=5"]),
            (["--param", "=3"], ["--param '=3'", "NAME=VALUE"]),
            (["--param", "lam=-1"], ["sat-r3: lam -1", ">= 0"]),
            (["--param", "tau=0"], ["sat-r3: tau 0", "> 0"]),
            (["--param", "eps_low=0.4"], ["eps_low 0.4", "full step = 0.3"]),
            (["--param", "lam="], ["params.lam ''", "number"]),
            (["--param", "lam=1/0"], ["lam '1/0'"]),
            (["--param", "lam=[1"], ["params.lam '[1'", "number"]),
            (["--param", "lam=2024-13-01"], ["params.lam '2024-13-01'", "a number"]),
            (["--data", "~nosuchuser/x.npz"], ["~nosuchuser/x.npz", "cannot resolve"]),
            (["--param", "lam=abc"], ["lam 'abc'", "number"]),
            (["--eps", "-1"], ["eps '-1'", "greater than or equal to 0"]),
            (["--eps", "2"], ["eps 2", "(0.0, 1.0)", "8/255"]),
            (["--eps", "8"], ["eps 8", "8/255 rather than 8"]),
            (["--eps", "abc"], ["eps 'abc'", "number"]),
            (["--eps", "8/0"], ["eps '8/0'", "ratio such as 8/255"]),
            (["--eps", "8/x"], ["eps '8/x'", "ratio such as 8/255"]),
            (["--eps", "nan"], ["eps 'nan'", "finite"]),
            (["--epochs", "0"], ["epochs '0'", "greater than 0"]),
            (["--epochs", "x"], ["epochs 'x'", "integer"]),
            (["--epochs", "0.01"], ["0.01 epochs of", "less than one step"]),
            (["--lr", "0"], ["lr '0'", "greater than 0"]),
            (["--lr", "1e999"], ["lr '1e999'", "finite"]),
            (["--batch-size", "0"], ["batch_size '0'", "greater than or equal to 1"]),
            (["--seed", "-1"], ["seed '-1'", "greater than or equal to 0"]),
            (["--seed", "9" * 30], ["seed"]),
            (["--norm", "l3"], ["norm 'l3'", "'linf' or 'l2'"]),
            (["--optimizer", "sdg"], ["optimizer 'sdg'", "'sgd', 'adam' or 'adamw'"]),
            (["--schedule", "warm"], ["schedule 'warm'", "'cosine'"]),
            (["--ema", "1"], ["ema '1'", "less than 1"]),
            (["--image-size", "28"], ["image_size 28", "npz", "leave it out"]),
            (["--val-attacks", "fgms"], ["'fgms'", ATTACKS]),
            (["--val-attacks", ""], ["attack"]),
            (["--device", "nonsense"], ["device 'nonsense'", "cpu, cuda"]),
            (["--dataset", "npz:other.npz"], ["'npz:other.npz'", "both give the location"]),
        ],
    )
    def test_a_wrong_value(self, refuse, args, said):
        line = refuse(*args)
        assert all(s in line for s in said), line

    @pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
    def test_a_device_that_is_not_here(self, refuse, name):
        kind = name.partition(":")[0]
        if torch.cuda.is_available() if kind == "cuda" else torch.backends.mps.is_available():
            pytest.skip(f"{kind} is here")
        assert f"device {name!r} cannot be used here" in refuse("--device", name)

    @pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is here")
    def test_timm_is_not_installed(self, refuse):
        line = refuse("--model", "timm:resnet18")
        assert "timm:resnet18 needs timm: pip install 'surestep[timm]'" in line

    def test_tensorboard_is_not_installed(self, refuse, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        assert "pip install 'surestep[tensorboard]'" in refuse("--tensorboard")

    def test_json_to_a_folder(self, refuse, tmp_path):
        assert f"cannot write {tmp_path}: it is a folder" in refuse("--json", tmp_path)

    def test_json_below_a_file(self, refuse, digits):
        assert "cannot write" in refuse("--json", digits / "r.json")


class TestConfig:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a: [1\nb", ["not valid YAML", "line 2"]),
            ("epoch: 3\n", ["unknown setting 'epoch'", "did you mean 'epochs'?"]),
            ("3: 4\n", ["unknown setting '3'"]),
            ("- 1\n", ["holds no settings", "method: sat-r2"]),
            ("", ["holds no settings", "method: sat-r2"]),
            ("epochs: 0\n", ["epochs 0", "greater than 0"]),
            ("dataset: {a: 1}\n", ["dataset {'a': 1}", "string"]),
            ("method: [1]\n", ["method", "[1]"]),
            ("method: sat-r9\n", ["unknown method 'sat-r9'", "did you mean 'sat-r3'?"]),
            ("method: sat-r3\nparams: {tua: 1}\n", ["'tua'", "did you mean 'tau'?"]),
            ("params: 3\n", ["params"]),
            ("params: [1]\n", ["params"]),
        ],
    )
    def test_a_wrong_file(self, refused, tmp_path, text, said):
        (tmp_path / "c.yaml").write_text(text)
        line = refused("train", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out")
        assert all(s in line for s in said), line
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("text", ["a: [1\nb", "- 1\n", ""])
    def test_the_file_is_named(self, refused, tmp_path, text):
        (tmp_path / "c.yaml").write_text(text)
        assert str(tmp_path / "c.yaml") in refused("train", "--config", tmp_path / "c.yaml")

    @pytest.mark.parametrize("text", ["epoch: 3\n", "epochs: 0\n"])
    def test_the_file_of_a_wrong_setting_is_named(self, refused, tmp_path, text):
        (tmp_path / "c.yaml").write_text(text)
        assert str(tmp_path / "c.yaml") in refused("train", "--config", tmp_path / "c.yaml")

    def test_bytes(self, refused, tmp_path):
        (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\0")
        assert "not valid YAML" in refused("train", "--config", tmp_path / "c.yaml")

    def test_no_file(self, refused, tmp_path):
        line = refused("train", "--config", tmp_path / "c.yaml")
        assert f"cannot read {tmp_path / 'c.yaml'}: No such file" in line

    def test_a_folder(self, refused, tmp_path):
        assert f"cannot read {tmp_path}" in refused("train", "--config", tmp_path)


class TestRunFolders:
    @pytest.mark.parametrize(
        "args", [["--epochs", "9"], ["--param", "lam=1"], ["--out", "x"], ["--overwrite"]]
    )
    def test_resume_takes_no_other_option(self, refused, run, tools, args):
        before = tools.contents(run)
        line = refused("train", "--resume", run, *args)
        assert f"--resume takes its settings from {run}/config.yaml" in line
        assert f"leave out {args[0]}, or start a new run with --config" in line
        assert tools.contents(run) == before

    @pytest.mark.parametrize("kind", ["missing", "empty", "file"])
    @pytest.mark.parametrize("command", [["train", "--resume"], ["evaluate"]])
    def test_no_run_folder(self, refused, tmp_path, command, kind):
        place = tmp_path / kind
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        assert f"{place} is not a run folder: it has no config.yaml" in refused(*command, place)
        assert sorted(tmp_path.rglob("*")) == [tmp_path / "empty", tmp_path / "file"]

    def test_an_existing_run(self, refused, run, small, tools):
        before = tools.contents(run)
        line = refused("train", *small, "--out", run)
        for said in (f"{run} exists already", "another --out", "--resume", "--overwrite"):
            assert said in line
        assert tools.contents(run) == before

    @pytest.mark.parametrize("options", [[], ["--overwrite"]])
    def test_a_folder_that_is_no_run(self, refused, small, tmp_path, options):
        (tmp_path / "thesis.tex").write_text("dear")
        line = refused("train", *small, "--out", tmp_path, *options)
        assert str(tmp_path) in line
        assert [p.read_text() for p in tmp_path.iterdir()] == ["dear"]

    def test_overwrite_of_nothing(self, refused, small):
        for args in (("train", *small), ("demo",)):
            assert "--overwrite needs a folder to replace: give --out" in refused(
                *args, "--overwrite"
            )

    def test_a_file(self, refused, small, tmp_path):
        (tmp_path / "model.py").write_text("dear")
        assert "exists already" in refused("train", *small, "--out", tmp_path / "model.py")
        assert (tmp_path / "model.py").read_text() == "dear"

    def test_overwrite_of_a_file(self, refused, small, tmp_path):
        (tmp_path / "model.py").write_text("dear")
        refused("train", *small, "--out", tmp_path / "model.py", "--overwrite", "--epochs", "1")
        assert (tmp_path / "model.py").read_text() == "dear"

    def test_a_name_that_is_too_long(self, refused, small, tmp_path):
        assert "File name too long" in refused("train", *small, "--out", tmp_path / ("x" * 300))

    def test_a_run_that_goes_on_elsewhere(self, refused, run, small, tools):
        before = tools.contents(run)
        with RunFolder(run).held():
            for args in (["--resume", run], [*small, "--out", run, "--overwrite"]):
                line = refused("train", *args)
                assert f"{run} is being trained by another process" in line
        assert tools.contents(run) == before

    def test_a_link_is_not_overwritten(self, refused, run, small, tmp_path):
        (tmp_path / "link").symlink_to(run)
        line = refused("train", *small, "--out", tmp_path / "link", "--overwrite")
        assert "it is a link, and what it leads to is not deleted" in line
        assert (run / "model.safetensors").is_file()

    def test_a_place_below_a_file(self, refused, small, digits):
        line = refused("train", *small, "--out", digits / "run")
        assert f"cannot make the run folder {digits / 'run'}" in line

    @pytest.mark.parametrize(
        "args",
        [
            ["--eps", "2"],
            ["--device", "nonsense"],
            ["--param", "lam=-1"],
            ["--model", "lenet"],
            ["--data", "missing.npz"],
            (["--val-attacks", "fgms"]),
        ],
    )
    def test_overwrite_keeps_the_old_run_on_a_mistake(self, cli, run, small, tools, args):
        before = tools.contents(run)
        assert cli("train", *small, "--out", run, "--overwrite", "--quiet", *args).code == 2
        assert tools.contents(run) == before

    def test_a_run_from_python(self, refused, run):
        (run / "config.yaml").write_text("method: sat-r2\nepochs: 2\n")
        line = refused("train", "--resume", run)
        assert "trained from Python" in line
        assert "surestep.fit(..., resume=True)" in line
        (run / "config.yaml").write_text("method: sat-r2\nbounds: [0.0, 1.0]\n")
        assert "trained from Python" in refused("train", "--config", run / "config.yaml")


class TestEvaluation:
    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["--n", "0"], ["--n", "0 is not in the range x>=1"]),
            (["--n", "x"], ["--n", "'x'"]),
            (["--batch-size", "0"], ["--batch-size", "x>=1"]),
            (["--attacks", ""], ["no attack given", "fgsm[-LOSS], r-fgsm"]),
            (["--attacks", " , "], ["no attack given", "fgsm[-LOSS], r-fgsm"]),
            (["--attacks", "fgms"], ["'fgms'", ATTACKS]),
            (["--attacks", "fgsm,pgd"], ["'pgd'", ATTACKS]),
            (["--attacks", "pgd-0"], ["'pgd-0'", ATTACKS]),
            (["--attacks", "pgd-5-kl"], ["'pgd-5-kl'", "LOSS ce, margin or dlr"]),
            (["--eps", "2"], ["eps 2", "8/255"]),
            (["--eps", "-1"], ["eps '-1'"]),
            (["--eps", "abc"], ["eps 'abc'", "number"]),
            (["--device", "nonsense"], ["device 'nonsense'"]),
            (["--seed", "9" * 30], ["seed"]),
        ],
    )
    def test_a_wrong_value(self, refused, finished, args, said):
        line = refused("evaluate", finished, *args)
        assert all(s in line for s in said), line

    def test_no_weights_yet(self, refused, run):
        (run / "model.safetensors").unlink()
        assert f"{run} has no weights yet: continue it with --resume {run}" in refused(
            "evaluate", run
        )

    @pytest.mark.parametrize("left", [0, 7, 1000, -1000])
    def test_truncated_weights(self, refused, run, left):
        path = run / "model.safetensors"
        path.write_bytes(path.read_bytes()[:left])
        assert f"{path} is truncated, corrupt or not a safetensors file" in refused("evaluate", run)

    @pytest.mark.parametrize(
        ("name", "classes", "said"),
        [("lenet+", 10, "missing body.2.bias"), ("cnn-small", 7, "head.bias has shape (7,)")],
    )
    def test_weights_of_another_model(self, refused, run, name, classes, said):
        path = run / "model.safetensors"
        safetensors.torch.save_file(models.create(name, classes).state_dict(), path)
        line = refused("evaluate", run)
        assert f"{path} does not fit the model" in line
        assert said in line

    @pytest.mark.parametrize(
        ("text", "said"),
        [("nonsense", "holds no settings"), ("model: x\ndataset: y\nextra: 1\n", "'extra'")],
    )
    def test_a_damaged_configuration(self, refused, run, text, said):
        (run / "config.yaml").write_text(text)
        line = refused("evaluate", run)
        assert said in line
        assert str(run / "config.yaml") in line

    def test_the_data_are_gone(self, refused, run, digits):
        text = (run / "config.yaml").read_text().replace(str(digits), "gone.npz")
        (run / "config.yaml").write_text(text)
        assert "gone.npz does not exist" in refused("evaluate", run)

    def test_json_to_a_folder(self, refused, finished, tmp_path):
        line = refused("evaluate", finished, "--json", tmp_path)
        assert f"cannot write {tmp_path}: it is a folder" in line

    @pytest.mark.parametrize("command", [["methods"], ["env"]])
    def test_json_to_a_folder_elsewhere(self, refused, tmp_path, command):
        assert f"cannot write {tmp_path}" in refused(*command, "--json", tmp_path)


class TestData:
    @pytest.fixture
    def refuse(self, refused, tmp_path):
        """Train LeNet+ on arrays that will not do, or on a file; return the error's line."""

        def train(*args, **arrays):
            path = tmp_path / "a.npz"
            if arrays:
                np.savez(path, **arrays)
            where = ("--dataset", "npz", "--data", path) if "--dataset" not in args else ()
            where = (*where, "--eps", "0.3", "--preset", "none")
            options = ("--batch-size", "8", "--epochs", "1", "--val-attacks", "fgsm", "--quiet")
            return refused("train", *where, *args, *options, "--out", tmp_path / "out")

        return train

    X = np.random.default_rng(0).random((40, 28, 28), dtype=np.float32)
    Y = np.arange(40) % 3

    @pytest.mark.parametrize(
        ("x", "y", "said"),
        [
            (np.zeros((40, 30, 30), np.float32), Y, ["lenet+", "30", "multiple of 4"]),
            (X[:, :, :20], Y, ["lenet+", "(N, 1, 28, 20)", "square"]),
            (X.reshape(40, -1), Y, ["shape (784,)", "surestep.fit with your own model"]),
            (X * 3 - 1, Y, ["from -", "[0, 1]", "undo the normalisation"]),
            (X * 255, Y, ["to 255", "divide x by 255"]),
            (X * 1.5, Y, ["to 1.5", "scale x"]),
            (X * np.nan, Y, ["NaN", "[0, 1]"]),
            (X, Y - 2, ["label -2", "start at 0"]),
            (X, Y - 1, ["labels from -1", "only training with uat takes -1"]),
            (X, Y + 2_000_000_000, ["label 2000000002", "not a class number"]),
            (X, Y.astype(np.float32), ["y has dtype float32", "integers"]),
            (X, Y[:9], ["40 images", "9 labels"]),
            (X[:0], Y[:0], ["empty"]),
        ],
        ids=lambda v: v[-1] if isinstance(v, list) else "",
    )
    def test_arrays_that_will_not_do(self, refuse, tmp_path, x, y, said):
        line = refuse(x=x, y=y)
        assert all(s in line for s in said), line
        assert not list((tmp_path / "out").glob("*"))

    def test_labels_out_of_range(self, refuse):
        x, y = self.X, self.Y
        parts = {"x_train": x, "y_train": y, "x_val": x, "y_val": y + 4, "x_test": x, "y_test": y}
        line = refuse(**parts)
        assert "labels" in line
        assert "3 classes" in line

    def test_an_array_is_missing(self, refuse):
        assert "no array 'y': it has x" in refuse(x=self.X)

    def test_no_file(self, refuse, tmp_path):
        assert f"{tmp_path / 'a.npz'} does not exist" in refuse()

    @pytest.mark.parametrize("content", [b"", b"hello", "half"])
    def test_a_damaged_file(self, refuse, tmp_path, digits, content):
        whole = digits.read_bytes()
        content = whole[: len(whole) // 2] if content == "half" else content
        (tmp_path / "a.npz").write_bytes(content)
        line = refuse()
        assert f"{tmp_path / 'a.npz'} cannot be read" in line
        assert "numpy.savez" in line

    @pytest.mark.parametrize("name", ["npz", "folder", "hf"])
    def test_no_place_given(self, refuse, name):
        assert f"{name!r} needs " in refuse("--dataset", name)

    def test_cifar_without_network(self, refuse, tmp_path):
        place = tmp_path / "empty"
        place.mkdir()
        line = refuse("--dataset", "cifar10", "--data", place)
        said = ("cifar-10-batches-bin", "no connection to https", "cifar-10-binary.tar.gz")
        assert all(s in line for s in (*said, f"into {place} by hand")), line
        assert not list(place.iterdir())

    def test_cifar_with_the_test_file_only(self, refuse, tmp_path):
        place = tmp_path / "some"
        place.mkdir()
        (place / "test_batch.bin").write_bytes(bytes(3073))
        line = refuse("--dataset", "cifar10", "--data", place)
        assert f"{place} has no train files: put data_batch_1.bin..5.bin into {place}" in line


class TestDivergence:
    def test_at_the_start(self, refused, small, tmp_path):
        line = refused(
            *("train", *small, "--engine", "reference", "--lr", "1e30", "--quiet"),
            *("--out", tmp_path / "out"),
        )
        assert "the loss became NaN or infinite at step 2 (epoch 1)" in line
        assert "no checkpoint was written yet: begin a new run with a lower lr (1e+30)" in line

    def test_later_names_the_last_good_checkpoint(self, refused, small, tmp_path, monkeypatch):
        from surestep.training import TrainStep

        take, steps = TrainStep.__call__, []

        def step(self, *batch):
            result = take(self, *batch)
            steps.append(1)
            return result._replace(loss=result.loss * float("nan" if len(steps) == 13 else 1))

        monkeypatch.setattr(TrainStep, "__call__", step)
        line = refused("train", *small, "--quiet", "--out", tmp_path / "out")
        assert "at step 13 (epoch 2)" in line
        kept = tmp_path / "out" / "checkpoints" / "step-00000009.safetensors"
        assert f"last good checkpoint: {kept}" in line
        assert kept.is_file()


class TestOurs:
    def test_an_unexpected_failure(self, cli, small, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("boom")

        monkeypatch.setattr("surestep.runs.resolve", fail)
        code, out, err = cli("train", *small)
        assert (code, out) == (1, "")
        assert err.startswith("Traceback (most recent call last):")
        assert "RuntimeError: boom\n" in err
        last = err.splitlines()[-1]
        assert last.startswith("surestep: error: ")
        assert "please report it with the output of `surestep env`" in last

    def test_a_message_of_several_lines_becomes_one(self, refused, small, monkeypatch):
        from surestep import UserError

        def fail(*_, **__):
            raise UserError("one\n  two\n\nthree")

        monkeypatch.setattr("surestep.runs.resolve", fail)
        assert refused("train", *small) == "surestep: error: one two three\n"

    def test_a_full_disk_for_the_result(self, refused, finished, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        place = tmp_path / "r.json"
        place.write_text("the last result")
        line = refused("evaluate", finished, "--attacks", "fgsm", "--n", "10", "--json", place)
        assert f"no space left to write {place}" in line
        assert place.read_text() == "the last result"
        assert list(tmp_path.iterdir()) == [place]

    def test_json_through_a_link(self, done, finished, tmp_path):
        """As /dev/stdout is one, to whatever the shell put there."""
        place, link = tmp_path / "r.json", tmp_path / "latest.json"
        place.write_text("the last result")
        link.symlink_to(place)
        done("evaluate", finished, "--attacks", "fgsm", "--n", "5", "--json", link)
        assert link.is_symlink()
        assert json.loads(place.read_text())["n"] == 5

    def test_json_to_what_is_no_file(self, done, finished):
        """Which cannot be replaced, only written to."""
        done("evaluate", finished, "--attacks", "fgsm", "--n", "5", "--json", "/dev/null")
        assert Path("/dev/null").is_char_device()

    def interrupt(self, cli, small, tmp_path, monkeypatch):
        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("surestep.runs.train", stop)
        return cli("train", *small, "--out", tmp_path / "out")

    def test_control_c(self, cli, small, tmp_path, monkeypatch):
        code, out, err = self.interrupt(cli, small, tmp_path, monkeypatch)
        assert (code, out) == (130, "")
        assert "Traceback" not in err
        assert "stopped" in err

    def test_control_c_of_an_evaluation(self, cli, finished, monkeypatch):
        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(surestep, "evaluate", stop)
        code, _, err = cli("evaluate", finished)
        assert code == 130
        assert err.strip().startswith("stopped; an evaluation with --state FILE")

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (("run",), "stopped; a comparison of run folders keeps its results only with --out\n"),
            (("run", "--out=x"), "stopped; rerun with the same --out to continue\n"),
            (("--methods", "fgsm"), "stopped; rerun with the same --out to continue\n"),
        ],
    )
    def test_control_c_of_a_comparison(self, cli, tmp_path, monkeypatch, args, said):
        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.chdir(tmp_path)
        for name in ("compare", "compare_runs"):
            monkeypatch.setattr(comparing, name, stop)
        code, _, err = cli("compare", *args)
        assert code == 130
        assert err.lstrip() == said

    def test_control_c_says_how_to_go_on(self, cli, small, tmp_path, monkeypatch):
        assert "--resume" in self.interrupt(cli, small, tmp_path, monkeypatch).err

    @pytest.mark.parametrize(
        "args", [("methods",), ("methods", "--json", "-"), ("--help",), ("train", "--help")]
    )
    def test_a_reader_that_leaves(self, process, args):
        """As in `surestep methods | head`: no complaint, and no fault of ours."""
        read, write = os.pipe()
        os.close(read)
        try:
            ended = process(*args, capture_output=False, stdout=write, stderr=subprocess.PIPE)
        finally:
            os.close(write)
        assert ended.stderr == ""
        assert ended.returncode == 141

    def test_a_reader_that_leaves_costs_no_result(self, process, finished, tmp_path):
        """As in `surestep evaluate RUN --json FILE | less`, left before the end."""
        read, write = os.pipe()
        os.close(read)
        args = (finished, "--attacks", "fgsm", "--n", "20", "--json", tmp_path / "r.json")
        try:
            process("evaluate", *args, capture_output=False, stdout=write, stderr=subprocess.PIPE)
        finally:
            os.close(write)
        assert json.loads((tmp_path / "r.json").read_text())["n"] == 20

    def test_a_result_is_written_before_it_is_shown_and_shown_in_any_case(self, tmp_path):
        file, seen = tmp_path / "r.json", []

        def leave() -> None:
            seen.append(json.loads(file.read_text()))
            raise SystemExit(1)

        with pytest.raises(SystemExit):
            hand_over({"n": 3}, str(file), leave)
        assert seen == [{"n": 3}]

        def full() -> None:
            raise UserError("cannot write the report")

        with pytest.raises(UserError, match="the report"):
            hand_over({}, str(file), partial(seen.append, "shown"), full)
        assert seen[1:] == ["shown"]
        hand_over({}, "-", partial(seen.append, "twice"))
        assert seen[1:] == ["shown"]
