"""Signs of life while a command works."""

import time

from surestep import clock
from surestep.cli._show import progress_bar


def test_a_long_attack_reports_while_it_runs(monkeypatch, capsys):
    """Not only between attacks: one attack on one batch can take many minutes."""
    monkeypatch.setattr(clock, "SECONDS_BETWEEN_LINES", 0.02)
    with progress_bar("attacking") as watched:
        watched.progress(250, 1000, 0.25)
        watched.tell("pgd-100 on images 1 to 500; worst case 25.0% so far")
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line != "attacking; 0 min"]  # before it was told
    assert len(told) >= 2
    assert set(told) == {"attacking; pgd-100 on images 1 to 500; worst case 25.0% so far; 0 min"}
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
