"""Files: atomic writes, locks, digests, and tensors saved without pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from surestep.errors import UserError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]


def make_folder(folder: Path) -> None:
    """Create a folder and its parents unless they exist.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {folder}: {e.strerror or e}") from e


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a crash leaves either the old or the new one.

    Raises:
        UserError: the disk is full or the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    content = content.encode() if isinstance(content, str) else content
    try:
        with part.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        _replace(part, path)
        # The file is in place by now: Windows cannot open folders, some network drives cannot sync
        # them, and neither matters.
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        if e.errno == errno.ENOSPC:
            raise UserError(
                f"no space left to write {path} ({len(content) / 1e6:.0f} MB): free some space, "
                "then try again (continue a run with --resume)"
            ) from e
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


def _replace(part: Path, path: Path) -> None:
    """Rename a file; on Windows wait for programs that have the old one open for a moment."""
    for seconds in (0.1, 0.4, 1.5) if os.name == "nt" else ():
        try:
            return os.replace(part, path)
        except PermissionError:
            time.sleep(seconds)
    os.replace(part, path)


def lock(file: IO[Any]) -> bool:
    """Lock an open file for this process; return False if another one holds it.

    Where files cannot be locked (Windows, some network drives), this returns True.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


def unlock(file: IO[Any]) -> None:
    """Release a lock at once, even if a forked worker process still has the file open."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)


def save_tree(path: Path, tree: Any) -> None:
    """Save nested dicts, lists and tuples of tensors, numbers, strings and None.

    The file is a safetensors file with the structure and checksums as JSON in its header.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_pack(tree, tensors))
    write_atomically(path, safetensors.torch.save(tensors, {"structure": structure}))


def load_tree(path: Path) -> Any:
    """Load what ``save_tree`` saved, onto the CPU. Nothing is ever unpickled.

    Raises:
        UserError: the file is missing, truncated, corrupt or not a surestep checkpoint.
    """
    tensors, metadata = read_safetensors(path)
    if "structure" not in metadata:
        raise UserError(f"{path} is not a surestep checkpoint: its header has no structure")
    try:
        return _unpack(json.loads(metadata["structure"]), tensors)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is corrupt ({e}): restore it or remove it") from e


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, on the CPU, and the metadata of its header.

    Raises:
        UserError: the file is missing, truncated or corrupt.
    """
    with open_safetensors(path) as f:
        # Cloned: the tensors map the file, which Windows would keep locked.
        return {k: f.get_tensor(k).clone() for k in f.keys()}, f.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, to read only some of it.

    Raises:
        UserError: the file is missing, truncated or corrupt.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise UserError(
            f"{path} is truncated, corrupt or not a safetensors file ({e}): restore it or remove it"
        ) from e


def plain(value: Any) -> Any:
    """Return a JSON value with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(*parts: bytes | Tensor) -> str:
    """Return a short hash of bytes, and of tensors' shapes, types and values."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            values = part.detach().cpu().contiguous()
            found.update(f"{values.dtype}{tuple(values.shape)}".encode())
            part = values.view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""
        found.update(part)
    return found.hexdigest()[:16]


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def copied(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, contiguous and with memory of its own, as safetensors requires."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _pack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = copied(tree)
        return {"tensor": [name, _checksum(tensors[name])]}
    if isinstance(tree, Mapping):
        # As pairs: the keys of an optimizer's state are integers, which JSON objects cannot have.
        return {"dict": [[k, _pack(v, tensors)] for k, v in tree.items()]}
    if isinstance(tree, tuple):
        return {"tuple": [_pack(v, tensors) for v in tree]}
    if isinstance(tree, list):
        return {"list": [_pack(v, tensors) for v in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"cannot save a {type(tree).__name__}")


def _unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        name, checksum = value
        if _checksum(tensors[name]) != checksum:
            raise ValueError(f"tensor {name} does not match its checksum")
        return tensors[name]
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in value}
    items = [_unpack(v, tensors) for v in value]
    return tuple(items) if kind == "tuple" else items
