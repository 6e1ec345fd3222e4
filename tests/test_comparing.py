"""The logic of a comparison, with trainings and attacks that are made up."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from surestep import UserError, auditing, comparing, evaluation, methods, runs
from surestep.comparing import (
    Comparison,
    Failure,
    Number,
    Row,
    _process,
    _run,
    compare,
    compare_runs,
    save,
)
from surestep.comparing._conclude import _precision
from surestep.data import Images
from surestep.evaluation import wilson_interval
from surestep.weights import Signature

HOSTILE = "a|b_[red]&%\\<script>$\n#{x}"
SHORT = {"dataset": "mnist", "preset": "none", "epochs": 2}


def evaluated(attacks: dict[str, float], clean: float = 0.9) -> dict[str, Any]:
    return {
        "clean_accuracy": clean,
        "robust_accuracy": attacks,
        "worst_case_accuracy": min(attacks.values()),
        "n": 40,
    }


def audited(verdict: str, found: float = 0.5) -> dict[str, Any]:
    return {
        "verdict": verdict,
        "sentence": f"It is {verdict}.",
        "found_accuracy": found,
        "found_by": "square",
    }


class World:
    """Trainings and judgements that cost nothing; what was done is written down."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.ends: dict[str, tuple[int, int, str]] = {}
        self.accuracies = {"fgsm": 0.8, "pgd-100": 0.6, "pgd-100-margin": 0.5}
        self.verdicts: dict[str, str] = {}
        self.found = 0.5
        self.sizes: list[int | None] = []
        self.breaks: dict[str, Exception] = {}
        self.through: dict[str, float] = {}
        self.doubts: dict[str, list[str]] = {}
        self.images = Images(torch.zeros(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64))
        self.other_images: dict[str | None, Images] = {}
        self.loaded: list[int | None] = []
        self.splits: list[str] = []
        self.classes: dict[str, tuple[str, ...]] = {}
        self.labels: list[list[int]] = []
        self.states: list[Path | None] = []

    def train(self, arguments: list[str], tell: Any) -> tuple[int, int, str]:
        assert arguments.pop(0) == "train"
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        folder = Path(given.get("--out") or given["--resume"])
        self.done.append(f"{'resume' if '--resume' in given else 'train'} {folder.name}")
        if "--config" in given:
            self.write(folder, yaml.safe_load(Path(given["--config"]).read_text("utf-8")), epochs=0)
        if folder.name in self.ends:
            return self.ends[folder.name]
        self.write(folder, yaml.safe_load((folder / "config.yaml").read_text("utf-8")))
        tell("  epoch 1/1")
        return 0, 500_000, ""

    def write(self, folder: Path, config: dict[str, Any], epochs: int | None = None) -> None:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
        count = config["epochs"] if epochs is None else epochs
        rows = [{"epoch": k, "step": 9 * k, "train_seconds": 10.0 * k} for k in range(1, count + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
        if count:
            (folder / "model.safetensors").write_bytes(folder.name.encode())
            (folder / "checkpoints" / f"step-{9 * count:08d}.safetensors").touch()

    def load(self, folder: Path, device: str | None) -> SimpleNamespace:
        return SimpleNamespace(model=folder.name, threat="threat")

    def load_data(self, config: Any, split: str, n: int | None = None) -> Images:
        self.splits.append(split)
        self.loaded.append(n)
        return self.other_images.get(config.data, self.images)

    def evaluate(self, model: str, images: Images, threat: Any, attacks: Any, **options: Any):
        self.states.append(options["state"])
        self.judge("evaluate", model)
        self.labels.append(images.y.tolist())
        self.sizes.append(options.get("batch_size"))
        shift = 0.01 * int(model[-1]) if model[-1].isdigit() else 0.0
        scores = {name: self.accuracies.get(name, 0.4) + shift for name in attacks}
        found = evaluated(scores | self.through, 0.9 + shift)
        found["doubts"] = self.doubts.get(model, [])
        return SimpleNamespace(to_dict=lambda: found)

    def audit(self, model: str, images: Images, threat: Any, **options: Any):
        self.judge("audit", model)
        self.labels.append(images.y.tolist())
        self.sizes.append(options.get("batch_size"))
        verdict = self.verdicts.get(model, "robust")
        return SimpleNamespace(to_dict=lambda: audited(verdict, self.found))

    def signature(self, weights: Path) -> Signature:
        if not weights.is_file():
            raise UserError(f"{weights} is gone")
        return Signature(self.classes.get(weights.parent.name, ()))

    def judge(self, what: str, model: str) -> None:
        if what in self.breaks:
            raise self.breaks.pop(what)
        self.done.append(f"{what} {model}")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(_process, "measured", made.train)
    monkeypatch.setattr(runs, "load", made.load)
    monkeypatch.setattr(runs, "load_data", made.load_data)
    monkeypatch.setattr(evaluation, "evaluate", made.evaluate)
    monkeypatch.setattr(auditing, "audit", made.audit)
    monkeypatch.setattr("surestep.comparing._run.read_signature", made.signature)
    return made


@pytest.fixture
def run_of(world: World, tmp_path: Path):
    """Make a finished run folder."""

    def make(name: str, epochs: int | None = None, **settings: Any) -> Path:
        values = {"method": "sat-r2", **SHORT, **settings}
        config = runs.resolve(values, values.pop("preset"))
        world.write(tmp_path / name, _run.resolved(config).model_dump(mode="json"), epochs)
        return tmp_path / name

    return make


class TestTraining:
    def test_every_run_is_trained_and_judged_in_turn(self, world, tmp_path):
        told: list[str] = []
        found = compare(["fgsm", "sat-r2"], 2, out=tmp_path, tell=told.append, **SHORT)
        labels = ["fgsm-seed0", "fgsm-seed1", "sat-r2-seed0", "sat-r2-seed1"]
        steps = ("train", "evaluate", "audit")
        assert world.done == [f"{step} {label}" for label in labels for step in steps]
        assert [r["run"] for r in found.runs] == labels
        assert [(row.method, row.seeds) for row in found.rows] == [
            ("fgsm", [0, 1]),
            ("sat-r2", [0, 1]),
        ]
        continues = "the same comparison with this folder continues"
        assert told[0] == f"runs and results go to {tmp_path}: {continues}"
        assert told[1:3] == ["training fgsm-seed0 (1 of 4)", "  epoch 1/1"]

    def test_a_plug_in_that_was_changed_since(self, world, tmp_path, monkeypatch):
        """Its author tries the next idea: a finished run is of the one before."""
        code = ["one"]
        monkeypatch.setattr(_run, "code_of", lambda method: code[0])
        for _ in range(2):
            compare(["fgsm"], 1, out=tmp_path, **SHORT)
        assert world.done.count("train fgsm-seed0") == 1
        code[0] = "two"
        with pytest.raises(UserError, match=r"code of fgsm has changed since .*fgsm-seed0 "):
            compare(["fgsm"], 1, out=tmp_path, **SHORT)

    def test_a_plug_in_that_was_changed_while_its_run_was_stopped(
        self, world, tmp_path, monkeypatch
    ):
        code, folder = ["one"], tmp_path / "fgsm-seed0"
        monkeypatch.setattr(_run, "code_of", lambda method: code[0])
        world.ends = {"fgsm-seed0": (1, 0, "a fault")}
        for code[0] in ("one", "two"):  # nothing was trained by the first: the fault is mended
            with pytest.raises(RuntimeError, match="a fault"):
                compare(["fgsm"], 1, out=tmp_path, **SHORT)
        (folder / "checkpoints" / "step-00000003.safetensors").touch()
        with pytest.raises(RuntimeError, match="a fault"):
            compare(["fgsm"], 1, out=tmp_path, **SHORT)
        code[0] = "three"
        with pytest.raises(UserError, match=r"code of fgsm has changed since .*fgsm-seed0 "):
            compare(["fgsm"], 1, out=tmp_path, **SHORT)

    def test_the_code_of_a_method(self, monkeypatch):
        assert _run.code_of("fgsm") is None
        monkeypatch.setattr(methods.get("fgsm"), "__module__", __name__)
        digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        assert _run.code_of("fgsm") == digest[:16]

    def test_how_many_images_are_attacked_at_a_time(self, world, tmp_path):
        compare(["fgsm"], 1, out=tmp_path / "one", **SHORT)
        compare(["fgsm"], 1, out=tmp_path / "two", eval_batch_size=7, **SHORT)
        assert world.sizes == [None, None, 7, 7]
        # It is no other comparison.
        compare(["fgsm"], 1, out=tmp_path / "two", eval_batch_size=9, **SHORT)
        assert len(world.sizes) == 4
        with pytest.raises(UserError, match="eval_batch_size 0: give 1 or more"):
            compare(["fgsm"], 1, out=tmp_path / "three", eval_batch_size=0, **SHORT)

    def test_the_numbers(self, world, tmp_path):
        row = compare(["sat-r2"], [0, 2], out=tmp_path, **SHORT).rows[0]
        assert row.numbers.keys() == comparing.COLUMNS.keys() - {"autoattack"}
        expected = {
            "clean_accuracy": (0.9, 0.92),
            "fgsm": (0.8, 0.82),
            "pgd": (0.5, 0.52),  # the lower of the two, not the first
            "worst_case_accuracy": (0.5, 0.52),
            "passes": (10, 10),
            "seconds": (20, 20),
        }
        for key, values in expected.items():
            number = row.numbers[key]
            assert number.mean == pytest.approx(statistics.mean(values)), key
            assert number.std == pytest.approx(statistics.stdev(values)), key
            assert number.n == 2
        unit = 1 if sys.platform == "darwin" else 1024
        assert row.numbers["peak_memory_mb"].mean == pytest.approx(500_000 * unit / 1e6)

    def test_awp_takes_the_update_twice(self, world, tmp_path):
        plain = compare(["fgsm"], 1, out=tmp_path / "a", **SHORT).rows[0].numbers["passes"].mean
        found = compare(["fgsm"], 1, out=tmp_path / "b", awp=0.01, **SHORT).rows[0]
        assert found.numbers["passes"].mean == plain + 3

    def test_one_seed_has_no_deviation(self, world, tmp_path):
        found = compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        assert {number.std for number in found.rows[0].numbers.values()} == {None}
        assert "±" not in "".join(found.table()[1][0])
        assert "deviation" not in found.title

    def test_autoattack_has_a_column_when_run(self, world, tmp_path):
        found = compare(["sat-r2"], 1, out=tmp_path, budget="standard", **SHORT)
        assert found.rows[0].numbers["autoattack"].mean == 0.4
        assert "AutoAttack" in found.table()[0]
        assert any(note.startswith("AutoAttack attacks only what") for note in found.notes)

    def test_the_stronger_of_both_ways_through_layers_that_mask(self, world, tmp_path):
        world.through = {"fgsm-bpda": 0.3, "pgd-100-bpda": 0.25, "autoattack-bpda": 0.2}
        found = compare(["sat-r2"], 1, out=tmp_path, budget="standard", **SHORT)
        means = {key: number.mean for key, number in found.rows[0].numbers.items()}
        assert (means["fgsm"], means["pgd"], means["autoattack"]) == (0.3, 0.25, 0.2)

    def test_what_makes_a_worst_case_doubtful_is_told(self, world, tmp_path):
        world.doubts = {"sat-r2-seed1": ["the model is random", "one step breaks more"]}
        told = "(sat-r2-seed1: the model is random, one step breaks more)"
        note = f"The worst case of sat-r2 may be too high {told}."
        for _ in range(2):  # and when what was found is used again
            found = compare(["fgsm", "sat-r2"], 2, out=tmp_path, **SHORT)
            assert [n for n in found.notes if "too high" in n] == [note]
            doubts = {run["run"]: run["doubts"] for run in found.to_dict()["runs"]}
            assert doubts["sat-r2-seed1"] == world.doubts["sat-r2-seed1"]
            assert doubts["sat-r2-seed0"] == doubts["fgsm-seed1"] == []

    def test_nothing_left_is_not_too_high(self, world, tmp_path):
        world.doubts = {"fgsm-seed0": ["the model is random"]}
        world.accuracies = dict.fromkeys(world.accuracies, 0.0)
        found = compare(["fgsm"], 1, out=tmp_path, **SHORT)
        assert found.runs[0]["doubts"] == []
        assert not any("too high" in note for note in found.notes)

    def test_transfer_from_elsewhere_is_no_pgd(self, world, tmp_path):
        found = compare(["sat-r2"], 1, out=tmp_path, attacks=["apgd-ce", "fgsm"], **SHORT)
        assert "pgd" not in found.rows[0].numbers
        assert not any(note.startswith("PGD") for note in found.notes)

    def test_transfer_needs_no_source(self, world, tmp_path):
        for attacks in (["fgsm", "transfer"], ["transfer"]):
            compare(["sat-r2"], 1, out=tmp_path / attacks[0], attacks=attacks, audit=None, **SHORT)
        assert world.done.count("evaluate sat-r2-seed0") == 2
        assert world.loaded == [None, None]  # a substitute asks about more than are judged
        compare(["sat-r2"], 1, out=tmp_path / "c", attacks=["fgsm"], audit=None, n=7, **SHORT)
        assert world.loaded.pop() == 7
        with pytest.raises(UserError, match="'pdg'"):
            compare(["sat-r2"], 1, out=tmp_path / "b", attacks=["transfer", "pdg"], **SHORT)

    def test_the_split_is_told(self, world, tmp_path):
        found = compare(["sat-r2"], 1, out=tmp_path, split="validation", **SHORT)
        assert world.splits == ["validation"]
        assert found.to_dict()["split"] == "validation"
        assert "on 40 validation images of mnist" in found.title
        assert any("selected weights by validation images" in note for note in found.notes)

    def test_the_configuration_that_is_trained(self, world, tmp_path):
        compare(["sat-r3"], [7], out=tmp_path, **SHORT, lr=0.5)
        config = yaml.safe_load((tmp_path / "sat-r3-seed7" / "config.yaml").read_text("utf-8"))
        assert (config["method"], config["seed"], config["lr"]) == ("sat-r3", 7, 0.5)
        assert {"lam", "tau"} <= config["params"].keys()

    def test_presets_that_differ_are_told(self, world, tmp_path):
        found = compare(["fgsm", "pgd"], 1, out=tmp_path)
        note = next(n for n in found.notes if "different settings" in n)
        assert "epochs 20 (fgsm), 6 (pgd)" in note
        alike = compare(["fgsm", "pgd"], 1, out=tmp_path / "b", preset="mnist-fast")
        assert not any("different settings" in n for n in alike.notes)

    def test_how_well_so_few_images_tell(self, world, tmp_path):
        note = compare(["sat-r2"], 2, out=tmp_path, **SHORT).notes[0]
        # By the quadratic that defines Wilson's interval: (p - t)^2 = z^2 t (1 - t) / n.
        p, n, z = 0.5, 40, 1.959964
        a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
        root = math.sqrt(b * b - 4 * a * c)
        low, high = (-b - root) / (2 * a), (-b + root) / (2 * a)
        assert note.startswith(
            f"With 40 test images the best worst case has a 95% interval of {100 * low:.1f} to"
        )
        assert f" to {high:.1%}; more seeds" in note


class TestVerdicts:
    def test_the_most_severe_counts(self, world, tmp_path):
        world.verdicts = {"sat-r2-seed1": "pseudo-robust", "sat-r2-seed2": "inconclusive"}
        row = compare(["sat-r2"], 3, out=tmp_path, **SHORT).rows[0]
        assert row.verdict == "pseudo-robust"
        assert row.verdict_text == "pseudo-robust (1 of 3; inconclusive 1, robust 1)"
        assert row.to_dict()["verdicts"] == {"pseudo-robust": 1, "inconclusive": 1, "robust": 1}

    def test_what_looks_robust_and_is_not_comes_first(self, world, tmp_path):
        world.verdicts = {"sat-r2-seed0": "not robust", "sat-r2-seed1": "pseudo-robust"}
        assert compare(["sat-r2"], 2, out=tmp_path, **SHORT).rows[0].verdict == "pseudo-robust"

    def test_when_all_agree(self, world, tmp_path):
        row = compare(["sat-r2"], 2, out=tmp_path, **SHORT).rows[0]
        assert row.verdict_text == "robust"

    def test_without_an_audit(self, world, tmp_path):
        found = compare(["sat-r2"], 1, out=tmp_path, audit=None, **SHORT)
        assert world.done == ["train sat-r2-seed0", "evaluate sat-r2-seed0"]
        assert found.rows[0].verdict is None
        assert "verdict" not in found.table()[0]

    def test_an_audit_that_finds_more_is_told(self, world, tmp_path):
        world.found = 0.125
        found = compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        assert any("leave less than the worst case: sat-r2 12.5%" in n for n in found.notes)
        # Of each seed what is left, which no mean may exceed.
        world.found, world.through = 0.505, {"pgd-100": 0.9}  # seed 1's worst case is 0.51
        found = compare(["sat-r2"], 2, out=tmp_path / "two", **SHORT)
        assert any("leave less than the worst case: sat-r2 50.2%" in n for n in found.notes)


class TestAgain:
    def test_nothing_is_done_twice(self, world, tmp_path):
        first = compare(["fgsm", "sat-r2"], 2, out=tmp_path, **SHORT)
        world.done.clear()
        assert compare(["fgsm", "sat-r2"], 2, out=tmp_path, **SHORT) == first
        assert world.done == []

    def test_more_seeds_only_cost_the_new_ones(self, world, tmp_path):
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        world.done.clear()
        compare(["sat-r2"], 2, out=tmp_path, **SHORT)
        assert world.done == [f"{k} sat-r2-seed1" for k in ("train", "evaluate", "audit")]

    @pytest.mark.parametrize("at", ["evaluate", "audit"])
    def test_a_kill_costs_the_step_it_came_in(self, world, tmp_path, at):
        world.breaks = {at: KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        world.done.clear()
        found = compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        steps = ("evaluate", "audit") if at == "evaluate" else ("audit",)
        assert world.done == [f"{step} sat-r2-seed0" for step in steps]
        # Measured in the first attempt, and not lost with it.
        assert found.rows[0].numbers["peak_memory_mb"].mean > 400
        # A stopped evaluation continues: both attempts have the same state.
        (state,) = set(world.states)
        assert state is not None
        assert state.parent == tmp_path / "sat-r2-seed0"
        assert len(world.states) == (2 if at == "evaluate" else 1)

    def test_a_run_whose_weights_vanish_meanwhile_fails_alone(self, world, run_of, monkeypatch):
        folders = [run_of(name, seed=k) for k, name in enumerate(("one", "two", "three"))]

        def deleting(model, *args, **options):
            if model == "one":
                (folders[1] / "model.safetensors").unlink()
            return world.evaluate(model, *args, **options)

        monkeypatch.setattr(evaluation, "evaluate", deleting)
        found = compare_runs(folders, n=7)
        assert [failure.run for failure in found.failures] == ["two"]
        assert [r["run"] for r in found.runs] == ["one", "three"]

    def test_a_half_finished_run_goes_on(self, world, tmp_path):
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        folder = tmp_path / "sat-r2-seed0"
        (folder / "judged.json").unlink()
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        world.write(folder, config, epochs=1)
        world.done.clear()
        # The last of its processes is measured alone; and when what was found is used again.
        for _ in range(2):
            found = compare(["sat-r2", "fgsm"], 1, out=tmp_path, **SHORT)
            assert world.done[0] == "resume sat-r2-seed0"
            assert ["peak_memory_mb" in row.numbers for row in found.rows] == [False, True]
            assert "Peak memory is unknown where training was resumed: sat-r2-seed0." in found.notes
        again = compare_runs([folder], n=7)
        assert "Peak memory is unknown where training was resumed: sat-r2-seed0." in again.notes

    def test_a_run_that_was_stopped_before_its_first_checkpoint_is_measured(self, world, tmp_path):
        """It begins again."""
        world.ends = {"sat-r2-seed0": (143, 0, "")}
        with pytest.raises(UserError, match="killed by signal 15"):
            compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        world.ends = {}
        found = compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        assert world.done[1] == "resume sat-r2-seed0"
        assert found.rows[0].numbers["peak_memory_mb"].mean > 400
        assert not any("resumed" in note for note in found.notes)

    def test_a_run_without_its_last_checkpoint_goes_on(self, world, tmp_path):
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        last = tmp_path / "sat-r2-seed0" / "checkpoints" / "step-00000018.safetensors"
        last.rename(last.with_name("step-00000009.safetensors"))
        world.done.clear()
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        assert world.done == ["resume sat-r2-seed0"]

    def test_a_run_whose_checkpoints_were_removed_is_finished(self, world, tmp_path):
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        for path in (tmp_path / "sat-r2-seed0" / "checkpoints").iterdir():
            path.unlink()
        world.done.clear()
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        assert world.done == []

    def test_other_weights_are_judged_anew(self, world, tmp_path):
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        (tmp_path / "sat-r2-seed0" / "model.safetensors").write_bytes(b"others")
        world.done.clear()
        found = compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        assert world.done == ["evaluate sat-r2-seed0", "audit sat-r2-seed0"]
        assert "peak_memory_mb" not in found.rows[0].numbers

    @pytest.mark.parametrize(
        "change", [{"mean_sparse": 0.2}, {"eps": 0.1}, {"normalize": False}, {"image_size": 8}]
    )
    def test_other_settings_of_the_same_weights_are_judged_anew(
        self, world, run_of, tmp_path, change
    ):
        """A hardened run's threshold is in no tensor, and who edits config.yaml means it."""
        folder, out = run_of("a", mean_sparse=0.1), tmp_path / "out"
        compare_runs([folder], out=out)
        run_of("a", **{"mean_sparse": 0.1, **change})
        world.done.clear()
        compare_runs([folder], out=out)
        assert world.done == ["evaluate a", "audit a"]
        compare_runs([folder], out=out)
        assert len(world.done) == 2

    def test_an_edited_file_of_the_model_is_judged_anew(self, world, run_of, tmp_path):
        """The same weights, but another normalisation or clamp in its forward."""
        net, out = tmp_path / "net.py", tmp_path / "out"
        net.write_text("make = None")
        folder = run_of("a", model=f"{net}:make")
        for text in ("make = None", "make = 1"):
            net.write_text(text)
            compare_runs([folder], out=out)
        assert world.done == ["evaluate a", "audit a"] * 2
        compare_runs([folder], out=out)
        assert len(world.done) == 4

    @pytest.mark.parametrize("part", ["x", "y", "version"])
    def test_other_images_or_another_version_are_judged_anew(
        self, world, tmp_path, monkeypatch, part
    ):
        """The file of a data set may hold other images under the same name."""
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        world.done.clear()
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        assert world.done == []
        if part == "version":
            monkeypatch.setattr(_run, "__version__", "9")
        else:
            world.images = replace(world.images, **{part: getattr(world.images, part) + 1})
        told: list[str] = []
        compare(["sat-r2"], 1, out=tmp_path, tell=told.append, **SHORT)
        assert world.done == ["evaluate sat-r2-seed0", "audit sat-r2-seed0"]
        assert told[1].startswith("judging sat-r2-seed0 (1 of 1) anew: its weights, settings or ")

    def test_what_an_older_version_judged_is_judged_anew(self, world, tmp_path):
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        kept = tmp_path / "sat-r2-seed0" / "judged.json"
        outcome = json.loads(kept.read_text("utf-8"))
        del outcome["subject"]
        kept.write_text(json.dumps(outcome), "utf-8")
        world.done.clear()
        found = compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        assert world.done == ["evaluate sat-r2-seed0", "audit sat-r2-seed0"]
        # Which could not be measured again, and is the weights'.
        assert found.rows[0].numbers["peak_memory_mb"].mean > 400

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"n": 7}, "n 1000, but this comparison has 7"),
            ({"split": "validation"}, "split test, but this comparison has validation"),
            ({"attacks": ["fgsm"]}, "attacks fgsm,pgd-100,pgd-100-margin, but this comparison has"),
            ({"audit": None}, "audit quick, but this comparison has none"),
            ({"epochs": 3}, "started with epochs 2, but this comparison has 3"),
            ({"eps": 0.1}, "started with eps 0.3, but this comparison has 0.1"),
        ],
    )
    def test_other_settings_are_refused_before_any_work(self, world, tmp_path, change, said):
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        world.done.clear()
        with pytest.raises(UserError, match=re.escape(said)) as e:
            compare(["fgsm", "sat-r2"], 1, out=tmp_path, **{**SHORT, **change})
        assert str(tmp_path / "sat-r2-seed0") in str(e.value)
        assert "\n" not in str(e.value)
        assert world.done == []

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "cannot be read"),
            ("[]", "is not an outcome"),
            ('{"format": "x"}', "is not an outcome"),
            ('{"format": "surestep-outcome", "version": 0}', "is not an outcome"),
        ],
    )
    def test_a_damaged_outcome(self, world, tmp_path, text, said):
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        (tmp_path / "sat-r2-seed0" / "judged.json").write_text(text, "utf-8")
        with pytest.raises(UserError, match=said):
            compare(["sat-r2"], 1, out=tmp_path, **SHORT)


