"""Parts of safetensors files on the Hub: only the tensors that are wanted, and nothing is kept.

A file is 8 bytes (length of the header, little-endian), a header in JSON, and data.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Self

import torch
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor

from opfa.errors import ModelError, opening
from opfa.hub.cache import NOWHERE
from opfa.hub.reach import problem_of_hub
from opfa.hub.transfer import reaching

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
PARTIAL = 206  # HTTP: a part, as asked for
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
TIMEOUT_SECONDS = 30
log = logging.getLogger(__name__)
Extent = Annotated[int, Field(ge=0)]


class Entry(BaseModel):
    """A tensor in a header."""

    dtype: str
    shape: tuple[Extent, ...]
    data_offsets: tuple[Extent, Extent]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dtype not in TYPES:
            raise ValueError(f"unknown type {self.dtype!r}")
        num_bytes = math.prod(self.shape) * TYPES[self.dtype].itemsize
        if self.data_offsets[1] - self.data_offsets[0] != num_bytes:
            raise ValueError("does not fit its place in the file")
        return self


HEADER = TypeAdapter(dict[str, Entry])


class RemoteFiles:
    """The files of a Hub model at its newest commit, and how many bytes of them were read."""

    def __init__(self, name: str) -> None:
        """Ask the Hub once for all names and sizes."""
        self.name = name
        self.num_bytes = 0
        if problem := problem_of_hub():
            raise ModelError(f"{name}: {NOWHERE}: {problem}")
        with reaching(self.name, NOWHERE, ModelError):
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
        content = self._read(file, 8, 8 + length)
        with opening(where, ModelError, "damaged: its header can't be read"):
            values = json.loads(content)
            values.pop("__metadata__", None)
        try:
            entries = HEADER.validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            what = [*map(str, first["loc"][:1]), first["msg"].removeprefix("Value error, ")]
            raise ModelError(f"{where}: damaged: {': '.join(what)}") from error
        for name, entry in entries.items():
            if 8 + length + entry.data_offsets[1] > size:
                raise ModelError(f"{where}: damaged: {name}: does not fit its place in the file")
        return entries, 8 + length

    def _read(self, file: str, start: int, end: int) -> bytes:
        url = hf_hub_url(self.name, file, revision=self._revision)
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",  # a range of a compressed file is something else
        }
        with reaching(self.name, NOWHERE, ModelError):
            answer = http_backoff("GET", url, headers=headers, timeout=TIMEOUT_SECONDS)
            hf_raise_for_status(answer)
        self.num_bytes += len(answer.content)
        is_whole = answer.status_code != PARTIAL and (start, end) == (0, self.sizes[file])
        if len(answer.content) != end - start or not (answer.status_code == PARTIAL or is_whole):
            came = f"{len(answer.content)} came (HTTP {answer.status_code})"
            what = f"bytes {start} to {end} were asked for, and {came}; download the model first"
            raise ModelError(f"{self.name}/{file}: {what}")
        return answer.content
