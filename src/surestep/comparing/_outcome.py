"""What is known of a run in a comparison, as its ``judged.json`` holds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from surestep import files
from surestep.errors import UserError

_FORMAT, _VERSION = "surestep-outcome", 1


@dataclass(frozen=True)
class Outcome:
    """What is known of a run so far; None is not known yet.

    Attributes:
        settings: how it is judged, as ``Judging.to_dict`` returns it.
        weights: digest of the weights.
        subject: digest of what was judged, and on which images.
        peak_memory_mb: peak memory of the training that led to the weights.
        resumed: whether that training was resumed, so that its peak is unknown.
        code: digest of the code of a plug-in's method when the training began.
        evaluation: as ``Evaluation.to_dict`` returns it.
        audit: as ``Audit.to_dict`` returns it.
    """

    settings: dict[str, Any]
    weights: str | None = None
    subject: str | None = None
    peak_memory_mb: float | None = None
    resumed: bool = False
    code: str | None = None
    evaluation: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write the outcome to a file, whose folder is made.

        Raises:
            UserError: the file cannot be written.
        """
        files.make_folder(path.parent)
        files.write_atomically(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Outcome | None:
        """Read an outcome from a file; None if there is no such file.

        Raises:
            UserError: the file cannot be read or is not an outcome in this version's format.
        """
        try:
            found = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read ({e}): delete it to judge the run again") from e
        kind = (_FORMAT, _VERSION)
        known = isinstance(found, dict) and (found.get("format"), found.get("version")) == kind
        if not known or "settings" not in found:
            raise UserError(f"{path} is not an outcome of a run: delete it, or give another --out")
        return cls(
            **{field.name: found[field.name] for field in fields(cls) if field.name in found}
        )
