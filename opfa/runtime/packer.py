"""The packer: any checkpoint of a family of the runtime -> a directory that the runtime maps."""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from opfa.errors import RunError
from opfa.models import trained
from opfa.models.configs import checked_directory, load_config, load_tokenizer, quiet_transformers
from opfa.models.sentences import copy_files
from opfa.report.bars import Bar
from opfa.report.outcome import Outcome, Place
from opfa.report.tables import Table
from opfa.runtime import packed
from opfa.runtime.encoder import KEPT
from opfa.runtime.families import Linear, build, check_family, pack_layers
from opfa.runtime.mapped import prefix_of
from opfa.runtime.packing import DTYPES
from opfa.storage.files import check_new, new_directory, write_text
from opfa.storage.foreign import CONFIG, PACKED, QUANTIZED, read_object
from opfa.storage.runs import shortened


class PackResult(Outcome):
    """A packed model. `bytes_a_weight` are those of the matrices by their live weights."""

    directory: Place
    family: str
    dtype: str
    bytes: int  # of the packed file
    matrix_bytes: int  # of it, those of the encoder's matrices
    live: int  # weights of these matrices
    bytes_a_weight: float
    sparse: int  # matrices that are stored without their zeros
    dense: int  # and those that have too few to gain

    def table(self) -> Table:
        """Bytes, and how the matrices are stored."""
        rows = [
            ("bytes", f"{self.bytes:,}"),
            ("bytes of matrices", f"{self.matrix_bytes:,}"),
            ("live weights", f"{self.live:,}"),
            ("bytes a live weight", f"{self.bytes_a_weight:.2f}"),
            ("sparse matrices", f"{self.sparse:,}"),
            ("dense matrices", f"{self.dense:,}"),
        ]
        return Table((self.directory.name, f"packed, {self.dtype}"), rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """How it is used."""
        return [f"In Python: opfa.runtime.load({str(self.directory)!r})"]

    def places(self) -> Mapping[str, Path | str]:
        """The model."""
        return {"model": self.directory}


def pack(name: str, output: Path, dtype: str) -> PackResult:
    """Write the new directory `output`: configuration, tokenizer and one packed file."""
    check_new(output)
    if dtype not in DTYPES:
        raise RunError(f"dtype = {dtype!r}: must be {' or '.join(DTYPES)}")
    check_family(load_config(name))
    tokenizer, model = load_tokenizer(name), trained.load(name, exact=False)
    layers = _layers(model)
    source = checked_directory("model", name, with_weights=True)
    with new_directory(output) as work:
        with quiet_transformers():
            tokenizer.save_pretrained(work)
        copy_files(source, work)
        _write_config(source, type(model).__name__, shortened(name), work)
        packed.write(
            work / PACKED,
            dict(_tensors(model, {name for names in layers for name in names})),
            layers,
            family=model.config.model_type,
            dtype=dtype,
            model=shortened(name),
        )
        num_bytes = (work / PACKED).stat().st_size
    matrices = [linear.matrix for linear in layers.values()]
    live = sum(matrix.num_live for matrix in matrices)
    arrays = [array for matrix in matrices for array in matrix.arrays.values()]
    num_sparse = sum(matrix.block > 0 for matrix in matrices)
    return PackResult(
        directory=output,
        family=model.config.model_type,
        dtype=dtype,
        bytes=num_bytes,
        matrix_bytes=sum(array.nbytes for array in arrays),
        live=live,
        bytes_a_weight=sum(array.nbytes for array in arrays) / max(live, 1),
        sparse=num_sparse,
        dense=len(matrices) - num_sparse,
    )


def _layers(model: PreTrainedModel) -> dict[tuple[str, ...], Linear]:
    """The packed layers of a model's encoder, by their names."""
    encoder, prefix = model.base_model, prefix_of(model)
    assert isinstance(encoder, PreTrainedModel), "heads stand on one"
    linear = [key for key, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    found: dict[tuple[str, ...], Linear] = {}
    with Bar("packing layers", sum(key.partition(".")[0] not in KEPT for key in linear)) as bar:

        def layers(paths: Sequence[str]) -> Linear:
            made = found[tuple(prefix + path for path in paths)] = pack_layers(encoder, paths)
            bar.advance(len(paths))
            return made

        build(encoder, layers)
    return found


def _tensors(model: PreTrainedModel, packed: Container[str]) -> Iterator[tuple[str, NDArray]]:
    """All parameters and buffers but those of packed layers; those that modules share once."""
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if key.rpartition(".")[0] not in packed:
            yield key, tensor.detach().contiguous().numpy()


def _write_config(source: Path, architecture: str, made_from: str, directory: Path) -> None:
    """The configuration, in fp32 and with what the model is; not redacted, it names classes."""
    gone = (QUANTIZED, "torch_dtype")
    values = {key: value for key, value in read_object(source / CONFIG).items() if key not in gone}
    values |= {"architectures": [architecture], "dtype": "float32", "packed_from": made_from}
    write_text(directory / CONFIG, json.dumps(values, indent=2) + "\n")