class TestFailures:
    def test_the_others_results_are_kept(self, world, tmp_path):
        world.ends = {"fgsm-seed0": (2, 0, "the loss is nan at step 3")}
        found = compare(["fgsm", "sat-r2"], 2, out=tmp_path, **SHORT)
        assert found.failures == [Failure("fgsm-seed0", "the loss is nan at step 3")]
        assert [(row.method, row.seeds) for row in found.rows] == [
            ("fgsm", [1]),
            ("sat-r2", [0, 1]),
        ]
        assert found.rows[0].numbers["fgsm"].n == 1
        titles, body = found.table()
        assert [line[titles.index("seeds")] for line in body] == ["1", "2"]
        assert "Failed, and not included: fgsm-seed0." in found.notes

    def test_a_method_without_any_result_has_no_row(self, world, tmp_path):
        world.ends = {"fgsm-seed0": (2, 0, "no")}
        found = compare(["fgsm", "sat-r2"], 1, out=tmp_path, **SHORT)
        assert [row.method for row in found.rows] == ["sat-r2"]

    def test_none_succeeds(self, world, tmp_path):
        world.ends = {"fgsm-seed0": (2, 0, "the disk is full")}
        with pytest.raises(UserError, match="no run succeeded; fgsm-seed0: the disk is full"):
            compare(["fgsm"], 1, out=tmp_path, **SHORT)

    def test_a_fault_of_ours_is_no_user_error(self, world, tmp_path):
        world.ends = {"fgsm-seed0": (1, 0, "this is a fault")}
        with pytest.raises(RuntimeError, match="fgsm-seed0: this is a fault"):
            compare(["fgsm"], 1, out=tmp_path, **SHORT)
        assert compare(["fgsm", "pgd"], 1, out=tmp_path, **SHORT).failures[0].fault

    @pytest.mark.parametrize(("code", "number"), [(-9, 9), (-15, 15), (143, 15)])
    def test_a_killed_training(self, world, tmp_path, code, number):
        world.ends = {"fgsm-seed0": (code, 0, "")}
        found = compare(["fgsm", "pgd"], 1, out=tmp_path, **SHORT)
        said = f"the training was killed by signal {number}"
        assert found.failures == [Failure("fgsm-seed0", said)]

    def test_stopped_from_the_keyboard(self, world, tmp_path):
        world.ends = {"fgsm-seed0": (130, 0, "")}
        with pytest.raises(KeyboardInterrupt):
            compare(["fgsm", "pgd"], 1, out=tmp_path, **SHORT)
        assert world.done == ["train fgsm-seed0"]

    def test_an_evaluation_that_is_refused(self, world, tmp_path):
        world.breaks = {"evaluate": UserError("the weights are damaged")}
        found = compare(["fgsm", "pgd"], 1, out=tmp_path, **SHORT)
        assert found.failures == [Failure("fgsm-seed0", "the weights are damaged")]


