"""Parts of safetensors files on the Hub: headers first, then only the tensors that are wanted.

A file is 8 bytes (length of the header, little-endian), a header in JSON, and data. Of BERT-base
342 of 438 MB remain without embeddings. huggingface_hub's own reader of headers is not used:
it doesn't say where the data begin, nor how much was transferred. Nothing is kept; what is in the
local cache already is read from there.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from httpx2 import HTTPError
from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from torch import Tensor

from opfa.errors import ModelError, first_line, opening
from opfa.storage.foreign import INDEXES, weight_map

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
PARTIAL = 206  # HTTP: a part, as asked for
TIMEOUT_SECONDS = 30
log = logging.getLogger(__name__)
Extent = Annotated[int, Field(ge=0)]


class Entry(BaseModel):
    """A tensor in a header."""

    dtype: str
    shape: tuple[Extent, ...]
    data_offsets: tuple[Extent, Extent]


HEADER = TypeAdapter(dict[str, Entry | dict[str, str]])  # __metadata__ holds texts


def cached_directory(name: str) -> Path | None:
    """The directory in the local cache that has the whole model, if there is one."""
    found = _cached(name)
    return found.parent if found and not _missing(found) else None


def missing_in_cache(name: str) -> list[str]:
    """Of a model that is in the local cache in part: the files that its index names and that are
    not there.
    """
    found = _cached(name)
    return _missing(found) if found else []


def _cached(name: str) -> Path | None:
    """The weights, or their index, in the local cache."""
    try:
        for file in ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1]):
            found = try_to_load_from_cache(name, file)
            if isinstance(found, str):
                return Path(found)
    except HFValidationError as error:
        raise ModelError(f"{name}: no such directory, and no name of the Hub: {error}") from error
    return None


def _missing(path: Path) -> list[str]:
    if path.suffix != ".json":
        return []
    shards = set(weight_map(path.read_bytes(), path).values())
    return sorted(shard for shard in shards if not (path.parent / shard).is_file())


class RemoteFiles:
    """The files of a Hub model at its newest commit, and how many bytes of them were read."""

    def __init__(self, name: str) -> None:
        """Ask the Hub once for all names and sizes."""
        self.name = name
        self.num_bytes = 0
        with self._reachable():
            info = HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT_SECONDS)
        self._revision = info.sha
        self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def tensors(
        self, file: str, wanted: Callable[[str, Sequence[int]], bool]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a file; those that are not wanted without values."""
        entries, start = self._header(file)
        parts = [e.data_offsets for name, e in entries.items() if wanted(name, e.shape)]
        num_bytes = sum(last - first for first, last in parts)
        log.info("%s: reading %s of %s bytes", file, f"{num_bytes:,}", f"{self.sizes[file]:,}")
        for name, entry in entries.items():
            dtype = TYPES[entry.dtype]
            if not wanted(name, entry.shape) or 0 in entry.shape:
                yield name, torch.empty(entry.shape, dtype=dtype, device="meta")
                continue
            first, last = entry.data_offsets
            data = bytearray(self._read(file, start + first, start + last))
            yield name, torch.frombuffer(data, dtype=dtype).view(entry.shape)

    def read_json(self, name: str) -> Any:  # Any: what JSON can hold
        """A whole small file; None where there is none."""
        if name not in self.sizes:
            return None
        content = self.read(name)
        with opening(f"{self.name}/{name}", ModelError, "not valid JSON"):
            return json.loads(content)

    def read(self, name: str) -> bytes:
        """A whole small file."""
        return self._read(name, 0, self.sizes[name])

    def _header(self, file: str) -> tuple[dict[str, Entry], int]:
        where, size = f"{self.name}/{file}", self.sizes[file]
        length = int.from_bytes(self._read(file, 0, 8), "little")
        if length > min(MAX_HEADER, size - 8):
            raise ModelError(f"{where}: damaged: a file of {size:,} bytes, header of {length:,}")
        try:
            header = HEADER.validate_json(self._read(file, 8, 8 + length))
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ModelError(f"{where}: damaged: its header can't be read: {reason}") from error
        header.pop("__metadata__", None)
        entries: dict[str, Entry] = {}
        for name, entry in header.items():
            if not isinstance(entry, Entry):
                raise ModelError(f"{where}: damaged: {name} has no type, shape and place")
            first, last = entry.data_offsets
            if entry.dtype not in TYPES:
                raise ModelError(f"{where}: {name}: unknown type {entry.dtype!r}")
            num_bytes = math.prod(entry.shape) * TYPES[entry.dtype].itemsize
            if last - first != num_bytes or 8 + length + last > size:
                raise ModelError(f"{where}: damaged: {name} does not fit its place in the file")
            entries[name] = entry
        return entries, 8 + length

    def _read(self, file: str, start: int, end: int) -> bytes:
        """The bytes from start to before end."""
        url = hf_hub_url(self.name, file, revision=self._revision)
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",  # a range of a compressed file is something else
        }
        with self._reachable():
            answer = http_backoff("GET", url, headers=headers, timeout=TIMEOUT_SECONDS)
            hf_raise_for_status(answer)
        self.num_bytes += len(answer.content)
        is_whole = answer.status_code != PARTIAL and (start, end) == (0, self.sizes[file])
        if len(answer.content) != end - start or not (answer.status_code == PARTIAL or is_whole):
            raise ModelError(
                f"{self.name}/{file}: bytes {start} to {end} were asked for, and "
                f"{len(answer.content)} came (HTTP {answer.status_code}); download the model, and "
                "inspect its directory"
            )
        return answer.content

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (HTTPError, HFValidationError, OSError) as error:
            raise ModelError(
                f"{self.name}: no such directory, and not to be had from the Hub: "
                f"{first_line(error)}"
            ) from error
