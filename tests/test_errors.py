"""What is said of a package that is not there, or that is and does not work."""

from __future__ import annotations

import sys

import pytest

from surestep.errors import UserError, look_up, need


def test_a_package_that_is_there_is_returned():
    assert need("json", "this", "json") is sys.modules["json"]


def test_one_that_is_not_is_named_with_what_installs_it():
    with pytest.raises(UserError) as e:
        need("not_there.inside", "reading this", "surestep[this]", called="NotThere")
    assert str(e.value) == "reading this needs NotThere: pip install 'surestep[this]'"


def test_one_that_fails_by_itself_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"needs half_there, which cannot be imported.*what_it_needs"
    ):
        need("half_there", "this", "half-there")


def test_capitals_do_not_hide_what_was_meant():
    """Papers write SAT-R2."""
    with pytest.raises(UserError, match="unknown method 'SAT-R2': did you mean 'sat-r2'"):
        look_up("method", "SAT-R2", {"sat-r2": 1, "fgsm": 2})
