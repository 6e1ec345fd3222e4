"""Encodes small PNG pictures as data URIs with zlib alone; a report embeds a few dozen."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor


def data_uri(picture: Tensor) -> str:
    """Encode a picture as ``data:image/png;base64,...``.

    Args:
        picture: (C, H, W) in [0, 1], C = 1 (grey) or 3 (RGB); values outside are clipped.
    """
    return "data:image/png;base64," + base64.b64encode(encode(picture)).decode("ascii")


def encode(picture: Tensor) -> bytes:
    """Return the bytes of an 8-bit PNG of a picture as ``data_uri`` takes it."""
    channels, height, width = picture.shape
    pixels = (picture.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels)
    # Each row begins with the number of its filter; 0 is no filter.
    body = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], dim=1)
    colour_type = 0 if channels == 1 else 2
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))
        + _chunk(b"IDAT", zlib.compress(body.numpy().tobytes(), 9))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
