"""The state of an evaluation on disk: one line per finished attack on a batch.

Lines are appended and synced, so a killed evaluation loses at most the batch it was at. Each
attack draws from a seed of its own per batch, so that what is done need not be drawn again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from surestep.errors import UserError


def digest(*tensors: Tensor) -> str:
    """Return a short hash of tensors' shapes, types and values."""
    found = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        found.update(plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest()[:16]


def model_digest(model: nn.Module) -> str:
    """Return a short hash of a model's weights, buffers, and what its layers are and tell."""
    state = sorted((k, v) for k, v in model.state_dict().items() if isinstance(v, Tensor))
    # A threshold or a rate is not a tensor; an address in memory says nothing.
    told = [
        f"{type(module).__qualname__} {re.sub(r'0x[0-9a-f]+', '', module.extra_repr())}"
        for module in model.modules()
    ]
    names = hashlib.sha256(" ".join([*(k for k, _ in state), *told]).encode()).hexdigest()[:16]
    return f"{names}-{digest(*(v for _, v in state))}"


class State:
    """What has been found so far, by batch and attack; None for the path keeps nothing.

    Args:
        path: the file; continued if it exists.
        settings: all that the results depend on.

    Raises:
        UserError: the file is of an evaluation with other settings, or cannot be used.
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
            kept = self._read(path, header) if path.exists() else 0
            self._file = path.open("r+" if kept else "w", encoding="utf-8")
            self._file.truncate(kept)
            self._file.seek(kept)
            if not kept:
                self._append(header)
        except OSError as e:
            raise UserError(f"cannot use the state file {path}: {e.strerror or e}") from e

    def _read(self, path: Path, header: str) -> int:
        """Take over the whole lines; return how many bytes they are."""
        *lines, cut = path.read_bytes().split(b"\n")  # cut: by a stop amid a line
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
        """Return what ``put`` was given for this attack on this batch, if it was."""
        return self._done.get((batch, attack))

    def put(self, batch: int, attack: str, **found: Any) -> None:
        """Keep what was found, on disk when this returns."""
        if self._file is not None:
            self._append(json.dumps({"batch": batch, "attack": attack, **found}))

    def _append(self, line: str) -> None:
        assert self._file is not None
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
