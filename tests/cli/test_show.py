"""Signs of life while a command works."""

import io
import sys
import time

from surestep import clock
from surestep.cli._show import progress_bar


def test_a_long_attack_reports_while_it_runs(monkeypatch):
    """Not only between attacks: one attack on one batch can take many minutes."""
    monkeypatch.setattr(clock, "SECONDS_BETWEEN_LINES", 0.02)
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with progress_bar("attacking") as watched:
        watched["progress"](250, 1000, 0.25)
        watched["tell"]("pgd-100 on images 1 to 500; worst case 25.0% so far")
        end = time.monotonic() + 60
        while said.getvalue().count("worst case") < 2 and time.monotonic() < end:
            time.sleep(0.01)
    lines = said.getvalue().splitlines()
    told = [line for line in lines if line != "attacking; 0 min"]  # before it was told
    assert len(told) >= 2
    assert set(told) == {"attacking; pgd-100 on images 1 to 500; worst case 25.0% so far; 0 min"}
    time.sleep(0.1)
    assert said.getvalue().splitlines() == lines