class TestRefused:
    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ({"methods": ["sat-r9"]}, "unknown method 'sat-r9': did you mean 'sat-r3'"),
            ({"methods": []}, "nothing to compare: give at least one method"),
            ({"seeds": 0}, "nothing to compare: give at least one seed"),
            ({"seeds": []}, "nothing to compare: give at least one seed"),
            ({"seeds": [-1]}, "seed -1 is invalid"),
            ({"seeds": [1, 1]}, "seed '1' is named twice"),
            ({"methods": ["fgsm", "fgsm"]}, "method 'fgsm' is named twice"),
            ({"preset": "mnist-fats"}, "did you mean 'mnist-fast'"),
            ({"attacks": ["pgd"]}, "unknown attack 'pgd'"),
            ({"attacks": []}, "no attack given"),
            ({"attacks": ["fgsm"], "budget": "quick"}, "exclude each other"),
            ({"budget": "qick"}, "did you mean 'quick'"),
            ({"audit": "qick"}, "did you mean 'quick'"),
            ({"n": 0}, "n 0: give at least 1"),
            ({"epoch": 3}, "unknown setting 'epoch': did you mean 'epochs'"),
            ({"seed": 3}, "seed is not a setting of a comparison: give seeds"),
            ({"method": "pgd"}, "method is not a setting of a comparison: give methods"),
        ],
    )
    def test_before_any_work(self, world, tmp_path, args, said):
        values = {"methods": ["fgsm"], "seeds": 1, **SHORT, **args}
        with pytest.raises(UserError, match=re.escape(said)) as e:
            compare(values.pop("methods"), values.pop("seeds"), out=tmp_path / "out", **values)
        assert "\n" not in str(e.value)
        assert world.done == []
        assert not (tmp_path / "out").exists()

    def test_a_place_that_is_a_file(self, world, tmp_path):
        (tmp_path / "out").touch()
        with pytest.raises(UserError, match="out is a file: give a folder"):
            compare(["fgsm"], 1, out=tmp_path / "out", **SHORT)


