"""The board's arithmetic: what is run, and how rows become lines."""

from __future__ import annotations

import math

import leaderboard as board
import pytest

from surestep import methods, runs


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_every_row_is_a_run_that_can_be_made(name):
    found = list(board.rows(name, [], None))
    settings = board.BOARDS[name]
    assert len(found) == settings.seeds * len(settings.eps) * len(board.entries(settings))
    if name == "mnist":
        assert set(methods.names()) <= {entry for entry, _ in found}
    for _, row in found:
        config = runs.resolve({"method": row.method, "seed": row.seed, **row.changes}, row.recipe)
        assert runs.build_method(config).slug == row.method
        assert config.epochs == settings.settings["epochs"]
    # All methods have one seed before any has two.
    seeds = [row.seed for _, row in found]
    assert seeds == sorted(seeds)


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
        **{"found": "0.5", "worst_case": str(worst), "verdict": verdict},
        **{"train_cpu_seconds": str(seconds), "machine": machine},
    }


def test_lines_are_means_and_a_masked_seed_marks_the_method():
    rows = [
        line("standard", 0, 0.0, "not robust", 50),
        line("standard", 1, 0.0, "not robust", 30),
        line("one", 0, 0.8, "robust", 80),
        line("one", 1, 0.6, "pseudo-robust", 80),
        line("two", 0, 0.75, "robust", 120),
    ]
    two, one, standard = board.means(rows)
    assert [two["entry"], one["entry"], standard["entry"]] == ["two", "one", "standard"]
    assert one["worst"] == pytest.approx(70)
    assert one["spread"] == pytest.approx(14.142, abs=1e-3)
    assert two["spread"] is None
    assert (one["ratio"], two["ratio"]) == (2.0, 3.0)
    assert (one["masked"], two["masked"]) == (True, False)
    text = board.table([two, one, standard])
    assert "| two | 1 | 5 | 3.00 | 90.0 | 80.0 | 75.0 | 50 | robust |" in text
    assert "~~one~~ masked" in text
    assert "robust (1), pseudo-robust (1)" in text


def test_seconds_are_held_against_standard_training_on_the_same_machine():
    rows = [
        line("standard", 0, 0.0, "not robust", 40),
        line("standard", 1, 0.0, "not robust", 400, "slow"),
        line("one", 0, 0.8, "robust", 80),
        line("one", 1, 0.6, "robust", 1200, "slow"),
        line("one", 2, 0.4, "robust", 1, "without a standard row"),
    ]
    (one, _), (alone,) = board.means(rows), board.means(rows[4:])
    assert (one["ratio"], one["seeds"]) == (2.5, 3)
    assert math.isnan(alone["ratio"])


def test_a_row_is_run_again_when_its_parameters_change():
    pairs = list(board.rows("mnist", ["sat-r2"], [0, 1, 2]))
    found = [
        {"board": "mnist", "entry": "sat-r2", "eps": "0.3", "seed": seed, "params": params}
        for seed, params in (
            ("0", '{"lam": 5.0, "alpha": 0.01}'),
            ("1", '{"lam": 4.0, "alpha": 0.01}'),
        )
    ]
    left = board.missing(iter(pairs), found)
    assert [row.seed for _, row in left] == [1, 2]


def test_of_a_seed_that_ran_twice_the_later_row_counts():
    rows = [
        line("standard", 0, 0.0, "not robust", 40),
        line("one", 0, 0.1, "pseudo-robust", 80),
        line("one", 0, 0.7, "robust", 80),
    ]
    one = board.means(rows)[0]
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
    text = board.against(board.means(rows))
    assert "The best SAT alone: **sat-r2**, 70.0 at 2.00 times the time" in text
    assert "**sat-r2 + ema**, 75.0 at 2.50" in text
    assert "**pgd**, 78.0 at 10.00" in text
    assert "-3.0 points" in text
    # Nothing to compare with.
    assert board.against(board.means(rows[1:2])) == ""


def test_a_seed_that_diverged_is_named_and_counts_in_no_mean():
    gone = {**line("one", 1, "", board.DIVERGED, ""), "clean": "", "fgsm": "", "found": ""}
    rows = [line("standard", 0, 0.0, "not robust", 40), line("one", 0, 0.8, "robust", 80), gone]
    one, _ = board.means(rows)
    assert (one["worst"], one["spread"], one["seeds"]) == (pytest.approx(80), None, 1)
    assert one["verdict"] == "robust (1), diverged (1)"
    assert [found["entry"] for found in board.means([gone])] == []
