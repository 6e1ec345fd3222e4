"""The state of an evaluation on disk: one line per finished attack on a batch.

Lines are appended and synced, so a killed evaluation loses at most the attack it was running. Each
attack has its own seed for each batch, so finished attacks need not be repeated.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor, nn

from surestep import files
from surestep.errors import UserError


def model_digest(model: nn.Module) -> str:
    """Return a short hash of a model's weights and buffers, and of its layers' types and texts."""
    # Buffers that are not persistent are in no state_dict.
    entries = {**dict(model.named_buffers(remove_duplicate=False)), **model.state_dict()}
    state = sorted((k, v) for k, v in entries.items() if isinstance(v, Tensor))
    # Thresholds and rates are no tensors but in the layers' texts. Addresses in memory vary.
    told = [
        f"{type(module).__qualname__} {re.sub(r'0x[0-9a-f]+', '', module.extra_repr())}"
        for module in model.modules()
    ]
    names = files.digest(" ".join([*(k for k, _ in state), *told]).encode())
    return f"{names}-{files.digest(*(v for _, v in state))}"


class State:
    """The results so far, by batch and attack.

    The file is locked until ``close``: two evaluations that append to it would lose lines.

    Args:
        path: the file; continued if it exists. With None, nothing is kept.
        settings: everything that determines the results.

    Raises:
        UserError: the file belongs to an evaluation with other settings, is in use by another
            process, or cannot be used.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self._done: dict[tuple[int, str], dict[str, Any]] = {}
        self._file: IO[str] | None = None
        if path is None:
            return
        path = Path(path)
        header = json.dumps(settings, sort_keys=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self._file = path.open("r+", encoding="utf-8")
            if not files.lock(self._file):
                raise UserError(
                    f"{path} is in use by another evaluation: wait for it, stop it, or name "
                    "another file"
                )
            kept = self._read(path, header)
            self._file.truncate(kept)
            self._file.seek(kept)
            if not kept:
                self._append(header)
        except OSError as e:
            self.close()
            raise UserError(f"cannot use the state file {path}: {e.strerror or e}") from e
        except UserError:
            self.close()
            raise

    def _read(self, path: Path, header: str) -> int:
        """Read the complete lines; return how many bytes they take."""
        *lines, cut = path.read_bytes().split(b"\n")  # cut: the rest, if a line was interrupted
        if not lines:
            if header.encode().startswith(cut):
                return 0
            lines = [cut]
        try:
            first, *rows = (json.loads(line) for line in lines)
            found = {(row["batch"], row["attack"]): row for row in rows}
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(
                f"{path} is not a state of an evaluation: delete it or name another"
            ) from e
        wanted = json.loads(header)
        ours = isinstance(first, dict) and first.keys() >= wanted.keys() - {"version"}
        if ours and first.get("version") != wanted["version"]:
            raise UserError(
                f"{path} was written by another version of surestep: delete it, or name another"
            )
        if first != wanted:
            names = [k for k in wanted if not isinstance(first, dict) or first.get(k) != wanted[k]]
            raise UserError(
                f"{path} is the state of an evaluation with other {', '.join(names) or 'settings'}"
                ": give the same again, or another state file"
            )
        self._done = found
        return sum(len(line) + 1 for line in lines)

    @property
    def kept(self) -> bool:
        """Whether there is a file."""
        return self._file is not None

    def get(self, batch: int, attack: str) -> dict[str, Any] | None:
        """Return what ``put`` stored for this attack on this batch; None if it did not."""
        return self._done.get((batch, attack))

    def put(self, batch: int, attack: str, **found: Any) -> None:
        """Store what an attack found; it is on disk when this returns."""
        if self._file is not None:
            self._append(json.dumps({"batch": batch, "attack": attack, **found}))

    def _append(self, line: str) -> None:
        assert self._file is not None
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close and unlock the file."""
        if self._file is not None:
            files.unlock(self._file)
            self._file.close()
