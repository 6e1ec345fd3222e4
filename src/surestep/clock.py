"""Timing of progress output."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 60.0
"""Interval between lines without a terminal: a log that stands still looks like a hung run."""


class Every:
    """Tells when ``seconds`` have passed since it was last due.

    Args:
        seconds: the interval.
        at_once: be due immediately the first time.
    """

    def __init__(self, seconds: float, *, at_once: bool = False) -> None:
        self.seconds = seconds
        self._next = time.monotonic() + (0.0 if at_once else seconds)

    def due(self) -> bool:
        """Tell whether the interval has passed; if so, start the next one."""
        if time.monotonic() < self._next:
            return False
        self.restart()
        return True

    def restart(self) -> None:
        """Start a new interval now."""
        self._next = time.monotonic() + self.seconds


def each_minute(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Return a ``tell`` that passes a line on, indented, if the last is a minute old."""
    minute = Every(SECONDS_BETWEEN_LINES)
    return lambda text: tell(f"  {text}") if minute.due() else None
