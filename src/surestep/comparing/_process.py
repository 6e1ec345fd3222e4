"""The training of a run in a process of its own, whose peak memory is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from surestep import files
from surestep.comparing._table import Tell
from surestep.config import RunConfig, to_yaml
from surestep.devices import free_cached_memory
from surestep.errors import ERROR
from surestep.training.run_folder import RunFolder

# Starts the training and reports its exit code and peak memory. This is a process in between, since
# on Linux a process inherits the peak of the one it was forked from, and the comparison's own peak,
# with its attacks, may be far above the training's. When its standard input closes, the comparison
# has ended, for whatever reason, and it terminates the training: the next comparison must have the
# run folder to itself.
MEASURE = """
import os, signal, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
signal.signal(signal.SIGINT, signal.SIG_IGN)
def watch():
    os.read(0, 1)
    if os.name == "nt":  # there it kills at once: a training that got Ctrl-C too saves its state
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            pass
    os.kill(child.pid, signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
if hasattr(os, "wait4"):
    _, status, usage = os.wait4(child.pid, 0)
    code, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss
else:
    code, peak = child.wait(), 0
print(code, peak, flush=True)
os._exit(0)
"""


class TrainingFailed(Exception):
    """A training that ended without a result.

    Attributes:
        fault: whether the cause is a bug in surestep.
    """

    def __init__(self, message: str, *, fault: bool) -> None:
        super().__init__(message)
        self.fault = fault


def train(run: RunFolder, config: RunConfig, tell: Tell) -> float | None:
    """Train a run, or resume it, in its own process; return its peak memory in MB, None if unknown.

    Raises:
        TrainingFailed: the training ended without a result.
        KeyboardInterrupt: the training was stopped by Ctrl-C.
    """
    free_cached_memory()  # leave it to the training process
    with tempfile.TemporaryDirectory() as folder:
        if run.config.is_file():
            arguments = ["--resume", str(run.folder)]
        else:
            files.make_folder(run.folder.parent)
            settings = Path(folder) / "config.yaml"
            settings.write_text(to_yaml(config.model_dump(mode="json")), "utf-8")
            arguments = ["--config", str(settings), "--out", str(run.folder)]
        code, peak, error = measured(["train", *arguments], tell)
    if code in (130, -2):  # by its own handler, or before that was installed
        raise KeyboardInterrupt
    if code < 0 or 128 < code < 192:  # above 128: by its own handler; Windows has larger codes
        number = -code if code < 0 else code - 128
        raise TrainingFailed(f"the training was killed by signal {number}", fault=False)
    if code:
        raise TrainingFailed(error or f"the training ended with exit code {code}", fault=code != 2)
    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return peak * unit / 1e6 if peak else None


def measured(arguments: list[str], tell: Tell) -> tuple[int, int, str]:
    """Run a surestep command; return its exit code, ``ru_maxrss`` (0 if unknown) and error line."""
    command = [sys.executable, "-I", "-c", MEASURE, sys.executable, "-m", "surestep", *arguments]
    error = ""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        # "-m" would import a random.py of the working directory, which the command does not.
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        try:
            for line in process.stderr:
                if line.startswith(ERROR):
                    error = line.removeprefix(ERROR).strip()
                else:
                    tell(f"  {line.rstrip()}")
            code, peak = process.stdout.read().split() or ("-9", "0")
        except BaseException:
            # Closing its standard input makes it terminate the training; wait until it has.
            process.stdin.close()
            process.wait()
            raise
    return int(code), int(peak), error
