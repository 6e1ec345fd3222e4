from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from surestep import data
from surestep.cli import main


class Result(NamedTuple):
    """What a call of the command line gave."""

    code: int
    out: str
    err: str


def small_options(archive: Path) -> list[str]:
    """Return options of a run of 2 epochs of 9 steps: the smallest network on 300 digits."""
    return [
        *("--dataset", "npz", "--data", str(archive), "--model", "cnn-small", "--epochs", "2"),
        *("--batch-size", "32", "--lr", "0.02", "--val-attacks", "fgsm,pgd-2", "--eps", "0.3"),
    ]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer every look-up as a machine without a network does, at once."""

    def offline(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", offline)


@pytest.fixture(autouse=True)
def _no_report_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page takes longer than a run of two epochs; ``finished`` has one, see test_report.py."""
    monkeypatch.setattr("surestep.cli.train._report", lambda *_: None)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process; return exit code, stdout and stderr."""

    def run(*args: Any) -> Result:
        capsys.readouterr()
        code = 0
        try:
            main([str(a) for a in args])
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(cli: Callable[..., Result]) -> Callable[..., str]:
    """Run something that must be refused: exit code 2, one line, no traceback; return the line."""

    def run(*args: Any) -> str:
        code, _, err = cli(*args)
        assert code == 2, err
        assert err.startswith("surestep: error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def done(cli: Callable[..., Result]) -> Callable[..., str]:
    """Run something that must work; return what it wrote to stdout."""

    def run(*args: Any) -> str:
        code, out, err = cli(*args)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line as a process of its own."""
    return lambda *args, **kwargs: subprocess.run(
        [sys.executable, "-m", "surestep", *map(str, args)],
        **{
            "capture_output": True,
            "text": True,
            "timeout": 300,
            "env": environment(),
            "check": False,
            **kwargs,
        },
    )


def environment() -> dict[str, str]:
    """Return the environment with this process's threads: results depend on their number."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of real MNIST: 300 training, 100 validation, 100 test images."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    train = data.load("mnist", "train")
    parts = {
        "train": train.first(300),
        "val": train.subset(slice(300, 400)),
        "test": data.load("mnist", "test").first(100),
    }
    arrays = {f"x_{name}": part.x.numpy() for name, part in parts.items()}
    labels = {f"y_{name}": part.y.numpy() for name, part in parts.items()}
    np.savez(path, **arrays, **labels)
    return path


@pytest.fixture
def small(digits: Path) -> list[str]:
    return small_options(digits)


@pytest.fixture(scope="session")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; read it only."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    main(["train", "--method", "sat-r3", *small_options(digits), "--out", str(folder), "--quiet"])
    return folder


@pytest.fixture(scope="session")
def able(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose network is mostly right (``finished`` is not); read it only."""
    folder = tmp_path_factory.mktemp("runs") / "able"
    more = ("--epochs", "6", "--lr", "0.1", "--eps", "0.1", "--val-images", "0", "--quiet")
    main(["train", "--method", "standard", *small_options(digits), *more, "--out", str(folder)])
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every data set have 400 images at most."""
    load = data.load
    monkeypatch.setattr(data, "load", lambda *a, **k: load(*a, **k).first(400))


@pytest.fixture
def tools() -> SimpleNamespace:
    """The helpers of this folder, since test modules cannot import from each other."""
    return SimpleNamespace(environment=environment, contents=contents, rows=rows)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder with its bytes."""
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(paths)}


def rows(folder: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl`` without what differs from run to run."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    times = ("images_per_second", "train_seconds", "val_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]
