"""A transformers model whose encoder runs in the kernels.

The model stays what it is, with its head in torch: only the encoder's `forward` is another, and its
weights are packed. So the outputs are transformers' own, and a pipeline can hold it.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from opfa.compression import quant
from opfa.errors import ModelError, RunError
from opfa.models import trained
from opfa.models.configs import checked_directory
from opfa.runtime import mapped
from opfa.runtime.build import why_not
from opfa.runtime.families import Build, build
from opfa.runtime.layers import Layers, ModelLayers
from opfa.runtime.library import DTYPES, level
from opfa.runtime.packing import MOST_DENSITY
from opfa.runtime.program import Ints, Runner
from opfa.runtime.threads import Pool, keep_torch_to_one, num_threads
from opfa.storage.foreign import PACKED

Dtype = Literal["fp32", "bf16", "int8"]
KEPT = ("embeddings", "pooler")  # modules of an encoder that stay in torch
SLOW_WHEN_DENSE = ("plain", "neon")  # slower than torch in fp32, or not measured
SMALL_HEAD = 1 << 22  # weights; torch gets one thread for it
REFUSED = ("inputs_embeds", "output_attentions", "output_hidden_states")


class KernelEncoder:
    """What the class of an encoder becomes: `forward` computes in the kernels."""

    runner: Runner
    built: Build
    computes_in: str  # the type of the products
    training: bool

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,  # of transformers' models
    ) -> BaseModelOutput | BaseModelOutputWithPooling:
        """Hidden states [batch, tokens, channels] of `input_ids` [batch, tokens], fp32.

        Only real tokens are computed; hidden states of padding are 0. Raises `RunError` for what
        the kernels lack: training, attentions, hidden states of all layers, embeddings as input.
        """
        if self.training:
            raise RunError("the runtime computes forward only; train the model in torch")
        for name in REFUSED:
            if options.get(name) is not None and options[name] is not False:
                raise RunError(f"{name}: the runtime doesn't have it")
        if input_ids is None or input_ids.ndim != 2:
            raise RunError("input_ids: must be a tensor [batch, tokens]")
        lengths, rows = _real_tokens(input_ids, attention_mask)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        longest, most = int(lengths.max(initial=0)), self.built.most_tokens
        if most is not None and longest > most:
            raise RunError(f"input_ids: {longest} tokens; the model has {most} positions")
        ids = self._ids(input_ids.numpy(), token_type_ids, position_ids, rows)
        shape = (*input_ids.shape, self.built.channels)
        hidden = torch.empty(shape) if len(rows) == input_ids.numel() else torch.zeros(shape)
        if len(rows):
            self.runner.run(starts, ids, rows=rows, target=hidden.numpy())
        pooler = getattr(self, "pooler", None)
        if pooler is None:
            return BaseModelOutput(last_hidden_state=hidden)  # pyright: ignore[reportArgumentType] - a FloatTensor
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooler(hidden))  # pyright: ignore[reportArgumentType]

    def _ids(
        self, ids: Any, types: Tensor | None, positions: Tensor | None, rows: Ints
    ) -> list[Ints]:
        """Rows of the embedded tables for each real token."""
        found: list[Any] = [ids, None, np.zeros_like(ids) if types is None else types.numpy()]
        if positions is not None:
            found[1] = positions.expand(*ids.shape).numpy()
        elif (padding := self.built.first_position) is not None:  # RoBERTa's begin behind it
            is_token = ids != padding
            found[1] = np.cumsum(is_token, 1) * is_token + padding
        else:
            found[1] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        names = ("input_ids", "position_ids", "token_type_ids")
        picked = []
        for name, given, size in zip(names, found, self.built.table_sizes, strict=False):
            values = given.reshape(-1)[rows].astype(np.int32)
            if len(values) and not 0 <= values.min() <= values.max() < size:
                wrong = values.max() if values.max() >= size else values.min()
                raise RunError(f"{name}: {wrong} is not in the model's {size:,}")
            picked.append(values)
        return picked

    def save_pretrained(self, *_: object, **__: object) -> None:
        """Refused: the weights are packed."""
        raise RunError("a model in the runtime can't be saved; save the one that it was made from")


def _real_tokens(ids: Tensor, mask: Tensor | None) -> tuple[Ints, Ints]:
    """Lengths of sequences, and the rows of their tokens."""
    if mask is None:
        return np.full(len(ids), ids.shape[1], np.int32), np.arange(ids.numel(), dtype=np.int32)
    if mask.shape != ids.shape:
        raise RunError(f"attention_mask: is {list(mask.shape)}, and input_ids {list(ids.shape)}")
    is_real = mask.numpy() != 0
    if (np.diff(is_real, axis=1, prepend=False).sum(1) > 2).any():
        raise RunError("attention_mask: the real tokens of a row must stand together")
    lengths = is_real.sum(1)
    return lengths[lengths > 0].astype(np.int32), np.flatnonzero(is_real).astype(np.int32)


def with_kernels(
    model: PreTrainedModel, threads: int, dtype: str = "fp32", layers: Layers | None = None
) -> PreTrainedModel:
    """Make the encoder of a model run in the kernels, in place, and drop its dense weights.

    Its layers are packed in `dtype`, unless `layers` that are packed so come from elsewhere.
    """
    encoder = encoder_of(model)
    built = build(encoder, layers or ModelLayers(encoder, dtype))
    for name in [name for name, _ in encoder.named_children() if name not in KEPT]:
        delattr(encoder, name)
    cls = type(encoder)
    encoder.__class__ = type(f"Kernel{cls.__name__}", (KernelEncoder, cls), {})
    runner = Runner(built.program, Pool(threads))
    vars(encoder).update(built=built, runner=runner, computes_in=dtype)
    left = [layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)]
    if sum(left) <= SMALL_HEAD:
        keep_torch_to_one(model)
    return model.eval().requires_grad_(False)


def speed_up(model: PreTrainedModel) -> str:
    """Put a model's encoder into the kernels if that is faster, in place; says where it runs.

    A model whose layers are in 8 bits computes so there too. Nothing is changed where the kernels
    can't run, for a model that they don't know, and for a dense one in fp32 where dense products
    are not known to be faster than torch's.
    """
    if why := why_not():  # it may have to compile them
        return f"torch ({why})"
    dtype, is_slow = own_type(model), level() in SLOW_WHEN_DENSE
    if dtype == "fp32" and is_slow and (density := _density(encoder_of(model))) > MOST_DENSITY:
        most = f"at most {MOST_DENSITY:.0%} gain with {level()} kernels"
        return f"torch ({density:.0%} of the weights live; {most})"
    try:
        with_kernels(model, num_threads(None), dtype)
    except ModelError as error:  # of its family, activation or heads; before anything is changed
        return f"torch ({error})"
    return runs_in(model)


def own_type(model: PreTrainedModel) -> Dtype:
    """The type in which a model's encoder computes: int8 for layers in 8 bits, else fp32."""
    return "int8" if quant.quant_layers(encoder_of(model)) else "fp32"


