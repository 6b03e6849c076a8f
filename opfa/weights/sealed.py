"""A safetensors file whose header has a SHA-256 of header and data, so that any change is found."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from typing import IO, Any

MOST_HEADER = 1 << 24  # bytes
METADATA, SHA256 = "__metadata__", "sha256"
EMPTY = "?" * 64  # in the place of a digest that isn't known yet


def read_header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """The header, and where the data begin; `ValueError` for what has no header."""
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MOST_HEADER + 1
    if length > min(MOST_HEADER, num_bytes - 8):
        raise ValueError("it has no header of a safetensors file")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return header, 8 + length


def digest(file: IO[bytes], header: Mapping[str, Any], offset: int) -> str:
    """SHA-256 of the header, without the digest itself and in one canonical form, and the data."""
    found = begin(header)
    file.seek(offset)
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def begin(header: Mapping[str, Any]) -> "hashlib._Hash":
    """A digest that has seen the header and awaits the data."""
    metadata = {k: v for k, v in header.get(METADATA, {}).items() if k != SHA256}
    return hashlib.sha256(to_json({**header, METADATA: metadata}))


def to_json(header: Any, *, ensure_ascii: bool = True) -> bytes:  # Any: what JSON can hold
    """A header as JSON; by default in the form that the digest is of."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=ensure_ascii)
    return text.encode()
