"""Where the tensors of a checkpoint come from: files, directories, runs, ONNX files, the Hub.

Every source is one iterator of (name, tensor). A tensor that the caller doesn't want may come
without its values, on torch's "meta" device: it has a name, a shape and a type, and costs nothing.
No model class, no code of the checkpoint and no unsafe pickle is used. A new kind of file is one
more row of `READERS`. Rejected: loading models with transformers, which downloads all of them and
fills what a file lacks with random numbers.
"""

import contextlib
import fnmatch
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from opfa import compact
from opfa.anatomy import MASK, problem_of_storage
from opfa.errors import ModelError, first_line, opening
from opfa.hub import RemoteFiles, cached_directory

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
MODEL_FILES = ("model.safetensors", "model-*-of-*.safetensors", *WEIGHT_FILES)
MATRIX_DIMS = 2
Wanted = Callable[[str, Sequence[int]], bool]
Reader = Callable[[Path, Wanted], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that is not read yet."""

    tensors: Callable[[Wanted], Iterator[tuple[str, Tensor]]]
    read_json: Callable[[str], Any]  # a file beside the weights; None where there is none
    file_bytes: int
    downloaded_bytes: Callable[[], int] = lambda: 0


def open_source(name: str) -> Source:
    """The source that a path or Hub name means; raises `ModelError` where there is none.

    Its tensors too, where the weights among them are stored apart from their masks.
    """
    source = _source(name)

    def tensors(wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
        for tensor_name, tensor in source.tensors(wanted):
            problem = problem_of_storage(tensor_name) if tensor.ndim <= MATRIX_DIMS else None
            if problem:
                raise ModelError(f"{name}: {problem}")
            yield tensor_name, tensor

    return replace(source, tensors=tensors)


def is_mask(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a mask that another tool left beside a matrix."""
    return len(shape) == MATRIX_DIMS and bool(MASK.search(name))


def check_masks(masks: Mapping[str, Tensor], found: Mapping[str, Tensor], where: object) -> None:
    """Raise `ModelError` where one of these masks, by the names that they have in the checkpoint,
    has a zero and the weight beside it has not; `found` are the nonzeros of weights. A mask of rows
    or columns is [out, 1] or [1, in]; one of another shape masks something else.
    """
    for name, mask in masks.items():
        weight = f"{name.rpartition('.')[0]}.weight"
        live = found.get(weight)
        if live is None or any(
            m not in (1, n) for m, n in zip(mask.shape, live.shape, strict=True)
        ):
            continue
        if bool((live & ~mask).any()):
            raise ModelError(
                f"{where}: {name}: a mask that is not applied: {weight} has live weights where it "
                "is zero; multiply the two, and save the model again"
            )


def _source(name: str) -> Source:
    path = Path(name)
    if path.is_file():
        return _files([path], beside=None)
    if path.is_dir():
        return _directory(path)
    _refuse_paths(name, "no such directory or file")
    cached = cached_directory(name)
    if cached is not None:
        return _directory(cached)
    remote = RemoteFiles(name)
    files = weight_files(remote.sizes, where=name)
    if files[0].endswith(".bin") or files == [compact.FILE]:  # all of it or nothing
        source = _directory(directory_of(name))
        return Source(
            tensors=source.tensors,
            read_json=source.read_json,
            file_bytes=source.file_bytes,
            downloaded_bytes=lambda: source.file_bytes,
        )
    return Source(
        tensors=lambda wanted: (pair for file in files for pair in remote.tensors(file, wanted)),
        read_json=remote.read_json,
        file_bytes=sum(remote.sizes[file] for file in files),
        downloaded_bytes=lambda: remote.num_bytes,
    )


def directory_of(name: str) -> Path:
    """The directory of a checkpoint; one of the Hub is downloaded."""
    if Path(name).is_dir():
        return Path(name)
    _refuse_paths(name, "no such directory")
    patterns = ["*.safetensors", "*.json"]
    try:
        found = Path(snapshot_download(name, allow_patterns=patterns))
        if not list(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, allow_patterns=["pytorch_model*.bin", "*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise ModelError(
            f"{name}: no such directory, and not to be had from the Hub: {reason}"
        ) from error
    return found


def weight_files(names: Iterable[str], where: object) -> list[str]:
    """Which of these files are the weights: those that transformers would load, if there are."""
    names = sorted(set(names) - {"quantization.safetensors"})
    for pattern in MODEL_FILES:
        found = fnmatch.filter(names, pattern)
        if found:
            return found
    raise ModelError(f"{where}: has no weights ({' or '.join(WEIGHT_FILES)})")


def _refuse_paths(name: str, reason: str) -> None:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: {reason}")


def _directory(directory: Path) -> Source:
    """A directory of weights, or of a run with its model in it."""
    names = [path.name for path in directory.iterdir()]
    is_run = "model" in names and not any(fnmatch.filter(names, p) for p in WEIGHT_FILES)
    if is_run and (directory / "model").is_dir():
        return _directory(directory / "model")
    files = [directory / name for name in weight_files(names, where=directory)]
    return _files(files, beside=directory)


def _files(files: list[Path], beside: Path | None) -> Source:
    """Files together. One alone may be a part of a model: a sparsity.json is not about it."""
    for file in files:
        if file.suffix not in READERS:
            raise ModelError(f"{file}: not weights; {', '.join(READERS)} can be read")

    def read_json(name: str) -> Any:  # Any: what JSON can hold
        if beside is None and name != "config.json":
            return None
        path = files[0].with_name(name)
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except (ValueError, OSError) as error:
            raise ModelError(f"{path}: not valid JSON: {error}") from error

    return Source(
        tensors=lambda wanted: (p for file in files for p in READERS[file.suffix](file, wanted)),
        read_json=read_json,
        file_bytes=sum(part.stat().st_size for file in files for part in _parts(file)),
    )


def _parts(file: Path) -> list[Path]:
    """A file, and beside the largest ONNX files the one with their weights."""
    data = file.with_name(f"{file.name}.data")
    return [file, data] if file.suffix == ".onnx" and data.is_file() else [file]


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn every way in which a file can't be read into one `ModelError`."""
    with opening(file):
        try:
            yield
        except pickle.UnpicklingError as error:  # torch's text says how to run what is in it
            raise ModelError(
                f"{file}: can't be read: no pickle, or one of more than tensors"
            ) from error


def _safetensors(file: Path, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
    del wanted  # pages of the mapped file are read when they are used
    with _readable(file):
        yield from compact.tensors(file)


def _pickle(file: Path, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
    del wanted
    with _readable(file):
        is_mapped = zipfile.is_zipfile(file)  # files from before 2020 are not
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    if not isinstance(state, dict):
        raise ModelError(f"{file}: holds a {type(state).__name__}, not a state dict")
    yield from ((name, value) for name, value in state.items() if isinstance(value, Tensor))


def _onnx(file: Path, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
    del wanted
    from opfa.onnx_weights import read_onnx  # an optional extra

    return read_onnx(file)


READERS: dict[str, Reader] = {".safetensors": _safetensors, ".bin": _pickle, ".onnx": _onnx}
