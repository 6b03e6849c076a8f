"""The packer: any checkpoint of a family of the runtime -> a directory that the runtime maps."""

import json
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from opfa.compression import quant
from opfa.errors import RunError
from opfa.models.configs import checked_directory, load_config, load_tokenizer, quiet_transformers
from opfa.models.sentences import copy_files
from opfa.report.bars import Bar
from opfa.report.outcome import Outcome, Place
from opfa.report.tables import Table
from opfa.runtime import packed
from opfa.runtime.encoder import KEPT, encoder_of, load_for
from opfa.runtime.families import build, check_family
from opfa.runtime.layers import Linear, ModelLayers, table_of
from opfa.runtime.library import DTYPES
from opfa.runtime.mapped import prefix_of
from opfa.storage.files import check_new, new_directory, write_text
from opfa.storage.foreign import CONFIG, PACKED, QUANTIZED, read_object
from opfa.storage.runs import RECIPE, shortened


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

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """What the kernels do with it."""
        return [("inspect", self.directory, "--runtime")]


def pack(name: str, output: Path, dtype: str | None, recipe: str | None = None) -> PackResult:
    """Write the new directory `output`: configuration, tokenizer and one packed file, and the text
    of the `recipe` that says how its inputs are read.
    """
    check_new(output)
    if dtype is not None and dtype not in DTYPES:
        raise RunError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    check_family(load_config(name))
    tokenizer, (model, dtype) = load_tokenizer(name), load_for(name, dtype)
    layers = _layers(model, dtype)
    inside = {name for names in layers for name in names}
    source = checked_directory("model", name, with_weights=True)
    with new_directory(output) as work:
        with quiet_transformers():
            tokenizer.save_pretrained(work)
        copy_files(source, work)
        if recipe is not None:
            write_text(work / RECIPE, recipe)
        _write_config(source, type(model).__name__, shortened(name), work)
        if outside := set(quant.quant_layers(model)) - inside:  # torch computes them
            quant.save(model, work / quant.FILE, outside)
        packed.write(
            work / PACKED,
            dict(_tensors(model, inside)),
            layers,
            family=model.config.model_type,
            dtype=dtype,
            model=shortened(name),
        )
        num_bytes = (work / PACKED).stat().st_size
    return _result(output, model.config.model_type, dtype, num_bytes, layers.values())


def _result(
    output: Path, family: str, dtype: str, num_bytes: int, layers: Collection[Linear]
) -> PackResult:
    matrices = [linear.matrix for linear in layers]
    live = sum(matrix.num_live for matrix in matrices)
    matrix_bytes = sum(matrix.num_bytes for matrix in matrices)
    num_sparse = sum(matrix.block > 0 for matrix in matrices)
    return PackResult(
        directory=output,
        family=family,
        dtype=dtype,
        bytes=num_bytes,
        matrix_bytes=matrix_bytes,
        live=live,
        bytes_a_weight=matrix_bytes / max(live, 1),
        sparse=num_sparse,
        dense=len(matrices) - num_sparse,
    )


class Counted(ModelLayers):
    """Layers of a model that are kept, and move a bar."""

    def __init__(
        self, encoder: PreTrainedModel, dtype: str, kept: dict[tuple[str, ...], Linear], bar: Bar
    ) -> None:
        """Put them into `kept` by their paths."""
        super().__init__(encoder, dtype)
        self.kept, self.bar = kept, bar

    def linear(self, paths: Sequence[str]) -> Linear:
        """Pack layers."""
        made = self.kept[tuple(paths)] = super().linear(paths)
        self.bar.advance(len(paths))
        return made


def _layers(model: PreTrainedModel, dtype: str) -> dict[tuple[str, ...], Linear]:
    """The packed layers of a model's encoder, by their names."""
    encoder, prefix = encoder_of(model), prefix_of(model)
    linear = [key for key, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    found: dict[tuple[str, ...], Linear] = {}
    with Bar("packing layers", sum(key.partition(".")[0] not in KEPT for key in linear)) as bar:
        build(encoder, Counted(encoder, dtype, found, bar))
    return {tuple(prefix + path for path in paths): layer for paths, layer in found.items()}


def _tensors(model: PreTrainedModel, inside: Container[str]) -> Iterator[tuple[str, NDArray]]:
    """All parameters and buffers but those of packed layers; those that modules share once."""
    eight_bits = quant.quant_layers(model)
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        path = key.rpartition(".")[0]
        is_range = path in eight_bits and not isinstance(tensor, nn.Parameter)  # quant.save has it
        if path not in inside and not is_range:
            module = model.get_submodule(path)
            is_table = isinstance(module, nn.Embedding)
            yield key, table_of(module) if is_table else tensor.detach().contiguous().numpy()


def _write_config(source: Path, architecture: str, made_from: str, directory: Path) -> None:
    """The configuration, in fp32 and with what the model is; not redacted, it names classes."""
    gone = (QUANTIZED, "torch_dtype")
    values = {key: value for key, value in read_object(source / CONFIG).items() if key not in gone}
    values |= {"architectures": [architecture], "dtype": "float32", "packed_from": made_from}
    write_text(directory / CONFIG, json.dumps(values, indent=2) + "\n")