def _density(encoder: PreTrainedModel) -> float:
    """The share of weights of linear layers that live."""
    weights = [m.weight for m in encoder.modules() if isinstance(m, nn.Linear)]
    num_live = sum(int(weight.count_nonzero()) for weight in weights)
    return num_live / max(1, sum(weight.numel() for weight in weights))


def runs_in(model: PreTrainedModel) -> str:
    """What computes the encoder of a model from `load`, in a few words."""
    encoder = encoder_of(model)
    assert isinstance(encoder, KernelEncoder), "it is in the kernels"
    threads = encoder.runner.pool.threads
    return f"opfa's kernels ({encoder.computes_in}, {level()}, {threads} threads)"


def load(
    model: str | Path, *, dtype: Dtype | None = None, threads: int | None = None
) -> PreTrainedModel:
    """A model whose encoder runs in the kernels, for use as in transformers; forward only.

    `model` is a run, a directory in any form, or a Hub name. `dtype` is how it computes: "fp32";
    "bf16", whose products have 8 bits of precision and fp32 sums; or "int8", for models that were
    trained or calibrated in 8 bits, with exact integer sums. By default int8 for these, else fp32.
    `threads` are by default the cores that this process may use. What `opfa pack` wrote is mapped,
    in the type that it was packed in.
    Raises `ModelError` for a family that the runtime lacks, `RunError` for a bad option.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RunError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    number = num_threads(threads)
    directory = checked_directory("model", str(model), with_weights=True)
    if (directory / PACKED).is_file():
        return mapped.load(
            directory, dtype, lambda it, layers, kind: with_kernels(it, number, kind, layers)
        )
    found, chosen = load_for(str(model), dtype)
    return with_kernels(found, number, chosen)


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder below a model's head, or the model itself."""
    encoder = model.base_model
    assert isinstance(encoder, PreTrainedModel), "heads stand on one"
    return encoder


def load_for(name: str, dtype: str | None) -> tuple[PreTrainedModel, str]:
    """A model with its weights, and the type in which the runtime computes with it.

    Raises `ModelError` for int8 and a model that isn't in 8 bits.
    """
    is_8_bits = trained.ranges_of(name) is not None
    chosen = dtype or ("int8" if is_8_bits else "fp32")
    if chosen == "int8" and not is_8_bits:
        raise ModelError(f"model {name!r}: has no 8-bit ranges; `opfa calibrate` makes them")
    return trained.load(name, exact=chosen == "int8"), chosen
