from __future__ import annotations

import json

import pytest
import yaml

import surestep
from surestep import UserError, data, runs
from surestep.posthoc.mean_sparse import layers

QUICK = ("--mean-sparse", "--n", "40", "--n-search", "20", "--attacks", "pgd-5,square-20")


def judged(before, after):
    """What a hardening found: these worst cases, on many images."""

    def accuracies(worst, attacks):
        shares = {"clean_accuracy": 1.0, "worst_case_accuracy": worst, "n": 8000}
        return {**shares, "robust_accuracy": dict.fromkeys(attacks, 0.5)}

    names = ("apgd-ce", "pgd-50-margin", "square-1000", "transfer")
    through = ("apgd-ce-bpda", "pgd-50-margin-bpda")
    return {
        "threshold": 0.2,
        "split": "test",
        "before": accuracies(before, names),
        "after": accuracies(after, (*names, *through)),
        "saved": 1,
        "lost": 4,
    }


class TestHarden:
    def test_it_writes_a_run_that_the_other_commands_take(self, done, finished, tmp_path):
        out, numbers = tmp_path / "hard", tmp_path / "found.json"
        said = done(
            "harden", finished, *QUICK, "--threshold", "0.2", "--out", out, "--json", numbers
        )
        found = json.loads(numbers.read_text())
        assert [row["threshold"] for row in found["search"]] == [0.0, 0.2]
        assert found["threshold"] in (0.0, 0.2)
        assert "before" in said
        assert "after" in said
        assert f"threshold {found['threshold']:g}" in said
        assert found["after"]["n"] == found["before"]["n"] <= 40
        worst = [found[k]["worst_case_accuracy"] * found["after"]["n"] for k in ("after", "before")]
        assert found["saved"] - found["lost"] == round(worst[0]) - round(worst[1])
        assert f"({found['saved']} saved, {found['lost']} lost)" in " ".join(said.split())
        assert "pgd-5-bpda" in found["after"]["robust_accuracy"]
        config = yaml.safe_load((out / "config.yaml").read_text())
        assert config["mean_sparse"] == found["threshold"]
        run = runs.load(out, "cpu")
        assert len(layers(run.model)) == 3
        assert all(
            float(layer.std.min()) >= 0 < float(layer.std.max()) for layer in layers(run.model)
        )
        judged = tmp_path / "judged.json"
        done("evaluate", out, "--attacks", "pgd-5", "--n", "40", "--json", judged)
        assert json.loads(judged.read_text())["clean_accuracy"] == pytest.approx(
            found["after"]["clean_accuracy"]
        )

    @pytest.mark.parametrize("split", ["test", "validation"])
    def test_by_default_the_judges_include_transfer_from_the_run(
        self, cli, finished, tmp_path, monkeypatch, split
    ):
        asked, numbers = [], tmp_path / "found.json"

        def evaluate(model, data, threat, attacks, **options):
            asked.append((tuple(attacks), options["batch_size"], len(options["sources"])))
            return surestep.evaluate(model, data, threat, ["fgsm"], n=options.get("n"))

        for judging in ("posthoc.hardening", "runs._harden"):
            monkeypatch.setattr(f"surestep.{judging}.evaluate", evaluate)
        few = ("--n", "20", "--n-search", "10", "--batch-size", "64", "--out", tmp_path / "hard")
        on = ("--split", split, "--json", numbers)
        result = cli("harden", finished, "--mean-sparse", "--threshold", "0.2", *few, *on)
        assert result.code == 0
        for when in ("before", "after"):  # the longest part
            assert f"attacking {split} images {when} hardening\n" in result.err
        assert f" points on 20 {split} images (" in result.out
        # The best threshold on the same images is no fair judge of itself.
        assert ("; optimistic: " in result.out) == (split == "validation")
        assert json.loads(numbers.read_text())["split"] == split
        assert {size for _, size, _ in asked} == {64}
        assert {count for *_, count in asked} == {1}
        assert ["transfer" in attacks for attacks, *_ in asked] == [False, False, True, True]

    def test_data_without_a_test_split_are_told_first(
        self, refused, finished, tmp_path, monkeypatch
    ):
        load = data.load

        def no_test(dataset, split, **options):
            if split == "test":
                raise UserError("it has no test split")
            return load(dataset, split, **options)

        monkeypatch.setattr(data, "load", no_test)
        monkeypatch.setattr("surestep.posthoc.harden", lambda *_, **__: pytest.fail("it searched"))
        line = refused("harden", finished, "--mean-sparse", "--out", tmp_path / "out")
        assert "it has no test split" in line

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ((), "--mean-sparse"),
            (("--mean-sparse", "--threshold", "much"), "'much'"),
            (("--mean-sparse", "--threshold", ","), "--threshold ',': give standard deviations"),
            *(
                (
                    ("--mean-sparse", "--threshold", value),
                    f"thresholds [{found}]: give finite standard deviations",
                )
                for value, found in (("-1", "-1.0"), ("0.1,inf", "0.1, inf"), ("nan", "nan"))
            ),
            (("--mean-sparse", "--attacks", "pdg"), "'pdg'"),
            (("--mean-sparse",), "cannot make the folder"),
        ],
    )
    def test_mistakes(self, refused, finished, tmp_path, args, words):
        out = tmp_path / "out"
        if words == "cannot make the folder":
            out.touch()
            out = out / "deep" / "run"
        assert words in refused("harden", finished, *args, "--out", out)
        assert not out.exists()

    @pytest.mark.parametrize(
        ("run", "folder"),
        [
            ("runs/one/", "runs/one-hardened"),
            ("one", "one-hardened"),
            (".", "{here}-hardened"),
            ("../one/..", "{above}-hardened"),
        ],
    )
    def test_the_folder_by_default(self, refused, tmp_path, monkeypatch, run, folder):
        asked = []

        def harden(run, out, **_):
            asked.append(out)
            raise UserError("enough")

        monkeypatch.setattr(runs, "harden", harden)
        monkeypatch.chdir(tmp_path)
        refused("harden", run, "--mean-sparse")
        assert asked == [folder.format(here=tmp_path, above=tmp_path.parent)]

    def test_rows_of_the_search_are_progress(self, cli, tmp_path, monkeypatch):
        """The reader of stdout may leave before anything is written."""
        row = {"threshold": 0.2, "n": 20, "clean_accuracy": 1.0, "worst_case_accuracy": 0.5}

        def harden(*_, progress, **__):
            progress(row)
            return judged(before=0.5, after=0.5)

        monkeypatch.setattr(runs, "harden", harden)
        found = cli("harden", "run", "--mean-sparse", "--out", tmp_path / "hard")
        assert "threshold 0.2, on 20 validation images: clean 100.0%" in found.err
        assert "on 20 validation" not in found.out
        assert "before" in found.out

    def test_no_number_is_cut(self, done, monkeypatch):
        monkeypatch.setattr(runs, "harden", lambda *_, **__: judged(before=0.5004, after=0.5))
        monkeypatch.setenv("COLUMNS", "80")
        folder = f"runs/{'long' * 30}-hardened"
        said = done("harden", "run", "--mean-sparse", "--out", folder)
        assert "…" not in said
        for name in ("apgd-ce", "pgd-50-margin", "square-1000", "transfer", "pgd-50-margin-bpda"):
            (line,) = (line.split() for line in said.splitlines() if line.split()[:1] == [name])
            shares = ["50.0%", "(48.9-51.1)"]
            assert line[1:] == (shares if name.endswith("-bpda") else shares * 2)
        assert "worst case +0.0 points" in said
        assert f"written to {folder}; audit it: surestep audit {folder}\n" in said

    def test_an_existing_folder_is_left_alone(self, refused, finished, run):
        assert "--overwrite" in refused("harden", finished, *QUICK, "--out", run)

    def test_the_run_itself_is_never_replaced(self, refused, run, tools):
        before = tools.contents(run)
        args = ("harden", run, *QUICK, "--overwrite")
        assert "the run itself, which is kept" in refused(*args, "--out", run)
        assert "the run itself" in refused(*args, "--out", f"{run}/../{run.name}")
        assert tools.contents(run) == before

    def test_it_is_compared_and_never_resumed(self, done, refused, finished, tmp_path, tools):
        out = tmp_path / "hard"
        done("harden", finished, *QUICK, "--threshold", "0.1", "--out", out)
        before = tools.contents(out)
        args = ("--attacks", "fgsm", "--no-audit", "--n", "20", "--json", "-")
        found = json.loads(done("compare", finished, out, *args))
        assert [row["method"].partition(" ")[0] for row in found["rows"]] == ["sat-r3", "sat-r3"]
        assert "mean_sparse" in found["rows"][1]["method"]
        assert "hardened after training" in refused("train", "--resume", out)
        again = ("train", "--config", out / "config.yaml", "--out", tmp_path / "again")
        said = "to a run hardened after training: take the config.yaml of the run it was made from"
        assert said in refused(*again)
        assert tools.contents(out) == before

    def test_once_is_enough(self, done, refused, finished, tmp_path):
        out = tmp_path / "hard"
        done("harden", finished, *QUICK, "--threshold", "0.1", "--out", out)
        assert "hardened already" in refused("harden", out, *QUICK, "--out", tmp_path / "more")
