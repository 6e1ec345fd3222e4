"""Evaluations and audits as documents: their JSON schemas, and one line for each violation."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from surestep.errors import UserError, need, unknown_name
from surestep.interchange._json import read_json, shorten

_FILES = {
    "surestep-evaluation": {1: "evaluation-1.json"},
    "surestep-audit": {1: "audit-1.json"},
}
_LONGEST = 200  # characters of a line: messages of jsonschema repeat the value


def schema(format: str, version: int = 1) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a kind of document.

    Args:
        format: "surestep-evaluation" or "surestep-audit".
        version: the version of the format.

    Raises:
        UserError: there is no such format or version.
    """
    if format not in tuple(_FILES):  # a document may hold a list here, which is unhashable
        if not isinstance(format, str):
            raise UserError(f"format is {shorten(format)}, expected {_either(_FILES)}")
        raise unknown_name("format", format, _FILES)
    versions = _FILES[format]
    if isinstance(version, bool) or version not in tuple(versions):
        raise UserError(
            f"unknown version {shorten(version)} of {format}: known are "
            f"{', '.join(map(str, versions))}"
        )
    file = resources.files("surestep.interchange") / "schemas" / versions[version]
    return json.loads(file.read_text("utf-8"))


def validate(document: dict[str, Any]) -> None:
    """Check a document against the schema that its "format" and "version" name.

    Args:
        document: as returned by ``Evaluation.to_dict`` or ``Audit.to_dict``, or read from JSON.

    Raises:
        UserError: the document is neither or violates its schema (the line names the place, the
            value and what was expected), or jsonschema is not installed.
    """
    if not isinstance(document, dict):
        raise UserError(f"the document is {shorten(document)}, expected an object")
    if "format" not in document:
        raise UserError(f"the document lacks 'format', expected {_either(_FILES)}")
    if "version" not in document:
        raise UserError(
            f"the document lacks 'version', expected a number with format {document['format']!r}"
        )
    format, version = document["format"], document["version"]
    schema(format, version)
    exceptions = _jsonschema().exceptions
    error = exceptions.best_match(
        _validator(format, version).iter_errors(document),
        # A misspelt key rather than the one missing because of it.
        key=exceptions.by_relevance(strong={"additionalProperties"}),
    )
    if error is not None:
        line = " ".join(f"{error.json_path}: {error.message}".split())
        if len(line) > _LONGEST:  # the place is at its beginning, what was expected at its end
            line = f"{line[: _LONGEST // 2]} ... {line[5 - _LONGEST // 2 :]}"
        raise UserError(line)


def load(path: str | Path) -> dict[str, Any]:
    """Read an evaluation or audit from a JSON file, and check it.

    Args:
        path: a file as written by ``--json``.

    Raises:
        UserError: the file is missing, not JSON, or not a valid document; see ``validate``.
    """
    document = read_json(Path(path))
    _jsonschema()  # if it is missing, the file is not to blame
    try:
        validate(document)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    return document


def _jsonschema() -> Any:
    return need("jsonschema", "checking documents", "surestep[interchange]")


@cache
def _validator(format: str, version: int) -> Any:
    draft = _jsonschema().Draft202012Validator
    # NaN passes every comparison with a bound, and a dict may hold tuples where JSON has lists.
    types = draft.TYPE_CHECKER.redefine_many(
        {
            "number": lambda _, value: (
                draft.TYPE_CHECKER.is_type(value, "number")
                and (isinstance(value, int) or math.isfinite(value))
            ),
            "array": lambda _, value: isinstance(value, list | tuple),
        }
    )
    validator = _jsonschema().validators.extend(draft, type_checker=types)
    return validator(schema(format, version))


def _either(names: Any) -> str:
    return " or ".join(map(repr, names))