class TestRunFolders:
    def test_seeds_share_a_row(self, world, run_of):
        folders = [run_of("a0"), run_of("b1", seed=1), run_of("c", method="fgsm")]
        found = compare_runs(folders)
        assert [(row.method, row.seeds) for row in found.rows] == [
            ("sat-r2", [0, 1]),
            ("fgsm", [0]),
        ]
        assert [r["run"] for r in found.runs] == ["a0", "b1", "c"]
        assert not any(step.startswith("train") for step in world.done)

    def test_settings_that_differ_make_rows(self, run_of):
        folders = [run_of("a", params={"lam": 5}), run_of("b", params={"lam": 10.5}, seed=1)]
        found = compare_runs(folders)
        assert [row.method for row in found.rows] == ["sat-r2 (lam=5)", "sat-r2 (lam=10.5)"]

    def test_floats_that_differ_by_rounding_are_one_setting(self, run_of):
        """Lengths that were scaled to eps, and back."""
        steps = (0.375, 0.37499999999999994)
        folders = [
            run_of(name, method="rs-fgsm", seed=k, params={"alpha": alpha}, lr=lr)
            for k, (name, alpha, lr) in enumerate(zip("ab", steps, (0.1, 0.1 + 1e-15), strict=True))
        ]
        found = compare_runs(folders)
        assert [(row.method, row.seeds) for row in found.rows] == [("rs-fgsm", [0, 1])]
        other = run_of("c", method="fgsm", lr=0.1)
        assert not any("different settings" in n for n in compare_runs([folders[1], other]).notes)

    def test_no_row_is_lost_whose_settings_read_alike(self, run_of):
        rates = (0.0392157, 10 / 255, 0.5)
        found = compare_runs([run_of(f"a{k}", lr=lr) for k, lr in enumerate(rates)])
        assert [row.method for row in found.rows] == [
            "sat-r2 (lr=0.0392157)",
            f"sat-r2 (lr={10 / 255})",
            "sat-r2 (lr=0.5)",
        ]
        assert [row.numbers["clean_accuracy"].mean for row in found.rows] == [0.9, 0.91, 0.92]

    def test_labels_are_numbered_as_each_run_numbers_its_classes(self, world, run_of, tmp_path):
        y = torch.arange(40) % 2
        world.images = Images(torch.zeros(40, 1, 4, 4), y, classes=("cat", "dog"))
        world.classes = {"b": ("dog", "cat"), "c": ("dog", "ape")}
        told: list[str] = []
        options = {"out": tmp_path / "out", "tell": told.append}
        found = compare_runs([run_of("a"), run_of("b", seed=1), run_of("c", seed=2)], **options)
        assert world.labels == [y.tolist()] * 2 + [(1 - y).tolist()] * 2
        assert [line for line in told if "renumbered" in line] == [
            f"the labels are renumbered to the class order of {tmp_path / 'b'}, by class name"
        ]
        (failure,) = found.failures
        assert f"{tmp_path / 'c'} does not know the class 'cat'" in failure.message
        # What was judged with labels in another order is not used again.
        world.classes = {"a": ("dog", "cat"), "b": ("dog", "cat"), "c": ("dog", "cat")}
        compare_runs([tmp_path / name for name in "abc"], **options)
        assert world.done[4:] == [
            f"{step} {name}" for name in "ac" for step in ("evaluate", "audit")
        ]

    def test_a_hardened_run_is_no_place_for_results(self, run_of):
        folder, out = run_of("a"), run_of("hard")
        (out / "metrics.jsonl").unlink()
        with pytest.raises(UserError, match=r"hard is a run folder, whose report would be over"):
            compare_runs([folder], out=out)

    @pytest.mark.parametrize(
        ("device", "gpus", "host"),
        [
            ("cuda", None, True),
            ("cpu", ["A100"], False),
            (None, ["A100"], True),
            (None, None, False),
        ],
    )
    def test_the_note_on_memory_is_of_where_a_run_was_trained(
        self, world, tmp_path, device, gpus, host
    ):
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        folder = tmp_path / "sat-r2-seed0"
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"device": device}), "utf-8")
        facts = {"torch": "2.9.0"} | ({"gpus": gpus} if gpus else {})
        (folder / "environment.json").write_text(json.dumps(facts), "utf-8")
        for judged_on in ("cpu", "cuda"):
            notes = compare_runs([folder], device=judged_on).notes
            (note,) = (n for n in notes if n.startswith("Peak memory is"))
            assert ("on the host only" in note) == host

    def test_peak_memory_is_known_of_runs_that_were_compared(self, world, tmp_path):
        compare(["sat-r2"], 1, out=tmp_path, **SHORT)
        for n in (1000, 7):  # judged alike, and otherwise
            found = compare_runs([tmp_path / "sat-r2-seed0"], n=n)
            assert found.rows[0].numbers["peak_memory_mb"].mean > 400
        assert world.done.count("evaluate sat-r2-seed0") == 2

    def test_results_are_kept_where_asked_only(self, world, run_of, tmp_path):
        folder = run_of("a")
        before = sorted(p.name for p in folder.iterdir())
        compare_runs([folder])
        compare_runs([folder], out=tmp_path / "out")
        assert world.done == ["evaluate a", "audit a"] * 2
        compare_runs([folder], out=tmp_path / "out")
        assert len(world.done) == 4
        assert sorted(p.name for p in folder.iterdir()) == before
        assert (tmp_path / "out" / "a" / "judged.json").is_file()

    def test_folders_of_one_name(self, run_of, tmp_path):
        found = compare_runs([run_of("x/run"), run_of("y/run", seed=1)], out=tmp_path / "out")
        assert [r["run"] for r in found.runs] == ["run", "run-2"]

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"eps": 0.1}, "eps 0.3 and 0.1"),
            ({"dataset": "cifar10", "eps": 0.3}, "dataset 'mnist' and 'cifar10'"),
            ({"norm": "l2", "eps": 0.3}, "norm 'linf' and 'l2'"),
            ({"data": "/elsewhere"}, "their test images differ (mnist and /elsewhere)"),
        ],
    )
    def test_what_cannot_be_compared(self, world, run_of, tmp_path, settings, said):
        other = Images(torch.ones(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64))
        world.other_images = {"/elsewhere": other}
        folders = [run_of("a"), run_of("b", seed=1, **settings)]
        with pytest.raises(UserError) as e:
            compare_runs(folders)
        assert str(e.value) == f"{folders[0]} and {folders[1]} cannot be compared: {said}"
        assert world.done == []

    def test_engines_share_a_row_and_a_note(self, world, run_of):
        """What "auto" settled on is not a setting: seeds of one row may differ in it."""
        folders = [run_of("a", engine="fast", precision="bf16")]
        folders += [run_of("b", seed=1, engine="reference", precision="fp32")]
        found = compare_runs(folders)
        assert [row.seeds for row in found.rows] == [[0, 1]]
        told = "(fast bf16: a; reference fp32: b)"
        said = "Runs used different engines or precisions: their seconds are not comparable"
        assert f"{said} {told}." in found.notes
        # Of one seed twice, it is what is compared.
        other = run_of("d", engine="reference", precision="fp32")
        ways = compare_runs([folders[0], other])
        assert [row.method for row in ways.rows] == [
            "sat-r2 (fast bf16)",
            "sat-r2 (reference fp32)",
        ]
        for order in ([0, 2, 1], [1, 2, 0], [2, 1, 0]):
            three = [*folders, other]
            mixed = compare_runs([three[k] for k in order])
            assert {row.method: sorted(row.seeds) for row in mixed.rows} == {
                "sat-r2 (fast bf16)": [0],
                "sat-r2 (reference fp32)": [0, 1],
            }
        alike = compare_runs([folders[0], run_of("c", seed=2, engine="fast", precision="bf16")])
        assert not any("engines or precisions" in note for note in alike.notes)

    def test_machines_that_differ_are_told(self, world, run_of):
        folders = [run_of(name, seed=k) for k, name in enumerate("abcd")]
        for folder, threads in zip(folders, (2, 2, 8, 8), strict=True):
            facts = {"torch": "2.9.0", "torch threads": threads, "platform": folder.name}
            (folder / "environment.json").write_text(json.dumps(facts), "utf-8")
        note = (
            "Runs were trained on different machines or versions (torch threads 2 of a, 8 of c): "
            "their seconds are not comparable."
        )
        assert [n for n in compare_runs(folders).notes if "machines" in n] == [note]
        (folders[1] / "environment.json").unlink()  # of an older version
        alike = compare_runs(folders[:2])
        assert not any("machines" in n for n in alike.notes)

    def test_the_same_images_at_two_places(self, world, run_of):
        copy = Images(world.images.x.clone(), world.images.y.clone())
        world.other_images = {"/elsewhere": copy}
        assert len(compare_runs([run_of("a"), run_of("b", seed=1, data="/elsewhere")]).rows) == 2
        npz = [run_of(k, dataset=f"npz:/{k}/d.npz", eps=0.3, seed=i) for i, k in enumerate("cd")]
        assert compare_runs(npz).n == compare_runs(npz[:1]).n

    def test_the_same_run_twice(self, run_of):
        with pytest.raises(UserError, match=r"a and .*b are the same run \(method sat-r2, seed 0"):
            compare_runs([run_of("a"), run_of("b")])
        with pytest.raises(UserError, match="is named twice"):
            compare_runs([run_of("a"), run_of("a")])

    def test_no_run(self, tmp_path, run_of):
        with pytest.raises(UserError, match="is not a run folder: it has no config"):
            compare_runs([run_of("a"), tmp_path])
        with pytest.raises(UserError, match="give at least one run folder"):
            compare_runs([])

    def test_an_unfinished_run(self, run_of):
        with pytest.raises(UserError, match=r"is not finished \(epoch 1 of 2\): continue it with"):
            compare_runs([run_of("a", epochs=1)])


