"""What the pages say of names is what there is, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from surestep import data, models
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


def test_the_board_begins_as_written():
    head = (ROOT / "benchmarks" / "leaderboard.head.md").read_text("utf-8")
    assert (ROOT / "docs" / "leaderboard.md").read_text("utf-8").startswith(head)
