"""The rules for taking a folder for a run, without any training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from surestep import UserError
from surestep.training import checkpoint
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


def test_an_old_run_is_deleted_before_its_settings_and_not_the_folder(tmp_path, monkeypatch):
    """Network drives keep a file in a folder as long as one of its files is held open."""
    run = RunFolder(tmp_path / "run")
    (run.checkpoints / "old").mkdir(parents=True)
    (run.folder / "zzz.state").touch()
    run.config.write_text("method: fgsm\n")
    deleted = []
    remove, unlink = shutil.rmtree, Path.unlink
    monkeypatch.setattr(shutil, "rmtree", lambda p, *a: deleted.append(p) or remove(p, *a))

    def noted(self, *args, **kwargs):
        if not self.name.endswith(".part"):
            deleted.append(self)
        return unlink(self, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", noted)
    run.make({"method": "sat-r2"}, overwrite=True)
    assert sorted(deleted[:-1]) == [run.checkpoints, run.folder / "zzz.state"]
    assert deleted[-1] == run.config
    assert run.config.read_text() == "method: sat-r2\n"


def test_an_old_checkpoint_that_is_being_read_ends_no_run(tmp_path, monkeypatch):
    for step in range(3):
        checkpoint.save(tmp_path, step, {"step": step})
    monkeypatch.setattr(Path, "unlink", lambda self, **_: _refuse())
    checkpoint.save(tmp_path, 3, {"step": 3})
    assert checkpoint.load_newest(tmp_path, print) == {"step": 3}


def test_what_a_kill_left_of_a_checkpoint_goes_with_the_next(tmp_path):
    (tmp_path / ".step-00000001.safetensors.part").write_bytes(b"half")
    kept = tmp_path / "notes.part"
    kept.touch()
    checkpoint.save(tmp_path, 2, {"step": 2})
    assert sorted(tmp_path.iterdir()) == [kept, *checkpoint.found(tmp_path)]


def _refuse():
    raise PermissionError("in use")
