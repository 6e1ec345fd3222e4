"""Files: atomic writes, locks, digests, and tensors saved without pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from surestep.errors import UserError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

_COMPILED = "_orig_mod."
"""What torch.compile inserts into the names of the weights of a module it wraps."""
_ENTRIES = ("state_dict", "model_state_dict", "model", "net")
"""Where checkpoints keep the weights."""


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
    tensors, metadata = _read(path)
    if "structure" not in metadata:
        raise UserError(f"{path} is not a surestep checkpoint: its header has no structure")
    try:
        return _unpack(json.loads(metadata["structure"]), tensors)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is corrupt ({e}): restore it or remove it") from e


class Signature(NamedTuple):
    """The classes that a model distinguishes and the shape of its input.

    Attributes:
        classes: class names, in the order of the model's outputs.
        shape: shape of one image.
    """

    classes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


def save_weights(path: Path, model: nn.Module, signature: Signature | None = None) -> None:
    """Save a model's parameters and buffers as safetensors.

    Tensors that share memory (tied weights) are written once under each name. The header stores
    the signature, if there is one.
    """
    state = {k: _copied(v) for k, v in model.state_dict().items()}
    told = signature._asdict() if signature else {}
    header = {f"surestep.{name}": json.dumps(value) for name, value in told.items()}
    write_atomically(path, _in_order(safetensors.torch.save(state, {"format": "pt", **header})))


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with sorted metadata, which safetensors writes in random order."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[begin:]


def read_signature(path: Path) -> Signature:
    """Return the signature that ``save_weights`` stored; an empty one if it stored none.

    Raises:
        UserError: the file is missing, truncated or corrupt.
    """
    with _opened(path) as f:
        header = f.metadata() or {}
    told = (header.get(f"surestep.{name}", "[]") for name in Signature._fields)
    return Signature(*(tuple(json.loads(value)) for value in told))


def load_weights(path: Path, model: nn.Module) -> None:
    """Load safetensors weights into a model.

    Raises:
        UserError: the file is missing, truncated or corrupt, or does not fit the model.
    """
    _load_strictly(path, _read(path)[0], model)


def _load_strictly(path: Path, state: dict[str, Tensor], model: nn.Module) -> None:
    """Load weights into a model, or raise ``UserError`` if names or shapes do not match."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"{path} does not fit the model: "
            f"missing {', '.join(missing[:3]) or 'nothing'}, unexpected "
            f"{', '.join(extra[:3]) or 'nothing'}"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{path} does not fit the model: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected[name].shape)}"
            )
    # With the versions of its modules, which safetensors do not keep: a module may take weights
    # without one for those of its first version, and convert them.
    expected.update(state)
    _load_into(path, expected, model)


def _load_into(path: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path} does not fit the model: {reason[:300]}") from e


def load_any_weights(path: Path, model: nn.Module) -> None:
    """Load safetensors weights or a saved ``state_dict`` into a model.

    Of a checkpoint, the entry "state_dict", "model_state_dict", "model" or "net" is loaded. The
    prefixes "module.", "model." and torch.compile's are dropped from names where the model does
    not have them. A model whose parameters are all in its ``body`` (as for timm) also takes weights
    named as in the body.

    Raises:
        UserError: the file is missing, damaged, holds more than tensors, or does not fit.
    """
    if path.suffix == ".safetensors":
        return _load_strictly(path, *_matched(_read(path)[0], model))
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist") from e
    except pickle.UnpicklingError as e:
        if not _saved_by_torch(path):
            raise UserError(
                f"{path} is not a file of weights: expected one from torch.save or safetensors"
            ) from e
        raise UserError(
            f"{path} holds more than tensors, and loading it could run code: save "
            "model.state_dict() or a safetensors file instead"
        ) from e
    except Exception as e:  # a damaged pickle can raise anything
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{path} cannot be read as weights: {reason}") from e
    for key in _ENTRIES:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    named = isinstance(found, Mapping) and all(isinstance(k, str) for k in found)
    # A checkpoint that has its weights under another name may have tensors beside them.
    nested = named and any(
        isinstance(v, Mapping) for k, v in found.items() if not k.endswith("_extra_state")
    )
    if not named or nested or not any(isinstance(v, Tensor) for v in found.values()):
        entries = ", ".join(map(str, found)) if isinstance(found, Mapping) else ""
        holds = f"a dict of {entries[:200]}" if entries else f"a {type(found).__name__}"
        raise UserError(
            f"{path} holds no state_dict but {holds}: save model.state_dict(), alone or in a dict "
            f"as {' or '.join(map(repr, _ENTRIES))}"
        )
    _load_into(path, *_matched(found, model))


def _matched(found: Mapping[str, Any], model: nn.Module) -> tuple[dict[str, Any], nn.Module]:
    """Return the renamed weights and what they load into: the model, or its body if that is all."""
    body = getattr(model, "body", None)
    if isinstance(body, nn.Module) and not found.keys() & model.state_dict().keys():
        state = _without_prefix(found, body)
        everything = len(list(body.parameters())) == len(list(model.parameters()))
        if everything and state.keys() & body.state_dict().keys():
            return state, body
    return _without_prefix(found, model), model


def _without_prefix(found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Drop prefixes that wrappers add to names, where the model's names do not have them."""
    expected = model.state_dict()
    if not any(_COMPILED in name for name in expected):  # of the whole model or of parts
        found = _renamed(found, inside=_COMPILED)
    state = _renamed(found)
    for prefix in ("module.", "model.", "module.model."):
        if not expected.keys() & state.keys():
            state = _renamed(found, prefix=prefix)
    return state


def _renamed(found: Mapping[str, Any], *, prefix: str = "", inside: str = "") -> dict[str, Any]:
    """Return weights under shorter names, with the versions of modules that torch keeps with them.

    Args:
        found: weights, as ``state_dict`` returns them.
        prefix: dropped from the beginning of names.
        inside: dropped from anywhere in names.
    """

    def rename(name: str) -> str:
        return name.replace(inside, "").removeprefix(prefix)

    state = OrderedDict((rename(name), value) for name, value in found.items())
    versions = getattr(found, "_metadata", None)
    if isinstance(versions, Mapping):  # by the names of modules, which have no dot at the end
        of_modules = {rename(f"{name}.").removesuffix("."): v for name, v in versions.items()}
        state._metadata = of_modules  # type: ignore[attr-defined]
    return state


def _saved_by_torch(path: Path) -> bool:
    """Tell whether a file begins like torch.save's: a zip archive or, in old versions, a pickle."""
    with path.open("rb") as f:
        return f.read(4).startswith((b"PK\x03\x04", b"\x80"))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as f:
        # Cloned: the tensors map the file, which Windows would keep locked.
        return {k: f.get_tensor(k).clone() for k in f.keys()}, f.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
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


def _copied(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, contiguous and with memory of its own, as safetensors requires."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _pack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = _copied(tree)
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
