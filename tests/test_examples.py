"""The examples run as they are; what README.md and the documents show can be typed."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

import click
import pytest
import torch

import surestep
from surestep.config import FitSettings
from surestep.data import Images
from surestep.methods._registry import METHODS

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


class Names(ast.NodeVisitor):
    """Looks up what a program names of surestep, and whether its calls can be made.

    Attributes:
        known: what a name stands for, of names that surestep or one of its parts was given.
        found: how many names and calls were looked at.
    """

    def __init__(self):
        self.known, self.found = {"surestep": surestep}, 0

    def visit_Import(self, node):
        for one in node.names:
            if one.name.split(".")[0] == "surestep":
                module = importlib.import_module(one.name)
                self.known[one.asname or "surestep"] = module if one.asname else surestep

    def visit_ImportFrom(self, node):
        if node.module.split(".")[0] == "surestep":
            for one in node.names:
                module = importlib.import_module(node.module)
                self.known[one.asname or one.name] = getattr(module, one.name)
                self.found += 1

    def visit_Attribute(self, node):
        self.meaning(node)
        self.generic_visit(node)

    def visit_Call(self, node):
        function = self.meaning(node.func)
        if function is not None:
            self.found += 1
            names = [k.arg for k in node.keywords if k.arg]
            if not any(isinstance(a, ast.Starred) for a in node.args):
                given = dict.fromkeys(names)
                inspect.signature(function).bind_partial(*node.args, **given)
            if function is surestep.fit:
                own = inspect.signature(function).parameters
                assert {*names} <= {*own, *FitSettings.model_fields}
        self.generic_visit(node)

    def meaning(self, node):
        """Return what an expression stands for; None if that is not surestep's or not known."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            whole = self.meaning(node.value)
            if whole is None or not (inspect.ismodule(whole) or inspect.isclass(whole)):
                return None  # an attribute of a value, which may be made when it is created
            self.found += 1
            return getattr(whole, node.attr)
        if isinstance(node, ast.Call) and self.meaning(node.func) is surestep.methods.get:
            return surestep.methods.get(ast.literal_eval(node.args[0]))
        return None


def test_python_in_the_documents_names_what_there_is(blocks):
    """Not what its variables hold: most blocks begin where another ends."""
    programs = [(page, text) for page, language, text in blocks if language == "python"]
    assert len({page for page, _ in programs}) > 1
    names = Names()
    for page, text in programs:
        names.known = {"surestep": surestep}
        names.visit(ast.parse(text, page))
    assert names.found > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_between_the_words_names_what_there_is(page):
    text = BLOCK.sub("", page.read_text("utf-8"))
    for code in re.findall(r"`@?(surestep\.[^`]+)`", text):
        Names().visit(ast.parse(" ".join(code.split()), page.name))


@pytest.mark.parametrize(
    "wrong",
    [
        "surestep.evaluat(model)",
        "surestep.methods.Progres",
        "from surestep.evaluation import suit",
        "from surestep import methods\nmethods.SATR2(threat, lamb=1)",
        "surestep.methods.get('sat-r3')(threat, taw=1)",
        "surestep.fit(model, data, method, epoch=3)",
        "surestep.load('a', 'b', 'c')",
    ],
)
def test_a_name_that_is_not_there_is_seen(wrong):
    with pytest.raises((AttributeError, TypeError, AssertionError)):
        Names().visit(ast.parse(wrong))


def test_commands_in_the_documents_exist(blocks):
    """Each line is read by the command it names, options, values and all, without running it."""
    texts = [text.replace("\\\n", " ") for _, language, text in blocks if language != "python"]
    lines = [line for text in texts for line in text.split("\n")]
    commands = [shlex.split(x, comments=True) for x in lines if x.startswith("surestep ")]
    assert commands
    for _, name, *args in commands:
        command = getattr(importlib.import_module(f"surestep.cli.{name}"), name)
        assert isinstance(command.make_context(name, list(args)), click.Context)
