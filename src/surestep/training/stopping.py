"""Stop on request: by Ctrl-C, or by SIGTERM, as a cluster sends to reclaim its machine."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch

from surestep import processes
from surestep.errors import UserError

ASK_EVERY = 10
"""Steps between exchanges of stop requests: all processes must stop after the same step."""

_ECHO = 1.0
"""Seconds within which a second Ctrl-C is an echo: launchers forward the one they receive."""

_DONE, _WORKING, _FAILED = 0, 1, 1000
"""What a process tells the others in place of a signal's number, which is from 2 to 64."""


class Asked(BaseException):
    """Raised on a request to stop, where that takes effect at once."""


class FailedElsewhere(UserError):
    """Raised where another process failed."""


class StopRequest:
    """Defers SIGTERM and Ctrl-C to where a checkpoint can be written.

    A second Ctrl-C interrupts at once, as it does without this class, unless it is an echo.

    Attributes:
        number: number of the last signal received; 0 if none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._at_once = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Receive signals inside the block; in a thread, where that is impossible, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            # Leave alone signals ignored (as in a shell's background jobs) or handled by C code.
            if handler not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == self.number == signal.SIGINT:
            if now - self._since > _ECHO:
                raise KeyboardInterrupt
            return
        self.number, self._since = number, now
        if self._at_once:
            self._at_once = False  # another signal must not interrupt the saving
            raise Asked

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block, raise `Asked` as soon as a signal arrives; only in a single process."""
        self._at_once = processes.world_size() == 1
        try:
            if self._at_once and self.number:
                raise Asked
            yield
        finally:
            self._at_once = False

    def after(self, step: int, device: torch.device) -> bool:
        """Tell, after a step, whether to stop here: the same in every process."""
        if processes.world_size() == 1:
            return self.number != 0
        return step % ASK_EVERY == 0 and processes.all_max(self.number, device) != 0

    def together(self, device: torch.device, *, done: bool = False, failed: bool = False) -> bool:
        """Raise in all processes if one has a request or failed.

        While one works, all must call this again and again: one that is done, until this is false.

        Args:
            device: of this process.
            done: this process has no more work.
            failed: this process failed. It raises its own error after this, its last call.

        Returns:
            Whether any process still works.

        Raises:
            Asked: one has a request.
            FailedElsewhere: another one failed.
        """
        if processes.world_size() == 1:
            return False
        mine = _FAILED if failed else self.number or (_DONE if done else _WORKING)
        told = processes.all_max(mine, device)
        if told == _FAILED:
            if failed:
                return False
            raise FailedElsewhere("held-out images of another process cannot be judged")
        if told > _WORKING:
            raise Asked
        return told == _WORKING

    def leave(self) -> NoReturn:
        """End the process as the signal requests.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            SystemExit: it was SIGTERM, here or in another process.
        """
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
