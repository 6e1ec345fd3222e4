"""What the pages say of names is what there is, and their links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import _board_page
import leaderboard
import pytest
import torch
from torch import nn

import surestep
from surestep import data, methods, models
from surestep.evaluation import suite

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def anchors(page):
    """The names by which GitHub knows the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_links_into_pages_lead_to_headings():
    found = [
        (page, link, anchor)
        for page in PAGES
        for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text("utf-8"))
    ]
    assert found
    lost = [
        (page.name, link, anchor)
        for page, link, anchor in found
        if anchor not in anchors(page.parent / link if link else page)
    ]
    assert lost == []


def test_every_benchmark_is_listed():
    folder = ROOT / "benchmarks"
    told = set(re.findall(r"`(\w+\.py)`", (folder / "README.md").read_text("utf-8")))
    assert told == {path.name for path in folder.glob("[!_]*.py")}


def test_every_data_set_and_model_is_described():
    text = (ROOT / "docs" / "data-and-models.md").read_text("utf-8")
    told = {name.partition(":")[0] for name in re.findall(r"`([a-z0-9+:-]+)[A-Z]*`", text)}
    assert {*data.names(), *models.names()} <= told


def test_budgets_are_told_as_they_are():
    text = (ROOT / "docs" / "evaluate.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    assert {
        name: tuple(row.strip("`").split("`, `")) for name, row in rows.items()
    } == suite.BUDGETS


def test_the_extras_that_are_named_exist():
    """In messages, which pip commands are copied from."""
    listed = (ROOT / "pyproject.toml").read_text("utf-8").partition("optional-dependencies]")[2]
    extras = set(re.findall(r"^([\w-]+) = \[", listed.partition("\n[")[0], re.MULTILINE))
    code = "".join(p.read_text("utf-8") for p in (ROOT / "src").rglob("*.py"))
    named = {
        name for names in re.findall(r"surestep\[([\w,-]+)\]", code) for name in names.split(",")
    }
    assert {"hf-models", "report", "timm"} <= named <= extras


def test_the_board_is_what_its_rows_say(monkeypatch, tmp_path):
    """Written anew it is the same, but for the plots, which are left out here."""
    rows, page = ROOT / "benchmarks" / "results" / "leaderboard.csv", tmp_path / "leaderboard.md"
    monkeypatch.setattr(_board_page, "plot", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", "--out", str(rows), "--table", str(page)])
    leaderboard.main()
    told = (ROOT / "docs" / "leaderboard.md").read_text("utf-8")
    again = page.read_text("utf-8")
    assert told.count("| standard |") >= 2, "a table for each board"
    assert told.splitlines() == again.splitlines(), (
        "run python benchmarks/leaderboard.py --table docs/leaderboard.md"
    )


def test_the_number_of_methods_is_told():
    told = re.findall(r"\*\*(\d+) training methods", (ROOT / "README.md").read_text("utf-8"))
    assert told == [str(len(methods.names()))]


def test_the_table_of_a_row_has_what_a_row_has():
    """``collapse`` is left out if there was none."""
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 3
    found = surestep.fit(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        (x, y),
        methods.SATR2(surestep.Linf(0.1)),
        epochs=2,
        batch_size=10,
        engine="reference",
        val_attacks=("fgsm",),
        quiet=True,
        on_epoch=lambda *_: True,
    )
    text = (ROOT / "docs" / "python.md").read_text("utf-8")
    table = text.partition("\nA row has\n")[2].partition("\n\n## ")[0]
    keys = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    told = set(re.findall(r"`(\w+)`", " ".join(keys)))
    row = {*found.history[-1]} - {"distance"}  # a term of SAT-R2's own
    assert {"val_fgsm"} <= row
    assert row - {"val_fgsm"} == told - {"val_", "collapse"}
    assert {"val_", "collapse"} <= told