@pytest.fixture
def hostile() -> Comparison:
    numbers = {
        "clean_accuracy": Number(0.98765, 0.00123, 3),
        "worst_case_accuracy": Number(0.5, None, 1),
        "passes": Number(10.0, 0.0, 3),
        "seconds": Number(1234.5, 12.3, 3),
    }
    return Comparison(
        rows=[Row(HOSTILE, [0, 1, 2], numbers, {"robust": 3}), Row("fgsm", [0], {})],
        runs=[],
        failures=[],
        dataset="mnist",
        threat={"norm": "linf", "eps": 0.3},
        n=1000,
        attacks=["fgsm"],
        audit="quick",
        notes=["A note on <b>_this_</b> 100%\nof it."],
    )


class TestFormats:
    def test_csv(self, hostile):
        first, second = csv.DictReader(io.StringIO(hostile.to_csv()))
        assert first["method"] == " ".join(HOSTILE.split())
        assert float(first["clean_accuracy_mean"]) == 0.98765
        assert float(first["clean_accuracy_std"]) == 0.00123
        assert (first["seeds"], first["verdict"], first["verdicts"]) == ("3", "robust", "robust 3")
        assert (first["worst_case_accuracy_std"], first["fgsm_mean"]) == ("", "")
        assert (second["method"], second["clean_accuracy_mean"]) == ("fgsm", "")

    def test_markdown(self, hostile):
        lines = hostile.to_markdown().splitlines()
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
        assert len({len(row) for row in rows}) == 1
        assert len(rows) == 4
        assert re.fullmatch(r":-+", rows[1][0])
        assert re.fullmatch(r"-+:", rows[1][3])
        named = dict(zip((t.strip() for t in rows[0]), (c.strip() for c in rows[2]), strict=True))
        assert named["clean"] == "98.8 ± 0.1"
        assert named["worst case"] == "50.0"
        assert named["passes per image"] == "10"
        assert named["training seconds"] == "1234 ± 12"
        assert named["verdict"] == "robust"
        assert "a\\|b\\_\\[red\\]&amp;%\\\\&lt;script>" in named["method"]
        assert [c.strip() for c in rows[3]][2:] == ["–"] * 5
        assert "- A note on &lt;b>\\_this\\_&lt;/b> 100% of it." in lines

    def test_latex(self, hostile):
        text = hostile.to_latex()
        assert text.isascii()
        comments = [line for line in text.splitlines() if line.startswith("%")]
        assert len(comments) == 2
        body = text[text.index("\\midrule") : text.index("\\bottomrule")]
        rows = [line for line in body.splitlines() if line.endswith("\\\\")]
        assert len(rows) == 2
        cells = [re.split(r"(?<!\\)&", row) for row in rows]
        assert {len(c) for c in cells} == {7}
        assert "98.8 $\\pm$ 0.1" in cells[0][2]
        assert "a|b\\_[red]\\&\\%" in cells[0][0]
        # Nothing that LaTeX reads is left as it was.
        plain = re.sub(r"\\(textbackslash|ensuremath|textless|textgreater|lbrace|rbrace|[&%$#_{}])",
                       "", cells[0][0])  # fmt: skip
        assert not set(plain) & set("&%#_$")

    def test_without_tabulate(self, hostile, monkeypatch):
        monkeypatch.setitem(sys.modules, "tabulate", None)
        for make in (hostile.to_markdown, hostile.to_latex):
            with pytest.raises(UserError, match=re.escape("pip install 'surestep[report]'")):
                make()
        hostile.to_csv()

    def test_the_dict_is_json(self, hostile):
        found = json.loads(json.dumps(hostile.to_dict(), allow_nan=False))
        assert (found["format"], found["version"]) == ("surestep-comparison", 1)
        row = found["rows"][0]
        assert row["clean_accuracy"] == {"mean": 0.98765, "std": 0.00123, "n": 3}
        assert row["fgsm"] is None
        assert not any(isinstance(v, float) and math.isnan(v) for v in row.values())


