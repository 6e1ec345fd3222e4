"""Stop on Ctrl-C, or on SIGTERM, which a cluster sends to reclaim its machine."""

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

ASK_EVERY = 10
"""Steps between exchanges of stop requests and failures: all must stop after the same step."""

_ECHO = 1.0
"""Seconds within which a second Ctrl-C is an echo: launchers forward the one that they receive."""

_DONE, _WORKING, _FAILED = 0, 1, 1000
"""What a process sends in place of a signal's number, which is from 2 to 64."""


def is_meeting(step: int) -> bool:
    """Tell whether several processes exchange what they know after this step."""
    return processes.world_size() > 1 and step % ASK_EVERY == 0


class StopRequested(BaseException):
    """Raised where a request to stop takes effect at once."""


class FailedElsewhere(Exception):
    """Raised where another process failed, for the caller to say at what."""


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
    def handling_signals(self) -> Iterator[None]:
        """Handle signals inside the block; in a thread, where that is impossible, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            # Leave alone signals ignored (as in a shell's background jobs) or handled by C code.
            if handler not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == self.number == signal.SIGINT:
            if now - self._since > _ECHO:
                raise KeyboardInterrupt
            return
        self.number, self._since = number, now
        if self._at_once:
            self._at_once = False  # another signal must not interrupt the saving
            raise StopRequested

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In the block, raise `StopRequested` once a signal arrives; only in a single process."""
        self._at_once = processes.world_size() == 1
        try:
            if self._at_once and self.number:
                raise StopRequested
            yield
        finally:
            self._at_once = False

    def after(self, step: int, device: torch.device) -> bool:
        """Tell whether to stop after this step; the answer is the same in every process."""
        if processes.world_size() == 1:
            return self.number != 0
        return is_meeting(step) and processes.all_max(self.number, device) != 0

    def exchange(self, device: torch.device, *, done: bool = False, failed: bool = False) -> bool:
        """Exchange stop requests and failures among the processes; if there is one, raise in all.

        While any process works, all must keep calling this; those that are done, until it is false.

        Args:
            device: the device of this process.
            done: this process has no more work.
            failed: this process failed; it raises its own error after this last call.

        Returns:
            Whether any process still works.

        Raises:
            StopRequested: a process has a request.
            FailedElsewhere: another process failed.
        """
        if processes.world_size() == 1:
            return False
        mine = _FAILED if failed else self.number or (_DONE if done else _WORKING)
        most = processes.all_max(mine, device)
        if most == _FAILED:
            if failed:
                return False
            raise FailedElsewhere
        if most > _WORKING:
            raise StopRequested
        return most == _WORKING

    def exit(self) -> NoReturn:
        """End the process as the signal does by default.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            SystemExit: it was SIGTERM, here or in another process.
        """
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
