"""Options shared by commands, made from the typed configuration."""

from __future__ import annotations

import datetime
import json
import os
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from surestep.config import FitSettings, RunConfig
from surestep.errors import UserError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
N = TypeVar("N", int, float)

json_option = click.option(
    "--json", "json_file", metavar="FILE", help="Also write the result as JSON; - is stdout."
)

device_option = click.option(
    "--device", metavar="TEXT", help="cpu, cuda, cuda:1 or mps. [default: the best]"
)


def seed_option(text: str) -> Decorator:
    """Return the option ``--seed``; ``text`` is its help."""
    return click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help=text
    )


def config_options(fields: Iterable[str]) -> Decorator:
    """Return a decorator that adds an option for each of the named fields of ``RunConfig``.

    Values stay as the user wrote them: YAML files and the command line share one validation.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(list(fields)):
            command = _option(name, RunConfig.model_fields[name])(command)
        return command

    return add


def _option(name: str, field: FieldInfo) -> Decorator:
    flag = f"--{name.replace('_', '-')}"
    text = f"{field.description}."
    if field.annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    if name == "eps":  # see runs.resolve
        text += " [default: the preset's; without one, 0.3 for mnist in linf, else to be given]"
    elif default not in (None, ""):
        said = f"{default:g}" if isinstance(default, float) else default
        # A preset may set another value.
        of_preset = name in FitSettings.model_fields or name in ("model", "dataset")
        text += f" [default: the preset's, or {said}]" if of_preset else f" [default: {said}]"
    return click.option(flag, name, metavar=_metavar(field.annotation), help=text)


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        if float in get_args(annotation):
            return "NUMBER"
        return _metavar(next(a for a in get_args(annotation) if a is not type(None)))
    if get_origin(annotation) is tuple:
        return "A,B,..."
    if get_origin(annotation) is Annotated:
        return _metavar(get_args(annotation)[0])
    return {int: "INT", float: "NUMBER"}.get(annotation, "TEXT")


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the user gave as settings; "none" becomes None where allowed."""
    return {name: _setting(name, v) for name, v in values.items() if v is not None}


def _setting(name: str, value: Any) -> Any:
    annotation = RunConfig.model_fields[name].annotation
    if get_origin(annotation) is tuple:
        return names(value)
    return None if value == "none" and type(None) in get_args(annotation) else value


def names(text: str) -> list[str]:
    """Read "a, b" as ["a", "b"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(flag: str, text: str, wanted: str, kind: Callable[[str], N]) -> list[N]:
    """Read "1, 2" as [1, 2].

    Args:
        flag: the option, for the error message.
        text: what the user wrote.
        wanted: what to give, with an example.
        kind: int or float.

    Raises:
        UserError: there is no number, or something else.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found:
        raise UserError(f"{flag} {text!r}: give {wanted}")
    return found


def parse_params(pairs: Iterable[str]) -> dict[str, str]:
    """Split ``--param NAME=VALUE`` pairs; values stay as written, for ``config`` to parse.

    Raises:
        UserError: a pair has no name or no "=".
    """
    params = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(
                f"--param {pair!r} is not NAME=VALUE: write, for example, --param lam=5"
            )
        params[name.replace("-", "_")] = value
    return params


def check_overwrite(overwrite: bool, out: str | None, metavar: str) -> None:
    """Refuse ``--overwrite`` without ``--out``.

    Raises:
        UserError: ``overwrite`` is set, but ``out`` is None.
    """
    if overwrite and out is None:
        raise UserError(f"--overwrite needs a folder to replace: give --out {metavar}")


def new_folder(name: str) -> str:
    """Return runs/<date>-<name>, numbered if that exists."""
    day = datetime.datetime.now().strftime("%Y%m%d")
    base = Path("runs") / f"{day}-{name}"
    folder, number = base, 2
    while folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return str(folder)


def write_json(value: Any, target: str | None) -> None:
    """Write a result as JSON to a file, or to stdout for "-".

    Raises:
        UserError: the file cannot be written.
    """
    if target is None:
        return
    text = json.dumps(value, indent=2) + "\n"
    if target == "-":
        click.echo(text, nl=False)
    else:
        write_text(text, target)


def write_text(text: str, target: str) -> None:
    """Write text to a file: atomically where possible, in place for a pipe, device or link.

    Raises:
        UserError: the target cannot be written.
    """
    from surestep import files

    path = Path(target)
    if _replaceable(path):
        files.write_atomically(path, text)
        return
    try:
        path.write_text(text, "utf-8")
    except OSError as e:
        raise UserError(f"cannot write {target}: {e.strerror or e}") from e


def hand_over(
    result: Any,
    json_file: str | None,
    show: Callable[[], None],
    also: Callable[[], None] = lambda: None,
) -> None:
    """Write a command's result as JSON, then print it, unless the JSON went to stdout.

    The result is printed last, since the reader of a pipe may be gone, and it is printed even if
    writing a file fails.

    Args:
        result: what to write as JSON.
        json_file: as for ``write_json``.
        show: prints the result.
        also: writes further files, such as a report.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        write_json(result, json_file)
        also()
    finally:
        if json_file != "-":
            show()


def check_writable(target: str | None) -> None:
    """Make an output file's folder and check that the file can be written, before any work.

    Raises:
        UserError: the target is a folder, its own folder cannot be made, or writing is not
            permitted.
    """
    if target is None or target == "-":
        return
    if Path(target).is_dir():
        raise UserError(f"cannot write {target}: it is a folder")
    path = Path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        allowed = os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError as e:
        raise UserError(f"cannot write {target}: {e.strerror or e}") from e
    if not allowed:
        raise UserError(f"cannot write {target}: permission denied; choose another place")


def _replaceable(path: Path) -> bool:
    """Tell whether a path can be replaced atomically; pipes, devices and links cannot."""
    plain = not path.is_symlink() and (path.is_file() or not path.exists())
    return plain and os.access(path.parent, os.W_OK)