class TestSave:
    def test_every_file(self, hostile, tmp_path):
        for package in ("altair", "vl_convert", "jinja2", "tabulate"):
            pytest.importorskip(package)
        told: list[str] = []
        written = save(hostile, tmp_path / "out", command="surestep x", tell=told.append)
        names = ["comparison.json", "comparison.csv", "comparison.md", "comparison.tex"]
        names += ["report.html", "pareto.png", "pareto.svg"]
        assert [p.name for p in written] == names
        assert told == []
        found = json.loads(written[0].read_text("utf-8"))
        assert found["command"] == "surestep x"
        assert {"surestep", "torch", "python"} <= found["versions"].keys()
        assert written[1].read_text("utf-8") == hostile.to_csv()
        page = (tmp_path / "out" / "report.html").read_text("utf-8")
        assert "pareto" in page
        assert "<li>A note on &lt;b&gt;_this_&lt;/b&gt; 100%\nof it.</li>" in page
        assert "<script>$" not in page

    def test_what_is_not_installed_is_left_out(self, hostile, tmp_path, monkeypatch):
        (tmp_path / "report.html").write_text("old", "utf-8")
        monkeypatch.setitem(sys.modules, "tabulate", None)
        monkeypatch.setitem(sys.modules, "jinja2", None)
        told: list[str] = []
        written = save(hostile, tmp_path, tell=told.append)
        assert [p.name for p in written] == ["comparison.json", "comparison.csv"]
        assert [line.split(":")[0] for line in told] == [
            f"{name} left out" for name in ("comparison.md", "comparison.tex", "report.html")
        ]
        assert all("pip install 'surestep[report]'" in line for line in told)
        assert {p.name for p in tmp_path.iterdir()} == {"comparison.json", "comparison.csv"}


