"""Progress output during training."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from surestep.clock import SECONDS_BETWEEN_LINES, Every

_SECONDS_BETWEEN = 0.5
_SECONDS_UNSEEN = 10.0
"""Without a bar, the numbers are still read this often, since a diverged run should stop."""


class Display:
    """A progress bar on a terminal, else a line per epoch or minute; nothing if ``quiet``."""

    def __init__(self, total_steps: int, *, quiet: bool) -> None:
        self.console = Console(quiet=quiet, stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[info]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total_steps, info="")
        live = self.console.is_terminal and not quiet
        self._numbers = Every(_SECONDS_BETWEEN if live else _SECONDS_UNSEEN, at_once=True)
        self._line = Every(SECONDS_BETWEEN_LINES)

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def due(self) -> bool:
        """Tell whether it is time to show numbers again (reading them waits for the device)."""
        return self._numbers.due()

    def step(self, number: int, epoch: str, info: str) -> None:
        """Show the state of training at a step."""
        self.bar.update(self.task, completed=number, description=epoch, info=info)
        if not self.console.is_terminal and self._line.due():
            self.say(f"{epoch}  step {number}/{self.bar.tasks[self.task].total:.0f}  {info}")

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line above the bar."""
        self._line.restart()
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
