"""A method that was just begun passes its own tests: in a checkout and as a plug-in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import surestep
from surestep import UserError, scaffold
from surestep.methods import _registry

ROOT = Path(__file__).parent.parent


def python(*args: object, cwd: Path, path: tuple[Path, ...]) -> str:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("slug", ["for", "class"])
def test_words_of_python(tmp_path, slug):
    with pytest.raises(UserError, match="is a Python keyword: choose another name"):
        scaffold.method(slug, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("slug", ["cost", "method", "tensor", "update", "box", "mean-ce", "sum"])
def test_names_that_its_files_use(tmp_path, slug):
    with pytest.raises(UserError, match="is a name that every method uses"):
        scaffold.method(slug, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_in_a_checkout(tmp_path):
    """The generic tests find the new method by themselves, and it passes them."""
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copytree(ROOT / "tests" / "methods", tmp_path / "tests" / "methods")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    made = scaffold.method("my-own", tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in made} == {
        "src/surestep/methods/my_own.py",
        "src/surestep/methods/cards/my-own.md",
        "tests/methods/families/my_own.py",
    }
    where = {"cwd": tmp_path, "path": (tmp_path / "src",)}
    generic = [f"tests/methods/test_{k}.py" for k in ("hygiene", "formulas", "cost", "registry")]
    alone = ("-p", "no:cacheprovider", "-p", "no:xdist")
    said = python("-m", "pytest", "-q", *alone, "-k", "my-own", *generic, **where)
    assert int(said.split(" passed")[0].split()[-1]) > 30
    python("-m", "ruff", "check", "src/surestep/methods/my_own.py", **where)


@pytest.mark.slow
def test_as_a_plug_in(tmp_path):
    """Installed (here: on the path, with the metadata of an installation) it is a method.

    A second one, which is broken, breaks nothing.
    """
    made = scaffold.method("other", tmp_path)
    package = tmp_path / "surestep-other"
    assert {p.relative_to(package).as_posix() for p in made} == {
        "pyproject.toml",
        "src/surestep_other/__init__.py",
        "src/surestep_other/cards/other.md",
        "tests/test_other.py",
    }
    for name in ("other", "broken"):
        metadata = package / "src" / f"surestep_{name}-0.1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: surestep-{name}\nVersion: 0.1.0\n"
        )
        (metadata / "entry_points.txt").write_text(
            f"[surestep.methods]\n{name} = surestep_{name}\n"
        )
    (package / "src" / "surestep_broken.py").write_text("import nothing_of_the_kind\n")
    where = {"cwd": package, "path": (package / "src", ROOT / "src")}
    code = "import sys, pytest; from surestep.cli import main; code = pytest.main(sys.argv[1:]);"
    code += "import surestep; print('names:', *surestep.methods.names());"
    code += "print('card:'); code or main(['methods', 'other']); sys.exit(code)"
    said = python("-c", code, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests", **where)
    assert " passed" in said
    assert "card:\n# Other" in said
    (names,) = re.findall(r"names: (.*)", said)
    assert names.split() == sorted([*surestep.methods.names(), "other"])


@pytest.mark.parametrize("slug", ["", "Upper", "two words", "-x", "x--y", "../up", "1x"])
def test_a_name_must_be_one(tmp_path, slug):
    with pytest.raises(UserError, match="is not a method name"):
        scaffold.method(slug, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_must_be_free(tmp_path):
    with pytest.raises(UserError, match="'fgsm' already exists"):
        scaffold.method("fgsm", tmp_path)


def test_nothing_is_overwritten(tmp_path):
    made = scaffold.method("mine", tmp_path)
    made[1].write_text("my work")
    with pytest.raises(UserError, match="exists already"):
        scaffold.method("mine", tmp_path)
    assert made[1].read_text() == "my work"


def test_a_hyperparameter_needs_a_default():
    with pytest.raises(UserError, match="lam of the method 'other' has no default"):

        @surestep.methods.register("other")
        @dataclass(kw_only=True)
        class Other(surestep.methods.Standard):
            lam: float

    assert "other" not in surestep.methods.names()


def test_a_method_without_a_card(monkeypatch):
    monkeypatch.setitem(_registry.METHODS, "cardless", surestep.methods.Standard)
    with pytest.raises(UserError, match="'cardless' has no card"):
        surestep.methods.card("cardless")


def test_two_methods_of_one_name():
    with pytest.raises(UserError, match=r"'fgsm' is taken by surestep\.methods\.fgsm\.FGSM"):

        @surestep.methods.register("fgsm")
        class Another(surestep.methods.Standard):
            pass