class TestMeasuring:
    """Processes of their own, with commands that import no torch."""

    def test_peak_memory_is_the_childs(self):
        told: list[str] = []
        code, peak, error = _process.measured(["--version"], told.append)
        assert (code, error, told) == (0, "", [])
        # This process holds torch, and a fork of it would be told to have needed as much.
        unit = 1 if sys.platform == "darwin" else 1024
        assert 1 < peak * unit / 1e6 < 100

    def test_the_error_line_is_passed_on(self):
        code, _, error = _process.measured(["trian"], lambda _: None)
        assert code == 2
        assert error.startswith("unknown command 'trian': did you mean 'train'?")

    def test_the_end_of_the_comparison_ends_the_training(self):
        sleep = [sys.executable, "-I", "-c", "import time; time.sleep(100)"]
        ended = subprocess.run(
            [sys.executable, "-I", "-c", _process.MEASURE, *sleep],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert ended.stdout.split()[0] == str(-signal.SIGTERM)


def test_the_note_on_precision_is_of_the_best_row():
    means = [{"worst_case_accuracy": SimpleNamespace(mean=mean)} for mean in (0.2, 0.8, 0.4)]
    rows = [SimpleNamespace(numbers=numbers) for numbers in means]
    low, high = wilson_interval(80, 100)
    assert f"{100 * low:.1f} to {100 * high:.1f}%" in _precision(rows, 100, "test")
