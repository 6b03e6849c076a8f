"""Where the tensors of a checkpoint come from: files, directories, runs, ONNX files, the Hub.

Every source is one iterator of (name, tensor). A tensor that the caller doesn't want may come
without its values, on torch's "meta" device. No model class, no code of the checkpoint and no
unsafe pickle is used. A new kind of file is one more row of `READERS`.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opfa.errors import ModelError, opening
from opfa.hub.cache import cached_directory, downloaded, missing_in_cache, refuse_path
from opfa.hub.place import place_of
from opfa.hub.tensors import RemoteFiles
from opfa.sparsity.anatomy import MASK, problem_of_storage
from opfa.storage import foreign
from opfa.storage.runs import model_in
from opfa.weights import compact
from opfa.weights.compact import Wanted

MATRIX_DIMS = 2
Reader = Callable[[Path, Wanted], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that is not read yet."""

    tensors: Callable[[Wanted], Iterator[tuple[str, Tensor]]]
    read_json: Callable[[str], Any]  # a file beside the weights; None where there is none
    file_bytes: int
    downloaded_bytes: Callable[[], int] = lambda: 0


def open_source(name: str) -> Source:
    """The source that a path or Hub name means. While tensors are read, weights that are stored
    apart from their masks raise `ModelError`.
    """
    source = _source(name)

    def tensors(wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
        for tensor_name, tensor in source.tensors(wanted):
            problem = problem_of_storage(tensor_name) if tensor.ndim <= MATRIX_DIMS else None
            if problem:
                raise ModelError(f"{name}: {problem}")
            yield tensor_name, tensor

    return replace(source, tensors=tensors)


def read_before(directory: Path, tensors: Mapping[str, Tensor]) -> Source:
    """A directory whose tensors are here already, so that they aren't read again."""
    return replace(_directory(directory), tensors=lambda _: iter(tensors.items()))


def is_mask(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a mask that another tool left beside a matrix."""
    return len(shape) == MATRIX_DIMS and bool(MASK.search(name))


def check_masks(masks: Mapping[str, Tensor], found: Mapping[str, Tensor], where: object) -> None:
    """Raise `ModelError` if a mask has a zero where the weight beside it has none; `found` are the
    nonzeros of weights. A mask of rows or columns is [out, 1] or [1, in].
    """
    for name, mask in masks.items():
        weight = f"{name.rpartition('.')[0]}.weight"
        if (live := found.get(weight)) is None:
            continue
        is_its = all(m in (1, n) for m, n in zip(mask.shape, live.shape, strict=True))
        if is_its and bool((live & ~mask).any()):
            raise ModelError(
                f"{where}: {name}: a mask that is not applied: {weight} has live weights where it "
                "is zero; multiply the two, and save the model again"
            )


def _source(name: str) -> Source:
    name = place_of(name)
    path = Path(name)
    if path.is_file():
        return _files([path], is_whole=False)
    if path.is_dir():
        return _directory(path)
    refuse_path(name, "no such directory or file")
    cached = cached_directory(name)
    if cached is not None:
        return _directory(cached)
    try:
        remote = RemoteFiles(name)
    except ModelError as error:
        if missing := missing_in_cache(name):
            raise ModelError(f"{error}; the cache lacks {missing[0]}") from error
        raise
    files, tensors = foreign.weight_files(remote.sizes, name, remote.read)
    if files[0].endswith(".bin") or files == [compact.FILE]:  # all of it or nothing
        source = _directory(directory_of(name))
        return replace(source, downloaded_bytes=lambda: source.file_bytes)
    return Source(
        tensors=lambda wanted: _checked(files, tensors, lambda f: remote.tensors(f, wanted), name),
        read_json=remote.read_json,
        file_bytes=sum(remote.sizes[file] for file in files),
        downloaded_bytes=lambda: remote.num_bytes,
    )


def directory_of(name: str) -> Path:
    """The directory of a checkpoint, RUN/model for a run; one of the Hub or of `opfa list` is
    downloaded.
    """
    name = place_of(name)
    found = _downloaded(name, ["*.safetensors", "*.json"])
    if not Path(name).is_dir() and not list(found.glob("*.safetensors")):
        found = _downloaded(name, ["pytorch_model*.bin", "*.json"])
    return found


def small_files_of(name: str) -> Path:
    """The directory of a model's configurations and tokenizer. Only these are downloaded."""
    return _downloaded(place_of(name), list(foreign.TOKENIZER_FILES))


def _downloaded(name: str, patterns: list[str]) -> Path:
    return model_in(Path(name)) if Path(name).is_dir() else downloaded(name, patterns)


def _checked(
    files: Iterable[str],
    tensors: Mapping[str, str],
    read: Callable[[str], Iterator[tuple[str, Tensor]]],
    where: object,
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of files; raises `ModelError` after a file that lacks a tensor of the index."""
    for file in files:
        missing = {name for name, place in tensors.items() if place == file}
        for name, tensor in read(file):
            missing.discard(name)
            yield name, tensor
        if missing:
            raise ModelError(f"{where}/{file}: {min(missing)} is missing, which the index has")


def _directory(directory: Path) -> Source:
    """A directory of weights, or of a run with its model in it."""
    with opening(directory):
        directory = model_in(directory)
        names = [path.name for path in directory.iterdir()]
    files, tensors = foreign.weight_files(names, directory, lambda name: _read(directory / name))
    return _files([directory / name for name in files], tensors)


def _read(path: Path) -> bytes:
    foreign.check_content(path)
    with opening(path):
        return path.read_bytes()


def _files(
    files: list[Path], tensors: Mapping[str, str] | None = None, *, is_whole: bool = True
) -> Source:
    """Files together. One alone may be a part of a model: a sparsity.json is not about it."""
    for file in files:
        if file.suffix not in READERS:
            raise ModelError(f"{file}: not weights; {', '.join(READERS)} can be read")
        foreign.check_weights(file)

    def read_json(name: str) -> Any:  # Any: what JSON can hold
        path = files[0].with_name(name)
        if not os.path.lexists(path) or not (is_whole or name == "config.json"):
            return None
        content = _read(path)
        with opening(path, ModelError, "not valid JSON"):
            return json.loads(content)

    by_name = {file.name: file for file in files}

    def read(name: str, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
        return READERS[by_name[name].suffix](by_name[name], wanted)

    where = files[0].parent
    return Source(
        tensors=lambda wanted: _checked(by_name, tensors or {}, lambda n: read(n, wanted), where),
        read_json=read_json,
        file_bytes=sum(part.stat().st_size for file in files for part in _parts(file)),
    )


def _parts(file: Path) -> list[Path]:
    """A file, and those in which an ONNX file says that its weights are."""
    if file.suffix != ".onnx":
        return [file]
    from opfa.weights.onnx import data_files  # an optional extra

    return [file, *data_files(file)]


def _safetensors(file: Path, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
    with opening(file):  # pages of the mapped file are read when they are used
        yield from compact.tensors(file, wanted)


def _pickle(file: Path, _: Wanted) -> Iterator[tuple[str, Tensor]]:
    with opening(file):
        is_mapped = zipfile.is_zipfile(file)  # files from before 2020 are not
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
        except pickle.UnpicklingError as error:  # torch's text says how to run its code
            problem = "can't be read: no pickle, or one of more than tensors"
            raise ModelError(f"{file}: {problem}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{file}: holds a {type(state).__name__}, not a state dict")
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield str(name), _plain(value, f"{file}: {name}")


def _plain(tensor: Tensor, what: str) -> Tensor:
    """Refuse what a pickle can say and no model has: a few values that stand for 10^12."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ModelError(f"{what}: not a plain tensor ({tensor.layout}, {tensor.dtype})")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ModelError(f"{what}: has more elements than values in the file")
    return tensor


def _onnx(file: Path, _: Wanted) -> Iterator[tuple[str, Tensor]]:
    from opfa.weights.onnx import read_onnx  # an optional extra

    return read_onnx(file)


READERS: dict[str, Reader] = {".safetensors": _safetensors, ".bin": _pickle, ".onnx": _onnx}
