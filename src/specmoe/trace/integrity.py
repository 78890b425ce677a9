"""Checksums: what tells a damaged trace from a whole one."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import torch
from torch import Tensor

from specmoe.files import regular_file

__all__ = ["checksum", "header_sha256"]


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data) if tensor.numel() else 0


def header_sha256(path: Path) -> str:
    """SHA-256 of a safetensors file's header: an 8-byte length, then shapes, offsets and metadata as JSON.

    Raises:
        SpecmoeError: it is no regular file.
    """
    with regular_file(path).open("rb") as stream:
        prefix = stream.read(8)
        # A damaged length must not make us read gigabytes.
        length = min(int.from_bytes(prefix, "little"), path.stat().st_size)
        return hashlib.sha256(prefix + stream.read(length)).hexdigest()
