"""The entry point: the commands, and how errors are reported."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from surestep import __version__
from surestep.errors import ERROR, SurestepWarning, UserError, unknown_name

_COMMANDS = {
    "train": "Train a robust classifier with a method.",
    "evaluate": "Measure a model's accuracy on clean images and under attack.",
    "audit": "Tell real robustness from masked gradients.",
    "compare": "Train and judge several methods side by side in one table.",
    "harden": "Harden a trained run (MeanSparse) and judge it before and after.",
    "demo": "See FGSM training fail and SAT succeed, in minutes on a laptop.",
    "methods": "List the methods, show a method's card, or start a new method.",
    "env": "Describe this machine and installation, for bug reports.",
}


_ALONE = ("evaluate", "audit", "compare", "harden", "demo")
_HOW_TO_CONTINUE = {
    "train": "; continue a run with `surestep train --resume RUN`",
    "compare": "; rerun with the same --out to continue",
    "evaluate": "; an evaluation with --state FILE can be continued",
    "audit": "; an audit with --state FILE can be continued",
}

_TERMINATED = 128 + signal.SIGTERM
_PIPE_CLOSED = 128 + 13  # SIGPIPE, which Windows has not


class _Lazy(click.Group):
    """A group that imports a command only when it is called, and none to list them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"surestep.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not args[0].startswith("-"):
            raise unknown_name("command", args[0], _COMMANDS)
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        with _closed_pipes():  # it prints the help
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with _closed_pipes():
            return super().invoke(ctx)


@contextmanager
def _closed_pipes() -> Iterator[None]:
    """Exit with a code of its own if the reader of a pipe has left; click and rich exit with 1."""
    try:
        yield
    except (BrokenPipeError, SystemExit) as e:
        if isinstance(e, SystemExit) and not isinstance(e.__context__, BrokenPipeError):
            raise
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # what is left in it would be a complaint of Python's at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(_PIPE_CLOSED)


@click.group(
    cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, "--version", prog_name="surestep")
@click.pass_context
def surestep(context: click.Context) -> None:
    """Train image classifiers to withstand adversarial perturbations, with a single attack step.

    New here? `surestep demo` needs no download and takes a few minutes, or a quarter of an hour
    on a CPU without bf16. Then try `surestep train --method sat-r2 --preset mnist-fast` and
    `surestep evaluate RUN --budget quick`.
    """
    command, processes = context.invoked_subcommand, os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and command in _ALONE:
        raise UserError(
            f"{command} runs in one process, not in {processes}: start it without torchrun"
        )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    The exit code is 0 on success, 2 on a user's mistake, 1 on a bug in surestep, 130 after Ctrl-C,
    141 if the reader of a pipe left before the end, and 143 if SIGTERM stopped a training.

    Args:
        args: the arguments without the program's name; by default those of the process.
    """
    given = list(sys.argv[1:] if args is None else args)
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, SurestepWarning):
            _say(f"surestep: warning: {message}")
        else:
            others(message, category, *where, **more)

    warnings.showwarning = show
    try:
        surestep(args=given or ["--help"], prog_name="surestep", standalone_mode=False)
    except UserError as e:
        _fail(str(e), 2)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _stopped(given, 130)
    except SystemExit as e:
        if e.code != _TERMINATED:
            raise
        _stopped(given, _TERMINATED)
    except click.ClickException as e:
        _fail(e.format_message(), 2)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except PermissionError as e:
        _fail(f"permission denied: {e.filename or e}; choose a path that you have access to", 2)
    except OSError as e:  # such as a name that is too long, or a disk that is gone
        _fail(f"{e.strerror or e}: {e.filename}" if e.filename else str(e), 2)
    except Exception:
        traceback.print_exc()
        _fail("this is a bug in surestep: please report it with the output of `surestep env`", 1)
    finally:
        warnings.showwarning = others


def is_first_process() -> bool:
    """Tell whether this is the first of the processes of a launcher, or the only one.

    A RANK alone may number the jobs of an array.
    """
    launched = "LOCAL_RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"
    return not launched or os.environ.get("RANK", "0") == "0"


def _say(line: str) -> None:
    """Print a line to stderr in the first of several processes: the others would repeat it."""
    if is_first_process():
        print(line, file=sys.stderr)


def _stopped(given: Sequence[str], code: int) -> None:
    command = given[0] if given else ""
    named = {argument.partition("=")[0] for argument in given}
    if command == "compare" and not named & {"--methods", "--out"}:
        _say("stopped; a comparison of run folders keeps its results only with --out")
    else:
        _say(f"stopped{_HOW_TO_CONTINUE.get(command, '')}")
    sys.exit(code)


def _fail(message: str, code: int) -> None:
    print(f"{ERROR}{' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
