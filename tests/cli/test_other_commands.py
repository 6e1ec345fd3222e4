"""Help, methods, env, the script, and the demo."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import surestep
from surestep import UserError, devices, methods

COMMANDS = ("train", "evaluate", "audit", "compare", "harden", "demo", "methods", "env")
HEAVY = (
    "torch numpy accelerate safetensors torchvision PIL tensorboard timm datasets tabulate altair"
)


class TestHelp:
    @pytest.mark.parametrize("args", [[], *([c] for c in COMMANDS)], ids=" ".join)
    def test_it_imports_no_torch(self, args):
        code = (
            "import sys; from surestep.cli import main; main(sys.argv[1:]);"
            f"print('loaded:', sorted(set(sys.modules) & set('{HEAVY}'.split())))"
        )
        ended = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *args, "--help"],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        assert ended.stdout.startswith("Usage: surestep")
        assert ended.stdout.endswith("loaded: []\n")
        assert ended.stderr == ""

    @pytest.mark.parametrize("flag", ["-h", "--help"])
    def test_the_commands(self, done, flag):
        text = done(flag)
        assert all(f"\n  {command} " in text for command in COMMANDS)
        assert "surestep demo" in text

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_option_is_explained(self, done, name):
        text = done(name, "--help")
        command = getattr(importlib.import_module(f"surestep.cli.{name}"), name)
        options = [p for p in command.params if p.param_type_name == "option"]
        assert options
        for option in options:
            assert f"  {option.opts[0]}" in text
            assert option.help, option.name
            assert option.help.rstrip("]")[-1] in ".)" or "[default" in option.help

    @pytest.mark.parametrize("name", COMMANDS)
    def test_the_list_says_what_the_command_says(self, done, name):
        command = getattr(importlib.import_module(f"surestep.cli.{name}"), name)
        assert f"{command.short_help}\n" in done("--help")

    def test_version(self, done):
        assert done("--version") == f"surestep, version {surestep.__version__}\n"


class TestMethods:
    def test_all_are_listed(self, done):
        first = {line.split()[0] for line in done("methods").splitlines() if line.strip()}
        assert set(methods.names()) <= first

    def test_json(self, done):
        rows = json.loads(done("methods", "--json", "-"))
        assert sorted(r["name"] for r in rows) == methods.names()
        assert [r["passes"] for r in rows] == sorted(r["passes"] for r in rows)
        by_name = {r["name"]: r for r in rows}
        assert by_name["standard"]["passes"] == 3
        assert by_name["sat-r3"]["passes"] == 8
        assert "mnist" in by_name["sat-r3"]["presets"]
        assert all(r["summary"] and r["paper"] for r in rows)

    @pytest.mark.parametrize("name", methods.names())
    def test_the_card_of_one(self, done, name):
        shown = done("methods", name)
        assert shown.startswith(methods.card(name).rstrip())
        assert shown.startswith("# ")
        told = shown.removeprefix(methods.card(name).rstrip())
        for preset, recipe in methods.get(name).presets.items():
            assert re.search(rf"{preset} +{re.escape(recipe.model)} +{recipe.eps:.4g} ", told)

    def test_the_card_as_json(self, done, tmp_path):
        shown = done("methods", "sat-r3", "--json", tmp_path / "card.json")
        assert shown.startswith(methods.card("sat-r3").rstrip())
        found = json.loads((tmp_path / "card.json").read_text("utf-8"))
        assert (found["name"], found["card"]) == ("sat-r3", methods.card("sat-r3"))
        assert found["presets"].keys() == methods.get("sat-r3").presets.keys()
        assert found["presets"]["mnist"]["settings"]["epochs"] == 20


class TestEnv:
    def test_json(self, done):
        facts = json.loads(done("env", "--json", "-"))
        assert facts["surestep"] == surestep.__version__
        assert facts["torch"] == torch.__version__
        assert facts["torch threads"] == torch.get_num_threads()
        assert {"python", "platform", "cores", "device", "engine", "accelerate"} <= facts.keys()

    def test_text(self, done):
        lines = dict(line.split(maxsplit=1) for line in done("env").splitlines())
        assert lines["surestep"] == surestep.__version__
        assert lines["torch"]

    def test_a_device_that_fails_is_a_fact(self, done, monkeypatch):
        def fails(name=None):
            raise UserError("device 'cuda' cannot be used here (no kernel image)")

        monkeypatch.setattr(devices, "pick_device", fails)
        facts = json.loads(done("env", "--json", "-"))
        assert "no kernel image" in facts["device"]
        assert facts["torch"] == torch.__version__


class TestProcess:
    """The real thing: what a shell sees."""

    def test_the_script(self):
        script = Path(sysconfig.get_path("scripts")) / "surestep"
        if not script.exists():
            pytest.skip("surestep is not installed as a script")
        ended = subprocess.run(
            [script, "--version"], capture_output=True, text=True, check=False, timeout=300
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        assert surestep.__version__ in ended.stdout

    def test_exit_codes_and_streams(self, process):
        ended = process("train", "--method", "sat-r9")
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("surestep: error: unknown method 'sat-r9'")
        assert ended.stderr.count("\n") == 1

    def test_a_result(self, process, finished):
        ended = process("evaluate", finished, "--attacks", "fgsm", "--n", "10", "--json", "-")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert json.loads(ended.stdout)["n"] == 10


# Clean, under FGSM, worst case.
MASKED, ROBUST, CHANCE = (0.98, 0.97, 0.02), (0.98, 0.9, 0.8), (0.11, 0.11, 0.11)
WEAK = (0.98, 0.88, 0.65)


@pytest.fixture(scope="module")
def audited():
    """What an audit found once: two of each demo take seconds."""
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)), torch.rand(4, 16)
    threat = surestep.Linf(0.3)
    return surestep.audit(net, (x, net(x).argmax(1)), threat, budget="quick")


class TestDemo:
    @pytest.fixture
    def tiny(self, few_digits, monkeypatch):
        """Make the demo a matter of a second: few images, small network, one epoch."""
        from surestep import runs

        resolve, configs = runs.resolve, []

        def small(*args):
            config = resolve(*args)
            configs.append(config)
            change = {"model": "cnn-small", "epochs": 1, "batch_size": 50, "val_images": 0}
            return config.model_copy(update=change)

        monkeypatch.setattr(runs, "resolve", small)
        return configs

    @pytest.fixture
    def brief(self, tiny, audited, monkeypatch):
        """The same, without the audits."""
        monkeypatch.setattr(surestep, "audit", lambda *_, **__: audited)
        return tiny

    @pytest.mark.usefixtures("small_budget")
    def test_table_sentence_and_json(self, cli, tiny, tmp_path):
        code, out, err = cli("demo", "--n", "20", "--json", tmp_path / "demo.json", "--seed", "3")
        assert code == 0, err
        assert "training with fgsm\n" in err
        assert "training with sat-r2\n" in err
        assert "auditing fgsm\n" in err
        found = json.loads((tmp_path / "demo.json").read_text("utf-8"))
        rows = {row.split("│")[1].strip(): row for row in out.splitlines() if "│" in row}
        assert list(found) == ["fgsm", "sat-r2"]
        for result in found.values():
            assert list(result["robust_accuracy"]) == ["fgsm", "pgd-100", "pgd-100-margin"]
            assert (result["n"], result["threat"]["eps"], result["seed"]) == (20, 0.3, 3)
            assert result["train_seconds"] > 0
            assert (result["audit"]["n"], result["audit"]["budget"]) == (20, "quick")
            assert f"{result['audit']['verdict']}, " in rows["audit, 20 images"]
            assert result["audit"]["sentence"] in out
        assert (found["fgsm"]["passes"], found["sat-r2"]["passes"]) == (5, 10)
        for name, key in (("clean", "clean_accuracy"), ("worst case", "worst_case_accuracy")):
            for result in found.values():
                assert f"{result[key]:.1%} (" in rows[name]
        assert {"fgsm", "pgd-100", "pgd-100-margin", "passes per image"} <= rows.keys()
        assert f"keeps {found['sat-r2']['worst_case_accuracy']:.1%}." in out
        assert "s in all)" in out
        assert not list(tmp_path.glob("fgsm*"))

    def test_both_runs_are_alike_but_for_method_length_and_rate(self, done, brief):
        done("demo", "--n", "1", "--json", "-", "--seed", "3")
        one, other = (c.model_dump(exclude={"method", "params", "epochs", "lr"}) for c in brief)
        assert one == other
        assert (one["dataset"], one["eps"], one["seed"]) == ("mnist", 0.3, 3)
        assert [c.method for c in brief] == ["fgsm", "sat-r2"]

    def test_json_on_stdout_is_json_only(self, done, brief):
        assert json.loads(done("demo", "--n", "1", "--json", "-")).keys() == {"fgsm", "sat-r2"}

    def test_a_report_without_pictures(self, done, brief, tmp_path, monkeypatch):
        pytest.importorskip("altair")
        pytest.importorskip("vl_convert")
        monkeypatch.setattr("surestep.cli.demo.of_model", lambda *_: {"classes": None})
        done("demo", "--n", "1", "--html", tmp_path / "demo.html")
        assert "sat-r2" in (tmp_path / "demo.html").read_text("utf-8")

    @pytest.mark.parametrize(
        ("accuracies", "said"),
        [
            (MASKED, "looks robust under the attack it trained on (97.0%), but the stronger "),
            (MASKED, "attacks leave 2.0%: its gradients are masked; SAT-R2, which penalises"),
            (ROBUST, "FGSM training kept 80.0% under the strongest attack this time; SAT-R2,"),
            (CHANCE, "FGSM training failed to learn this time (11.0% clean accuracy), another "),
            (CHANCE, "another --seed may lead to masked gradients; SAT-R2,"),
            (WEAK, "attacks leave 65.0%; SAT-R2, which penalises"),
        ],
    )
    def test_the_sentence_follows_the_numbers(
        self, done, brief, audited, monkeypatch, accuracies, said
    ):
        clean, under_fgsm, worst = accuracies
        verdict = "pseudo-robust" if accuracies == MASKED else "robust"
        monkeypatch.setattr(surestep, "audit", lambda *_, **__: replace(audited, verdict=verdict))

        def judge(model, data, threat, attacks, n, seed, progress, tell):
            progress(n, n, worst)
            found = evaluate(model, data, threat, ["fgsm"], n=n)
            scores = {"fgsm": under_fgsm, "pgd-100": worst}
            intervals = dict.fromkeys(("clean", *scores, "worst case"), (0.0, 1.0))
            changed = {"clean_accuracy": clean, "worst_case_accuracy": worst}
            return replace(found, robust_accuracy=scores, intervals=intervals, **changed)

        evaluate = surestep.evaluate
        monkeypatch.setattr(surestep, "evaluate", judge)
        assert said in " ".join(done("demo", "--n", "5").split())

    def test_runs_are_kept_and_refused(self, cli, done, brief, tmp_path, tools):
        out = tmp_path / "demo"
        done("demo", "--n", "1", "--out", out)
        assert {p.name for p in out.iterdir()} == {"fgsm", "sat-r2"}
        assert all((p / "model.safetensors").is_file() for p in out.iterdir())
        assert "run" in done(
            "evaluate", out / "sat-r2", "--attacks", "fgsm", "--n", "1", "--json", "-"
        )
        before = tools.contents(out)
        code, text, err = cli("demo", "--n", "1", "--out", out)
        assert (code, text) == (2, "")
        last = err.splitlines()[-1]
        assert last.startswith(f"surestep: error: {out / 'fgsm'} exists already")
        assert "--overwrite" in last
        assert tools.contents(out) == before
        done("demo", "--n", "1", "--out", out, "--overwrite")

    def test_it_looks_at_both_folders_first(self, cli, tiny, tmp_path):
        (tmp_path / "sat-r2").mkdir()
        (tmp_path / "sat-r2" / "config.yaml").write_text("method: sat-r2\n")
        assert cli("demo", "--n", "1", "--out", tmp_path).code == 2
        assert not (tmp_path / "fgsm").exists()


@pytest.mark.parametrize("command", ["evaluate", "audit", "compare", "harden", "demo"])
def test_what_runs_in_one_process_says_so_under_torchrun(cli, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, err = cli(command, *(["x"] if command in ("evaluate", "audit", "harden") else []))
    assert (code, err) == (
        2,
        f"surestep: error: {command} runs in one process, not in 4: start it without torchrun\n",
    )


def test_a_new_plug_in_says_how_it_is_installed(done, tmp_path):
    where = tmp_path / "src" / "surestep"  # the folder's name does not make it a checkout
    where.mkdir(parents=True)
    said = done("methods", "new", "my-way", "--dir", where)
    install = f"pip install -e {where / 'surestep-my-way'}"
    assert said.endswith(f"then: {install}; surestep methods my-way\n")


def test_a_new_method_in_another_checkout_says_that_it_must_be_installed(done, tmp_path):
    """The surestep that runs does not look there."""
    (tmp_path / "src" / "surestep" / "methods").mkdir(parents=True)
    said = done("methods", "new", "my-way", "--dir", tmp_path)
    assert "then: pip install -e . (surestep is installed elsewhere); surestep methods my" in said
