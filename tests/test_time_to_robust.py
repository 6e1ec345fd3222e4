"""The race's arithmetic: what runs against what, and how rows become lines."""

from __future__ import annotations

import pytest
import time_to_robust as race

from surestep import runs


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
        # The same seed again elsewhere: its seconds count there, its accuracy once.
        line("sat-r2", 1, 0.10, 70, "two"),
        line("pgd", 0, 0.91, 200),
        line("pgd", 0, 0.84, 100, epochs="1.25"),
        line("sat-r1", 0, 0.5, 10, recipe="cifar10-speed", epochs="4"),
    ]
    race.table(rows, race.RACES["mnist"])
    said = capsys.readouterr().out.splitlines()[2:]
    assert said[0].startswith(
        "| sat-r2/mnist-speed | 2 | 3 | 90.0 ± 0.0 | 80.0 ± 0.0 | 87.0 ± 2.6 | 80, 85 | "
    )
    assert said[0].endswith(
        "20.0 ± 14.1, 0.200, 0.100 (n = 2, one, 2 cores); 70.0, –, – (n = 1, two, 2 cores) |"
    )
    assert said[1].endswith("| 80, 85, 90 | 200.0, 2.000, 1.000 (n = 1, one, 2 cores) |")
    assert said[2].startswith("| pgd/mnist-speed/1.25 | 1.25 | 1 |")
    assert len(said) == 3


def test_a_recipe_of_the_other_race_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["time_to_robust.py", "cifar10", "--only", "rs-fgsm/mnist"])
    with pytest.raises(SystemExit) as e:
        race.main()
    assert e.value.code == 2
    assert "rs-fgsm/mnist is none of sat-r1/cifar10-speed" in capsys.readouterr().err
