"""When it is time to show something again."""

from __future__ import annotations

import time

SECONDS_BETWEEN_LINES = 60.0
"""Where there is no terminal: a log that stands still looks like a run that hangs."""


class Every:
    """Tells when so many seconds have passed since it last did.

    Args:
        seconds: between two times.
        at_once: the first time is now.
    """

    def __init__(self, seconds: float, *, at_once: bool = False) -> None:
        self.seconds = seconds
        self._next = time.monotonic() + (0.0 if at_once else seconds)

    def due(self) -> bool:
        """Tell whether it is time; if so, the next time is as many seconds away."""
        if time.monotonic() < self._next:
            return False
        self.restart()
        return True

    def restart(self) -> None:
        """Begin to count the seconds now."""
        self._next = time.monotonic() + self.seconds
