"""The examples run as they are; what README.md and the documents show can be typed."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

import click
import pytest
import torch

from surestep.data import Images
from surestep.methods._base import METHODS

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def blocks():
    """The code blocks of README.md and the documents, as triples (page, language, text)."""
    return [(page.name, *b) for page in PAGES for b in BLOCK.findall(page.read_text("utf-8"))]


def test_there_are_examples():
    assert "own_loop.py" in {p.name for p in EXAMPLES}


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_runs(path, tmp_path, monkeypatch, capsys):
    """Each as it is, but on a sixteenth of the images it asks for."""
    first = Images.first
    monkeypatch.setattr(Images, "first", lambda self, n: first(self, max(n // 16, min(n, 40))))
    monkeypatch.chdir(tmp_path)
    # An example may register a method, which other tests must not find.
    with torch.random.fork_rng(), mock.patch.dict(METHODS):
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example shows what came of it"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_says_what_it_is(path):
    assert path.read_text("utf-8").startswith('"""')


def test_ones_own_loop_is_short():
    lines = (ROOT / "examples" / "own_loop.py").read_text("utf-8").splitlines()
    assert len(lines) <= 25


def test_python_in_the_documents_compiles(blocks):
    found = [(page, text) for page, language, text in blocks if language == "python"]
    assert len({page for page, _ in found}) > 1
    for page, text in found:
        compile(text, page, "exec")


def test_commands_in_the_documents_exist(blocks):
    """Each line is read by the command it names, options, values and all, without running it."""
    texts = [text.replace("\\\n", " ") for _, language, text in blocks if language != "python"]
    lines = [line for text in texts for line in text.split("\n")]
    commands = [shlex.split(x, comments=True) for x in lines if x.startswith("surestep ")]
    assert commands
    for _, name, *args in commands:
        command = getattr(importlib.import_module(f"surestep.cli.{name}"), name)
        assert isinstance(command.make_context(name, list(args)), click.Context)
