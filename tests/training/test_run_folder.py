"""The rules for taking a folder for a run, without any training."""

from __future__ import annotations

import pytest

from surestep import UserError
from surestep.training.run_folder import RunFolder

SETTINGS = {"method": "fgsm", "seed": 1}


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini"])
def test_what_file_managers_leave_is_nobodys_work(tmp_path, name):
    (tmp_path / name).touch()
    run = RunFolder.plan(tmp_path)  # as if it were empty
    assert run is not None
    run.make(SETTINGS)
    assert run.config.is_file()
    (tmp_path / name).touch()
    again = RunFolder.plan(tmp_path, overwrite=True)
    assert again is not None
    again.make(SETTINGS | {"seed": 2}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_what_is_foreign_is_named(tmp_path):
    RunFolder(tmp_path).make(SETTINGS)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex besides a run: move it away first"):
        RunFolder.plan(tmp_path, overwrite=True)
