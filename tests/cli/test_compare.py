"""``surestep compare``: the command, and one comparison that is killed and goes on."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
import yaml

from surestep import UserError, comparing
from surestep.cli import main
from surestep.comparing import Comparison, Failure, Number, Row
from surestep.training.run_folder import RunFolder

QUICK = ("--attacks", "fgsm,pgd-2,pgd-2-margin", "--no-audit", "--n", "20")


def made(name: str = "sat-r2", failures: tuple[Failure, ...] = ()) -> Comparison:
    numbers = {"clean_accuracy": Number(0.9, 0.01, 3), "passes": Number(10.0, 0.0, 3)}
    return Comparison(
        rows=[Row(name, [0, 1, 2], numbers, {"robust": 3})],
        runs=[{"run": f"{name}-seed{k}"} for k in range(3)],
        failures=list(failures),
        dataset="mnist",
        threat={"norm": "linf", "eps": 0.3},
        n=1000,
        attacks=["fgsm"],
        audit="quick",
        notes=["A note on [b]this[/b]."],
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Compare nothing: keep what was asked for, and return ``gives``."""
    calls: dict[str, Any] = {"gives": made()}

    def keep(*args: Any, **options: Any) -> Comparison:
        calls.update(args=args, **options)
        return calls["gives"]

    monkeypatch.setattr(comparing, "compare", keep)
    monkeypatch.setattr(comparing, "compare_runs", keep)
    return calls


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Train in this process, which saves the start of another."""
    calls: list[list[str]] = []

    def train(arguments: list[str], tell: Any) -> tuple[int, int, str]:
        calls.append(arguments)
        main([*arguments, "--quiet"])
        return 0, 300_000, ""

    monkeypatch.setattr(comparing._process, "measured", train)
    return calls


class TestOptions:
    def test_what_is_asked_for(self, done, asked, tmp_path):
        done(
            *("compare", "--methods", "fgsm, sat-r2", "--seeds", "5", "--preset", "mnist-fast"),
            *("--epochs", "2", "--eps", "8/255", "--budget", "standard", "--n", "7"),
            *("--split", "validation", "--out", tmp_path / "out"),
        )
        tell = asked.pop("tell")
        assert callable(tell)
        assert asked.pop("gives")
        assert asked == {
            "args": (["fgsm", "sat-r2"], 5),
            "preset": "mnist-fast",
            "epochs": "2",
            "eps": "8/255",
            "attacks": None,
            "budget": "standard",
            "audit": "quick",
            "n": 7,
            "split": "validation",
            "eval_batch_size": None,
            "out": str(tmp_path / "out"),
        }

    def test_the_defaults(self, done, asked, tmp_path):
        done("compare", "--methods", "fgsm", "--out", tmp_path)
        assert asked["args"] == (["fgsm"], 3)
        assert (asked["attacks"], asked["budget"], asked["n"]) == (None, None, 1000)
        assert asked["split"] == "test"

    def test_a_place_of_its_own(self, done, asked, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(comparing, "save", lambda *_, **__: None)
        done("compare", "--methods", "fgsm")
        assert re.fullmatch(r"runs/\d{8}-compare", asked["out"])

    def test_a_mistake_announces_no_place(self, refused, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert "unknown method 'nope'" in refused("compare", "--methods", "fgsm,nope")
        # Found last, after all that is told of the run folders.
        assert "'nope'" in refused("compare", "--methods", "fgsm", "--attacks", "fgsm,nope")

    def test_which_seeds_and_no_audit(self, done, asked, tmp_path):
        done("compare", "--methods", "fgsm", "--seeds", "3,5", "--no-audit", "--out", tmp_path)
        assert asked["args"][1] == [3, 5]
        assert asked["audit"] is None

    def test_run_folders(self, done, asked, tmp_path):
        done("compare", "a", "b", "--attacks", "fgsm,pgd-5", "--device", "cpu")
        assert asked["args"] == (("a", "b"),)
        assert asked["attacks"] == ["fgsm", "pgd-5"]
        assert (asked["out"], asked["device"]) == (None, "cpu")

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ([], "give --methods A,B, or run folders"),
            (["run", "--methods", "fgsm"], "give run folders or --methods, not both"),
            (["run", "--epochs", "3"], "run folders are trained already: leave out --epochs"),
            (["run", "--seeds", "3", "--preset", "x"], "leave out --preset, --seeds"),
            (["--methods", ",", "--out", "x"], "give at least one method"),
            (["--methods", "fgsm", "--out", "x", "--seeds", "0"], "give at least one seed"),
            (["--methods", "fgsm", "--out", "x", "--seeds", ","], "--seeds ',': give a number"),
            (["--methods", "fgsm", "--out", "x", "--seeds", "two"], "--seeds 'two': give a number"),
            (["--methods", "sat-r9", "--out", "x"], "unknown method 'sat-r9': did you mean"),
            (["--methods", "fgsm", "--out", "x", "--eps", "9"], "eps 9 is larger than the data"),
            (["run", "--attacks", "fgsm", "--budget", "quick"], "--attacks and --budget exclude"),
            (["nowhere"], "nowhere is not a run folder"),
            (["run", "--n", "0"], "--n"),
            (["run", "--format", "pdf"], "--format"),
            (["run", "--json", "."], "cannot write .: it is a folder"),
        ],
    )
    def test_refused(self, refused, tmp_path, monkeypatch, args, said):
        monkeypatch.chdir(tmp_path)
        assert said in refused("compare", *args)
        assert list(tmp_path.iterdir()) == []

    def test_a_report_of_another_command_is_kept(self, refused, finished, tmp_path):
        (tmp_path / "report.html").write_text("an audit's")
        said = refused("compare", finished, "--out", tmp_path)
        assert f"{tmp_path / 'report.html'} is not a comparison's and would be overwritten" in said
        assert (tmp_path / "report.html").read_text() == "an audit's"

    def test_a_run_keeps_its_report(self, refused, finished):
        before = sorted(p.name for p in finished.iterdir())
        said = refused("compare", finished, "--out", finished)
        assert f"{finished} is a run folder, whose report would be overwritten: give an" in said
        assert sorted(p.name for p in finished.iterdir()) == before


class TestOutput:
    def test_the_terminal_shows_names_as_they_are(self, done, asked):
        asked["gives"] = made("sat[red]r2[/red]")
        text = done("compare", "run")
        assert "sat[red]r2[/red]" in text
        assert "90.0 ± 1.0" in text
        assert "A note on [b]this[/b]." in text
        assert "mean ± standard deviation over 3 seeds" in text

    def test_formats(self, done, asked):
        found = made()
        assert done("compare", "run", "--format", "csv") == found.to_csv()
        assert done("compare", "run", "--format", "md") == found.to_markdown()
        assert done("compare", "run", "--format", "latex") == found.to_latex()

    @pytest.mark.parametrize("style", ["md", "latex"])
    def test_without_tabulate_before_any_work(self, refused, asked, monkeypatch, style):
        monkeypatch.setitem(sys.modules, "tabulate", None)
        line = refused("compare", "run", "--format", style)
        assert "pip install 'surestep[report]'" in line
        assert "args" not in asked

    def test_json_on_stdout_is_json_only(self, done, asked):
        found = json.loads(done("compare", "run", "--json", "-"))
        assert found["rows"][0]["verdict"] == "robust"
        assert found["command"].startswith("surestep")

    def test_a_failed_run_is_told_after_the_table(self, cli, asked, tmp_path):
        asked["gives"] = made(failures=(Failure("fgsm-seed0", "the loss is nan"),))
        code, out, err = cli("compare", "--methods", "fgsm", "--out", tmp_path)
        assert code == 2
        assert "90.0 ± 1.0" in out
        line = "surestep: error: 1 of 4 runs failed; fgsm-seed0: the loss is nan\n"
        assert err.endswith(line)
        assert (tmp_path / "comparison.csv").is_file()

    def test_a_full_disk_costs_no_table(self, cli, asked, tmp_path, monkeypatch):
        def full(*_: Any, **__: Any) -> None:
            raise UserError("no space left")

        monkeypatch.setattr(comparing, "save", full)
        numbers = tmp_path / "found.json"
        code, out, err = cli("compare", "run", "--out", tmp_path / "out", "--json", numbers)
        assert code == 2
        assert "90.0 ± 1.0" in out
        assert "no space left" in err
        assert json.loads(numbers.read_text("utf-8"))["n"] == 1000

    def test_a_fault_of_ours_is_no_user_error(self, cli, asked):
        asked["gives"] = made(failures=(Failure("fgsm-seed0", "a fault", fault=True),))
        code, out, err = cli("compare", "run")
        assert code == 1
        assert "90.0 ± 1.0" in out
        assert err == "surestep: error: 1 of 4 runs failed; fgsm-seed0: a fault\n"


class TestReal:
    @pytest.mark.usefixtures("small_budget")
    def test_train_judge_and_write(self, cli, small, tmp_path, trained_here, tools):
        out = tmp_path / "out"
        args = ("compare", "--methods", "fgsm", "--seeds", "1", *small, "--epochs", "1")
        args = (*args, "--attacks", "fgsm,pgd-2,pgd-2-margin", "--n", "10", "--out", out)
        code, text, err = cli(*args, "--format", "csv")
        assert code == 0, err
        (row,) = csv.DictReader(io.StringIO(text))
        assert (row["method"], row["seeds"], row["passes_mean"]) == ("fgsm", "1", "5.0")
        outcome = json.loads((out / "fgsm-seed0" / "judged.json").read_text("utf-8"))
        assert outcome["evaluation"]["format"] == "surestep-evaluation"
        assert outcome["audit"]["format"] == "surestep-audit"
        assert outcome["audit"]["budget"] == "quick"
        assert (outcome["evaluation"]["n"], outcome["audit"]["n"]) == (10, 10)
        assert float(row["clean_accuracy_mean"]) == outcome["evaluation"]["clean_accuracy"]
        assert row["verdict"] == outcome["audit"]["verdict"]
        assert {p.name for p in out.iterdir()} >= {"comparison.json", "comparison.csv"}
        assert not list(out.glob("*/*.state"))
        RunFolder.plan(out / "fgsm-seed0", overwrite=True)  # its results are a run's own files
        before = {name: data for name, data in tools.contents(out).items() if "/" in name}
        trained_here.clear()
        again = cli(*args, "--format", "csv")
        assert again.out == text
        assert trained_here == []
        assert {k: v for k, v in tools.contents(out).items() if "/" in k} == before

    @pytest.mark.parametrize("method", ["fgsm", "sads"])
    def test_what_a_run_settled_itself_is_no_difference(
        self, done, small, tmp_path, trained_here, method
    ):
        """Its engine, after a trial that only longer runs take; its method's own dropout."""
        args = ("compare", "--methods", method, "--seeds", "1", *small, "--batch-size", "5")
        args = (*args, *QUICK, "--out", tmp_path / "out")
        done(*args)
        config = yaml.safe_load((tmp_path / "out" / f"{method}-seed0" / "config.yaml").read_text())
        assert config["engine"] in ("fast", "reference")
        trained_here.clear()
        done(*args)
        assert trained_here == []

    def test_a_run_folder(self, done, finished, tmp_path):
        found = json.loads(done("compare", finished, *QUICK, "--json", "-"))
        row = found["rows"][0]
        assert row["method"] == "sat-r3"
        assert row["passes"] == {"mean": 8.0, "std": None, "n": 1}
        assert row["peak_memory_mb"] is None
        assert not (finished / "judged.json").exists()

    def test_killed_and_continued(self, done, small, tmp_path, tools, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        out, small = tmp_path / "out", [*small, "--epochs", "3"]  # long enough for the kill
        args = ("compare", "--methods", "fgsm,sat-r3", "--seeds", "1", *small)
        args = (*args, "--checkpoint-every", "1", *QUICK, "--out", str(out))
        # The first run is there already, so that the kill comes into the second.
        alone = ("--checkpoint-every", "1", "--quiet")
        done("train", "--method", "fgsm", *small, *alone, "--out", out / "fgsm-seed0")
        command = [sys.executable, "-m", "surestep", *map(str, args)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=tools.environment()
        ) as process:
            folder = out / "sat-r3-seed0"
            wait(lambda: (folder / "environment.json").exists(), process)
            family = psutil.Process(process.pid).children(recursive=True)
            wait(lambda: list(folder.glob("checkpoints/step-*")), process)
            process.kill()
        assert len(family) == 2
        # Nobody goes on training: another comparison may take the folder.
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == []
        kept = out / "fgsm-seed0" / "judged.json"
        before = kept.stat().st_mtime_ns
        metrics = folder / "metrics.jsonl"
        assert not metrics.exists() or len(metrics.read_text("utf-8").splitlines()) < 3

        found = json.loads(done(*args, "--json", "-"))
        assert kept.stat().st_mtime_ns == before
        assert [row["method"] for row in found["rows"]] == ["fgsm", "sat-r3"]
        assert found["rows"][1]["peak_memory_mb"] is None  # of several processes
        whole = tmp_path / "whole"
        done("train", "--method", "sat-r3", *small, *alone, "--out", whole)
        weights = "model.safetensors"
        assert (out / "sat-r3-seed0" / weights).read_bytes() == (whole / weights).read_bytes()


def wait(ready: Any, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
