"""A model's weights in a file: safetensors with a signature, or whatever others have saved."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from surestep import files
from surestep.errors import UserError

_COMPILED = "_orig_mod."
"""What torch.compile inserts into the names of the weights of a module it wraps."""
_ENTRIES = ("state_dict", "model_state_dict", "model", "net")
"""Where checkpoints keep the weights."""


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
    state = {k: files.copied(v) for k, v in model.state_dict().items()}
    told = signature._asdict() if signature else {}
    header = {f"surestep.{name}": json.dumps(value) for name, value in told.items()}
    files.write_atomically(
        path, _in_order(safetensors.torch.save(state, {"format": "pt", **header}))
    )


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
    with files.open_safetensors(path) as f:
        header = f.metadata() or {}
    told = (header.get(f"surestep.{name}", "[]") for name in Signature._fields)
    return Signature(*(tuple(json.loads(value)) for value in told))


def load_weights(path: Path, model: nn.Module) -> None:
    """Load safetensors weights into a model.

    Raises:
        UserError: the file is missing, truncated or corrupt, or does not fit the model.
    """
    _load_strictly(path, files.read_safetensors(path)[0], model)


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
        return _load_strictly(path, *_matched(files.read_safetensors(path)[0], model))
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
