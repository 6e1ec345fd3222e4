"""Stopping when asked to: by Ctrl-C, or by the SIGTERM of a cluster that wants its machine back."""

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
"""Steps between questions to the other processes: all must stop after the same one."""

_ECHO = 1.0
"""Seconds within which a second Ctrl-C is the launcher's, which hands on what the terminal sent."""


class Asked(BaseException):
    """The run was asked to stop where that takes effect at once."""


class StopRequest:
    """Hears SIGTERM and Ctrl-C, which then take effect where a checkpoint can be written.

    A second Ctrl-C interrupts as if nobody had heard the first.

    Attributes:
        number: of the signal that was heard; 0 before.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._at_once = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear signals meanwhile; in a thread, which cannot, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            # Ignored, as by a shell for what it runs in the background; or set by a C library.
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
        """Raise `Asked` as soon as a signal is heard; of several processes none may, alone."""
        self._at_once = processes.count() == 1
        try:
            if self._at_once and self.number:
                raise Asked
            yield
        finally:
            self._at_once = False

    def after(self, step: int, device: torch.device) -> bool:
        """Tell, after a step, whether to stop here: the same in every process."""
        if processes.count() == 1:
            return self.number != 0
        return step % ASK_EVERY == 0 and self._by_any(device)

    def together(self, device: torch.device) -> None:
        """Raise `Asked` in every process if one of them was asked; each must call this as often."""
        if processes.count() > 1 and self._by_any(device):
            raise Asked

    def _by_any(self, device: torch.device) -> bool:
        return processes.largest(self.number, device) != 0

    def leave(self) -> NoReturn:
        """End as the signal would have it.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            SystemExit: it was SIGTERM, here or in another process.
        """
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
