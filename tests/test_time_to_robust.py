"""The race's arithmetic: what runs against what, and how rows become lines."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import time_to_robust as race

from surestep import runs

RESULTS = Path(race.__file__).parent / "results"


@pytest.mark.parametrize("name", list(race.RACES))
def test_every_recipe_is_a_run_that_can_be_made(name):
    for recipe, changes in race.RACES[name].recipes.items():
        method, preset = recipe.split("/")[:2]
        config = runs.resolve({"method": method, **changes}, preset)
        assert config.dataset == name
        assert runs.build_method(config).slug == method
        row = {"method": method, "recipe": preset, "epochs": str(config.epochs)}
        assert race.name_of(row) == recipe
    assert set(race.RACES[name].dear) <= set(race.RACES[name].recipes)


@pytest.mark.parametrize("file", ["time_to_robust.csv", "mnist.csv"])
def test_the_presets_are_those_of_the_recorded_runs(file):
    """What README.md says of a preset was measured with these numbers."""
    rows = list(csv.DictReader((RESULTS / file).read_text("utf-8").splitlines()))
    assert rows
    for row in rows:
        changes = race.RECIPES.get(race.name_of(row), {})
        config = runs.resolve({"method": row["method"], **changes}, row["recipe"])
        recorded = [float(row[key]) for key in ("epochs", "batch_size", "lr")]
        assert [config.epochs, config.batch_size, config.lr] == recorded, row
        assert config.params == json.loads(row["params"]), row


DEMO = {"eps_warmup": 0.7, "epochs": 2, "batch_size": 64, "select": "last"}
LITE = {"lam": 0.2, "steps": 10, "fraction": 1 / 32, "every": 4}


@pytest.mark.parametrize(
    ("method", "preset", "expected"),
    [
        ("sat-r2", "mnist-speed", {"eps_warmup": 0.7, "model": "lenet+"}),
        ("sat-r2", "mnist-fast", {"eps_warmup": 0.0, "model": "lenet+"}),
        ("sat-r2", "cifar10-speed", {"eps_warmup": 0.0, "model": "preactresnet10-slim"}),
        ("sat-r2", "mnist-demo", {**DEMO, "lr": 0.1, "params": {"lam": 5.0, "alpha": 0.01}}),
        ("fgsm", "mnist-demo", {**DEMO, "lr": 0.03, "params": {}}),
        (
            *("sat-r1", "mnist-lite"),
            {"eps_warmup": 1.0, "epochs": 4, "batch_size": 64, "lr": 0.05, "params": LITE},
        ),
    ],
)
def test_what_else_the_presets_set(method, preset, expected):
    found = runs.resolve({"method": method}, preset)
    assert {key: getattr(found, key) for key in expected} == expected


def line(
    method, seed, worst, seconds, machine="one", recipe="mnist-speed", epochs="2", threads="2"
):
    return {
        **{"method": method, "recipe": recipe, "epochs": epochs, "seed": str(seed)},
        **{"clean": "0.9", "fgsm": "0.8", "worst_case": str(worst)},
        **{"train_seconds": str(seconds), "machine": f"{machine}, 2 cores", "threads": threads},
    }


def test_accuracy_is_of_all_machines_and_seconds_are_of_each(capsys):
    rows = [
        line("sat-r2", 0, 0.84, 10),
        line("sat-r2", 1, 0.88, 30),
        # On one core of two, beside another: its accuracy counts, its seconds do not.
        line("sat-r2", 2, 0.89, 900, threads="1"),
        # The same seed again elsewhere. Its seconds count there, its accuracy only if it differs.
        line("sat-r2", 1, 0.88, 70, "two"),
        line("sat-r2", 0, 0.83, 70, "two"),
        line("pgd", 0, 0.91, 200),
        line("pgd", 0, 0.84, 100, epochs="1.25"),
        line("pgd", 0, 0.86, 40, epochs="1.5"),
        line("sat-r1", 0, 0.5, 10, recipe="cifar10-speed", epochs="4"),
    ]
    race.table(rows, race.RACES["mnist"])
    said = capsys.readouterr().out.splitlines()[2:]
    assert said[0].startswith(
        "| sat-r2/mnist-speed | 2 | 4 | 90.0 ± 0.0 | 80.0 ± 0.0 | 86.0 ± 2.9 | 80, 85 | "
    )
    assert said[0].endswith(
        "20.0 ± 14.1, 0.200, 0.100, 0.500 (n = 2, one, 2 cores); "
        "70.0 ± 0.0, –, –, – (n = 2, two, 2 cores) |"
    )
    assert said[1].endswith("| 80, 85, 90 | 200.0, 2.000, 1.000, 5.000 (n = 1, one, 2 cores) |")
    assert said[2].startswith("| pgd/mnist-speed/1.25 | 1.25 | 1 |")
    assert len(said) == 4


def test_a_recipe_of_the_other_race_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["time_to_robust.py", "cifar10", "--only", "rs-fgsm/mnist"])
    with pytest.raises(SystemExit) as e:
        race.main()
    assert e.value.code == 2
    assert "rs-fgsm/mnist is none of sat-r1/cifar10-speed" in capsys.readouterr().err
