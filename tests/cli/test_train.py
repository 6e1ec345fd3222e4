"""From the command to the run folder, and back."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from surestep.config import FitSettings, RunConfig
from surestep.errors import SurestepWarning, UserError

WEIGHTS = "model.safetensors"


class TestRunFolder:
    def test_what_it_holds(self, finished):
        names = {p.name for p in finished.iterdir()}
        names.discard("report.html")  # an extra; see test_report.py
        written = {"config.yaml", "environment.json", "metrics.jsonl", WEIGHTS, "checkpoints"}
        assert names == written
        facts = json.loads((finished / "environment.json").read_text("utf-8"))
        assert facts["torch"] == importlib.metadata.version("torch")
        assert facts["torch threads"] == torch.get_num_threads()
        checkpoints = sorted(p.name for p in (finished / "checkpoints").iterdir())
        assert checkpoints == ["step-00000009.safetensors", "step-00000018.safetensors"]

    def test_a_row_an_epoch(self, finished, tools):
        rows = tools.rows(finished)
        assert [(r["epoch"], r["step"]) for r in rows] == [(1, 9), (2, 18)]
        expected = {"loss", "ce", "hinge", "val_n", "val_clean", "val_fgsm", "val_worst_case"}
        assert all(expected <= r.keys() for r in rows)
        assert all(r["val_n"] == 100 for r in rows)

    def test_the_configuration_is_resolved(self, finished, digits):
        config = yaml.safe_load((finished / "config.yaml").read_text("utf-8"))
        assert config.keys() == RunConfig.model_fields.keys()
        assert config["data"] == str(digits)
        assert config["val_attacks"] == ["fgsm", "pgd-2"]
        assert config["params"].keys() == {
            *("lam", "tau", "alpha", "eps_low", "project", "per_sample", "fraction"),
            *("every", "perturbation"),
        }
        assert config["params"]["eps_low"] == pytest.approx(0.1)


class TestAgain:
    def test_a_configuration_makes_the_same_run(self, done, finished, tmp_path, tools):
        out = tmp_path / "other"
        done("train", "--config", finished / "config.yaml", "--out", out, "--quiet")
        assert (out / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
        assert (out / "config.yaml").read_bytes() == (finished / "config.yaml").read_bytes()
        assert tools.rows(out) == tools.rows(finished)

    def test_another_seed_makes_another(self, done, finished, tmp_path):
        out = tmp_path / "other"
        config = finished / "config.yaml"
        done("train", "--config", config, "--seed", "1", "--out", out, "--quiet")
        assert (out / WEIGHTS).read_bytes() != (finished / WEIGHTS).read_bytes()

    def test_a_finished_run_resumes_to_itself(self, done, run, tools):
        # The report names the command that made it.
        (run / "report.html").unlink(missing_ok=True)
        before = tools.contents(run)
        assert f"surestep evaluate {run}" in done("train", "--resume", run)
        (run / "report.html").unlink(missing_ok=True)
        assert tools.contents(run) == before

    def test_overwrite_replaces_the_whole_run(self, done, run, small, finished):
        (run / "checkpoints" / "old").touch()
        done("train", "--method", "sat-r3", *small, "--out", run, "--overwrite", "--quiet")
        assert not (run / "checkpoints" / "old").exists()
        assert (run / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()

    def test_killed_and_resumed(self, done, small, tmp_path, tools):
        """SIGKILL at the first checkpoint, within an epoch: bit for bit the same in the end."""
        out, whole = tmp_path / "killed", tmp_path / "whole"
        args = ["train", "--method", "sat-r2", *small, "--epochs", "3", "--checkpoint-every", "2"]
        with subprocess.Popen(
            [sys.executable, "-m", "surestep", *args, "--out", out],
            env=tools.environment(),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ) as process:
            end = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < end:
                if list(out.glob("checkpoints/step-*.safetensors")):
                    break
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -signal.SIGKILL, "it must be killed, not done"
        assert not (out / "metrics.jsonl").exists() or len(tools.rows(out)) < 3
        done("train", "--resume", out, "--quiet")
        done("train", "--config", out / "config.yaml", "--out", whole, "--quiet")
        assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
        assert tools.rows(out) == tools.rows(whole)
        assert {p.name for p in out.rglob("*")} == {p.name for p in whole.rglob("*")}

    def test_terminated_and_resumed(self, done, small, tmp_path, tools):
        """As a cluster does it: SIGTERM, and some seconds later the end."""
        arguments, out = [*small, "--epochs", "40"], tmp_path / "out"
        command = [sys.executable, "-m", "surestep", "train", *map(str, arguments), "--out", out]
        with subprocess.Popen(
            command, env=tools.environment(), stderr=subprocess.PIPE, text=True
        ) as process:
            end = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < end:
                if (out / "metrics.jsonl").is_file():
                    break
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 143
        assert f"{out} is saved" in said
        assert said.strip().splitlines()[-1].startswith("stopped; continue a run with")
        newest = max((out / "checkpoints").iterdir()).stem
        assert 9 <= int(newest.removeprefix("step-")) < 360
        assert len(tools.rows(out)) < 40
        config = out / "config.yaml"
        config.write_text(config.read_text().replace("epochs: 40", "epochs: 2"))
        told = done("train", "--resume", out)
        assert f"surestep evaluate {out}" in told


class TestSettings:
    @pytest.fixture
    def config(self, monkeypatch, cli, tmp_path):
        """Return the configuration a command line comes to, without training."""
        seen = []

        class Done(Exception):
            pass

        def train(config, out, **_):
            seen.append((config, out))
            raise Done

        monkeypatch.setattr("surestep.runs.train", train)
        monkeypatch.chdir(tmp_path)

        def resolve(*args):
            cli("train", *args)
            return seen.pop()

        return resolve

    def test_preset_config_and_command_line(self, config, tmp_path):
        (tmp_path / "c.yaml").write_text("epochs: 3\nlr: 0.3\nparams: {lam: 2, alpha: 0.02}\n")
        args = ("--preset", "mnist", "--config", "c.yaml", "--lr", "0.4", "--param", "lam=7")
        found, _ = config(*args)
        assert (found.batch_size, found.schedule) == (32, "step"), "the preset's"
        assert (found.epochs, found.params["alpha"]) == (3, 0.02), "the file's"
        assert (found.lr, found.params["lam"]) == (0.4, 7), "the command line's"
        assert found.momentum == 0.9, "the default"

    def test_a_file_takes_no_preset_by_itself(self, config, tmp_path):
        (tmp_path / "c.yaml").write_text("method: sat-r2\ndataset: mnist\n")
        assert config("--config", "c.yaml")[0].epochs == RunConfig.model_fields["epochs"].default

    def test_a_files_lengths_follow_eps(self, config, tmp_path):
        """As a preset's do: the step of a run's config.yaml is one of its radius."""
        file = "method: sat-r3\neps: 8/255\nparams: {alpha: 2/255, eps_low: 4/255, lam: 3}\n"
        (tmp_path / "c.yaml").write_text(file)
        args = ("--config", "c.yaml", "--param", "eps_low=1/255")
        found, _ = config(*args, "--eps", "16/255")
        assert found.params == pytest.approx({"alpha": 4 / 255, "eps_low": 1 / 255, "lam": 3})
        same, _ = config(*args)
        assert same.params == {"alpha": 2 / 255, "eps_low": 1 / 255, "lam": 3}

    @pytest.mark.parametrize(
        ("args", "name", "value"),
        [
            (("--eps", "8/255"), "eps", 8 / 255),
            (("--eps", "0"), "eps", 0),
            (("--val-attacks", "fgsm,pgd-2x3"), "val_attacks", ("fgsm", "pgd-2x3")),
            pytest.param(
                *(("--val-attacks", "fgsm, pgd-2"), "val_attacks", ("fgsm", "pgd-2")),
            ),
            (("--no-normalize",), "normalize", False),
            (("--ema", "none"), "ema", None),
            (("--batch-size", "7"), "batch_size", 7),
            (("--param", "eps-low=2/255"), "params", {"eps_low": 2 / 255}),
            (("--param", "lam=1", "--param", "project=true"), "params", {"lam": 1, "project": 1}),
            (("--param", "eps_low=null"), "params", {"eps_low": None}),
            (("--param", "lam=010"), "params", {"lam": 10}),
        ],
    )
    def test_values(self, config, args, name, value):
        found, _ = config("--method", "sat-r3", "--preset", "none", *args)
        assert getattr(found, name) == value

    def test_the_folder_by_default(self, config, tmp_path):
        day = time.strftime("%Y%m%d")
        for number in ("", "-2", "-3"):
            _, out = config(
                *("--method", "sat-r1", "--dataset", f"npz:{tmp_path}/a.npz", "--eps", "0.3")
            )
            assert out == f"runs/{day}-sat-r1-npz{number}"
            Path(out).mkdir(parents=True)

    def test_every_setting_of_fit_is_an_option(self, done):
        text = done("train", "--help")
        assert all(f"--{name.replace('_', '-')}" in text for name in FitSettings.model_fields)


class TestWhatItSays:
    def test_where_the_run_is_and_what_next(self, done, small, tmp_path):
        out = tmp_path / "run"
        text = done("train", *small, "--epochs", "1", "--out", out)
        assert text.startswith(f"{out}: epoch 1 selected, worst case ")
        assert re.search(r"% \(\d+\.\d-\d+\.\d\) of 100 held-out images", text)
        assert text.endswith(f"surestep evaluate {out} --budget quick\n")

    def test_progress_is_on_stderr(self, cli, small, tmp_path):
        result = cli("train", *small, "--epochs", "1", "--out", tmp_path / "run", "--json", "-")
        assert result.err.startswith("epoch 1/1  loss ")
        assert json.loads(result.out)["run"] == str(tmp_path / "run")

    def test_quiet(self, cli, small, tmp_path):
        args = ("--epochs", "1", "--quiet", "--json", tmp_path / "new" / "r.json")
        assert cli("train", *small, *args, "--out", tmp_path / "run") == (0, "", "")
        result = json.loads((tmp_path / "new" / "r.json").read_text())
        assert result["method"] == "sat-r2"
        assert result["best_epoch"] == 1
        assert result["train_seconds"] > 0
        assert result["validation"]["val_n"] == 100

    def test_mnist_with_its_preset(self, done, few_digits, tmp_path):
        """The embedded data set by name; the recipe of its name comes with it."""
        out = tmp_path / "run"
        args = ("--epochs", "0.1", "--batch-size", "50", "--val-images", "0", "--quiet")
        done("train", "--method", "sat-r3", "--dataset", "mnist", *args, "--out", out)
        config = yaml.safe_load((out / "config.yaml").read_text("utf-8"))
        assert (config["schedule"], config["lr"]) == ("step", 0.05)
        assert config["params"]["eps_low"] == 0.1

    @pytest.mark.filterwarnings("always")
    @pytest.mark.parametrize(
        ("variables", "warns"),
        [
            ({"RANK": "0", "LOCAL_RANK": "0"}, True),
            ({"RANK": "1", "LOCAL_RANK": "1"}, False),
            ({"RANK": "1", "WORLD_SIZE": "2"}, False),
            ({"RANK": "1"}, True),
        ],
    )
    def test_of_several_processes_only_the_first_warns(self, cli, monkeypatch, variables, warns):
        """A RANK alone, such as a job's of an array, is no launcher's."""

        def read(_):
            warnings.warn("mind this", SurestepWarning, stacklevel=1)
            raise UserError("no such run")

        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("surestep.runs.read_config", read)
        err = cli("train", "--resume", "run").err
        assert ("surestep: warning: mind this\n" in err) == warns
        assert "surestep: error: no such run\n" in err

    @pytest.mark.slow
    def test_of_several_processes_only_the_first_prints(self, small, tmp_path, tools):
        script = tmp_path / "script.py"  # `surestep`, without a report, which takes longer than all
        script.write_text(
            "import importlib\n"
            "importlib.import_module('surestep.cli.train')._report = lambda *_: None\n"
            "importlib.import_module('surestep.cli').main()\n"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", "2", script, "train", *small, "--method", "standard"]
        quick = ["--epochs", "0.3", "--val-images", "0", "--engine", "reference"]
        done = subprocess.run(
            [*command, *quick, "--out", tmp_path / "run", "--json", "-"],
            env=tools.environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["run"] == str(tmp_path / "run")


class TestFullDisk:
    @pytest.mark.parametrize(
        "name", ["metrics.jsonl", WEIGHTS, "step-00000009.safetensors", "step-00000018.safetensors"]
    )
    def test_it_goes_on_once_there_is_room(
        self, done, cli, small, tmp_path, finished, monkeypatch, name
    ):
        out, replace = tmp_path / "run", os.replace

        def full(source, target):
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            code, _, err = cli("train", "--method", "sat-r3", *small, "--out", out, "--quiet")
        assert code == 2
        assert err.startswith("surestep: error: no space left to write ")
        assert name in err
        assert "--resume" in err
        assert err.count("\n") == 1
        assert not list(out.rglob(".*")), "a part is left"
        done("train", "--resume", out, "--quiet")
        assert (out / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


@pytest.mark.parametrize("model", [(), ("--model", "cnn-small", "--lr", "0.1")])
def test_data_without_a_recipe_are_told(cli, digits, tmp_path, model):
    args = ("--dataset", "npz", "--data", digits, "--eps", "0.3", "--epochs", "1", "--quiet")
    place = ("--out", tmp_path / "run", "--json", tmp_path / "r.json", "--val-images", "20")
    found = cli("train", "--method", "sat-r3", *args, *place, *model)
    assert found.code == 0
    told = "sat-r3 has no preset for npz, using defaults, most of them meant for MNIST: "
    told += "model lenet+, lr 0.1, lam 1, tau"
    assert (told in found.err) == (not model)
    assert ("alpha 0.01, " in found.err) == (not model)
    assert ("cifar10 for colour images" in found.err) == (not model)
    assert json.loads((tmp_path / "r.json").read_text())["collapsed_epochs"] in ([], [1])


def test_going_on_elsewhere_is_told(cli, run):
    path = run / "environment.json"
    before = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**before, "torch": "2.4.0", "platform": "another"}), "utf-8")
    given = ("--max-memory", "8", "--checkpoint-every", "3")
    err = cli("train", "--resume", run, *given).err
    assert "max_memory none then, 8.0 now; results may differ from an uninterrupted run's\n" in err
    assert "checkpoint_every none then, 3 now\n" in err
    assert yaml.safe_load((run / "config.yaml").read_text("utf-8"))["max_memory"] is None
    assert f"the last digits: torch 2.4.0 then, {before['torch']} now" in err
    assert "another" not in err
    path.unlink()  # a run of an older version
    assert "last digits" not in cli("train", "--resume", run).err
    assert json.loads(path.read_text("utf-8")) == before


def test_a_model_of_ones_own(done, refused, digits, tmp_path, monkeypatch):
    """Trained by the name of the function that makes it; judged from any folder."""
    (tmp_path / "net.py").write_text(
        "import sys\n"
        "sys.path.insert(0, 'elsewhere')\n"
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))\n"
        "def few():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    data = ("--dataset", "npz", "--data", digits, "--eps", "0.3", "--val-images", "0")
    data += ("--lr", "0.1")
    train = ("train", "--method", "sat-r2", *data, "--epochs", "1", "--out", tmp_path / "run")
    done(*train, "--model", "net.py:make", "--quiet")
    assert sys.path == ["elsewhere", *path]
    sys.path.remove("elsewhere")
    monkeypatch.chdir(tmp_path / "run")
    judged = ("evaluate", tmp_path / "run", "--attacks", "fgsm", "--n", "20", "--json", "-")
    assert json.loads(done(*judged))["n"] == 20
    again = ("train", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again")
    done(*again, "--quiet")
    one, other = (tmp_path / name / "model.safetensors" for name in ("run", "again"))
    assert one.read_bytes() == other.read_bytes()
    other = (*train[:-1], tmp_path / "other", "--model")
    assert "labels from 0 to 9, but the model has 3" in refused(*other, f"{tmp_path}/net.py:few")
    assert "has no 'none': it has make, few" in refused(*other, f"{tmp_path}/net.py:none")
    assert "no.py does not exist" in refused(*other, f"{tmp_path}/no.py:make")
    assert "unknown model 'lenet'" in refused(*other, "lenet")
    assert not (tmp_path / "other").exists()
