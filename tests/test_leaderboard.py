"""The board's arithmetic: what is run, and how rows become lines."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import _board_page as page
import leaderboard as board
import pytest
from _table import append, read

from surestep import methods, runs


@pytest.mark.parametrize("name", list(board.BOARDS))
def test_every_row_is_a_run_that_can_be_made(name):
    found = list(board.rows(name, [], None))
    settings = board.BOARDS[name]
    assert len(found) == settings.seeds * len(settings.eps) * len(board.entries(settings))
    if not settings.only:
        assert set(methods.names()) <= {entry for entry, _ in found}
    for _, row in found:
        config = row.resolve()
        assert runs.build_method(config).slug == row.method
        assert config.epochs == settings.settings["epochs"]
    # All methods have one seed before any has two.
    seeds = [row.seed for _, row in found]
    assert seeds == sorted(seeds)
    plain = {entry for entry, _ in board.rows(name, [], None, plain=True)}
    assert plain == {entry for entry, _ in found} - set(board.COMBINED)


def line(entry, seed, worst, verdict, seconds, machine="one"):
    return {
        **{
            "entry": entry,
            "seed": str(seed),
            "eps": "0.3",
            "passes": "5",
            "clean": "0.9",
            "fgsm": "0.8",
        },
        **{"found": "0.5", "audit_n": "100", "worst_case": str(worst), "verdict": verdict},
        **{"train_seconds": str(seconds), "machine": machine, "date": "2026-11-23"},
    }


def test_lines_are_means_and_a_masked_seed_marks_the_method():
    rows = [
        line("standard", 0, 0.0, "not robust", 50),
        line("standard", 1, 0.0, "not robust", 30),
        line("one", 0, 0.8, "robust", 80),
        line("one", 1, 0.6, "pseudo-robust", 80),
        line("two", 0, 0.75, "robust", 120),
    ]
    two, one, standard = page.means(rows)
    assert [two["entry"], one["entry"], standard["entry"]] == ["two", "one", "standard"]
    assert one["worst"] == pytest.approx(70)
    assert one["spread"] == pytest.approx(14.142, abs=1e-3)
    assert two["spread"] is None
    assert (one["ratio"], two["ratio"]) == (2.0, 3.0)
    assert (one["masked"], two["masked"]) == (True, False)
    text = page.table([two, one, standard])
    assert "| two | 1 | 5 | 3.00 | 90.0 | 80.0 | 75.0 | 50 | robust |" in text
    assert "~~one~~ masked" in text
    assert "robust (1), pseudo-robust (1)" in text


def test_rows_of_a_method_as_it_was_count_only_while_there_are_no_others(monkeypatch):
    monkeypatch.setattr(board, "CHANGED", {"one": "2026-11-29", "two": "2026-11-29"})
    rows = [
        {**line("one", 0, 0.2, "robust", 80), "date": "2026-11-28"},
        {**line("one", 1, 0.8, "robust", 80), "date": "2026-11-29"},
        {**line("two", 0, 0.5, "robust", 80), "date": "2026-11-28"},
        {**line("other", 0, 0.4, "robust", 80), "date": "2026-11-28"},
    ]
    one, two, other = page.means(rows, board.outdated)
    assert (one["seeds"], one["worst"], two["worst"]) == (1, 80.0, 50.0)
    assert [found["outdated"] for found in (one, two, other)] == [False, True, False]
    assert "| two † |" in page.table([one, two, other])
    assert "| other |" in page.table([one, two, other])


def test_seconds_are_held_against_standard_training_on_the_same_machine():
    rows = [
        line("standard", 0, 0.0, "not robust", 40),
        line("standard", 1, 0.0, "not robust", 400, "slow"),
        line("one", 0, 0.8, "robust", 80),
        line("one", 1, 0.6, "robust", 1200, "slow"),
        line("one", 2, 0.4, "robust", 1, "without a standard row"),
    ]
    (one, _), (alone,) = page.means(rows), page.means(rows[4:])
    assert (one["ratio"], one["seeds"]) == (2.5, 3)
    assert math.isnan(alone["ratio"])


def test_seconds_are_held_against_an_estimate_of_their_own_process():
    rows = [
        line("standard", 0, 0.0, "not robust", 40),
        {**line("one", 0, 0.8, "robust", 90), "standard_seconds": "30", "date": "2026-11-30T01:00"},
        {**line("two", 0, 0.6, "robust", 90), "standard_seconds": "", "date": "2026-11-29T18:00"},
    ]
    one, two, _ = page.means(rows)
    assert one["ratio"] == 3.0
    assert math.isnan(two["ratio"])  # measured beside other work
    assert "| two | 1 | 5 |  |" in page.table([two])


def test_rows_of_a_method_as_it_was_lead_nothing(monkeypatch):
    monkeypatch.setattr(board, "CHANGED", {"old": "2026-11-29"})
    rows = [
        line("standard", 0, 0.0, "not robust", 40),
        line("sat-r2", 0, 0.7, "robust", 80),
        line("old", 0, 0.9, "robust", 60),
        {**line("new", 0, 0.8, "robust", 0), "machine": "without a standard row"},
    ]
    text = page.against(page.means(rows, board.outdated))
    assert "best other method: **new**, 80.0. The best SAT entry is 10.0 points below it" in text


def test_a_row_is_run_again_when_its_settings_change():
    pairs = list(board.rows("mnist", ["sat-r2"], [0, 1, 2, 3, 4]))
    now = board.trained_with(pairs[0][1].resolve())
    found = [
        {
            **{"board": "mnist", "entry": "sat-r2", "eps": "0.3", "seed": str(seed)},
            "date": "2026-11-23",
            **{"params": f'{{"lam": {lam}, "alpha": 0.01}}', "settings": json.dumps(settings)},
        }
        for seed, (lam, settings) in enumerate(
            [
                (5.0, {"epochs": 2}),  # as older rows have it
                (4.0, now),
                (5.0, {**now, "clip_grad": 1.0}),  # of a preset that clipped
                (5.0, {**now, "gone": 1}),  # of a version that had another setting
            ]
        )
    ]
    left = board.missing("mnist", iter(pairs), found)
    assert [row.seed for _, row in left] == [1, 2, 3, 4]


def test_the_benchmarks_own_protocol():
    """As its paper has it; PGD-AT without an average is there, too."""
    pairs = dict(board.rows("fastat", [], [0]))
    assert {"sat-r1", "pgd-wa", "sat-r2 + hypersphere"} <= set(pairs)
    found = pairs["rs-fgsm"].resolve()
    assert (found.model, found.epochs, found.schedule, found.lr) == (
        "resnet18",
        100,
        "onecycle",
        0.1,
    )
    assert (found.label_smoothing, found.ema, found.val_images) == (0.4, 0.9995, 1000)
    plain, averaged = pairs["pgd"].resolve(), pairs["pgd-wa"].resolve()
    assert plain.params == averaged.params == {"steps": 10, "alpha": 2 / 255}
    assert (plain.ema, averaged.ema) == (None, 0.9995)
    assert board.BOARDS["fastat"].attacks == ("fgsm", "pgd-50", "pgd-50-margin", "autoattack")


@pytest.mark.usefixtures("small_budget")
def test_a_row_is_trained_judged_and_audited(monkeypatch):
    # Of AutoAttack's parts one that finds nothing: what they find is no matter of the board.
    monkeypatch.setattr("surestep.attacks.auto.PARTS", {"none": lambda model, x, y, threat: x})
    small = {"model": "cnn-small", "epochs": 0.01, "val_images": 50, "val_attacks": ["fgsm"]}
    tiny = replace(
        board.BOARDS["fastat"], settings=small, preset="mnist", steps=2, n=20, audit_n=20
    )
    monkeypatch.setitem(board.BOARDS, "fastat", tiny)
    ((_, row),) = board.rows("fastat", ["fgsm"], [0])
    found = board.train_judge_audit("fastat", row, None)
    by_others = {"entry", "commit", "machine", "date", "command"}
    assert set(found) - {"machine"} == set(board.FIELDS) - by_others
    assert (found["board"], found["n"], found["audit_n"]) == ("fastat", 20, 20)
    assert found["worst_case"] <= min(found["pgd"], found["pgd_margin"])
    assert not board.differs(row.resolve(), {k: str(v) for k, v in found.items()})


def test_of_a_seed_that_ran_twice_the_later_row_counts():
    rows = [
        line("standard", 0, 0.0, "not robust", 40),
        line("one", 0, 0.1, "pseudo-robust", 80),
        line("one", 0, 0.7, "robust", 80),
    ]
    one = page.means(rows)[0]
    assert (one["seeds"], one["masked"]) == (1, False)
    assert one["worst"] == pytest.approx(70)


def test_the_best_sat_is_held_against_the_best_of_the_rest():
    rows = [
        line("standard", 0, 0.0, "not robust", 40),
        line("sat-r2", 0, 0.7, "robust", 80),
        line("sat-r1", 0, 0.9, "pseudo-robust", 80),
        line("sat-r2 + ema", 0, 0.75, "robust", 100),
        line("pgd", 0, 0.78, "robust", 400),
    ]
    text = page.against(page.means(rows))
    assert "Best SAT entry without additions: **sat-r2**, 70.0 at 2.00 times the time" in text
    assert "**sat-r2 + ema**, 75.0 at 2.50" in text
    assert "**pgd**, 78.0 at 10.00" in text
    assert "3.0 points below it" in text
    # Nothing to compare with.
    assert page.against(page.means(rows[1:2])) == ""


@pytest.mark.parametrize(
    ("verdict", "found", "date", "told"),
    [
        ("not robust", "0.2", "2026-11-29T10", "not robust ‡"),
        ("not robust", "0.02", "2026-11-29T10", "not robust"),  # surely below 15% of 90%
        ("not robust", "0.2", "2026-11-29T11", "not robust"),
        ("inconclusive", "0.2", "2026-11-29T10", "inconclusive"),
    ],
)
def test_a_verdict_that_the_rule_of_today_might_change_is_marked(verdict, found, date, told):
    row = {**line("one", 0, 0.2, verdict, 80), "found": found, "date": date}
    assert page.means([row])[0]["verdict"] == told


def test_a_seed_that_diverged_is_named_and_counts_in_no_mean():
    gone = {**line("one", 1, "", page.DIVERGED, ""), "clean": "", "fgsm": "", "found": ""}
    rows = [line("standard", 0, 0.0, "not robust", 40), line("one", 0, 0.8, "robust", 80), gone]
    one, _ = page.means(rows)
    assert (one["worst"], one["spread"], one["seeds"]) == (pytest.approx(80), None, 1)
    assert one["verdict"] == "robust (1), diverged (1)"
    assert [found["entry"] for found in page.means([gone])] == []


def test_rows_of_other_columns_are_not_mixed(tmp_path):
    out = tmp_path / "rows.csv"
    append(out, ["one", "two"], {"one": 1, "two": 2})
    append(out, ["one", "two"], {"one": 3, "two": 4, "more": 5})
    assert read(out)[1] == {"one": "3", "two": "4"}
    with pytest.raises(SystemExit, match="other columns"):
        append(out, ["one", "three", "two"], {"one": 1})
