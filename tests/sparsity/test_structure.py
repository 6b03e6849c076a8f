"""Which structure is found in a mask, and that none is found by chance."""

import re
from math import prod
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from opfa.sparsity.anatomy import (
    ADAPTER,
    NumHeads,
    heads_of,
    is_pruned,
    layer_of,
    paired_names,
    part_of,
    short_kinds,
)
from opfa.sparsity.structure import structure_of


def random(sparsity: float, shape: tuple[int, int] = (96, 64)) -> Tensor:
    """A mask with exactly so many zeros, anywhere."""
    mask = torch.ones(prod(shape), dtype=torch.bool)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(0))
    mask[order[: round(sparsity * len(mask))]] = False
    return mask.view(shape)


def n_of_m(kept: int, group: int, shape: tuple[int, int] = (96, 64)) -> Tensor:
    """So many live weights in each group, at random places."""
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1)).view(-1, group)
    return (scores.argsort(1).argsort(1) < kept).view(shape)


@pytest.mark.parametrize("sparsity", [0.02, 0.25, 0.5, 0.75, 0.9, 0.97, 0.995])
@pytest.mark.parametrize("shape", [(96, 64), (16, 16), (512, 768)])
def test_zeros_anywhere_have_no_structure(sparsity: float, shape: tuple[int, int]) -> None:
    assert structure_of(random(sparsity, shape)).pattern == "unstructured"


@pytest.mark.parametrize(("kept", "group"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 16)])
def test_n_of_m_is_found_with_the_smallest_group(kept: int, group: int) -> None:
    found = structure_of(n_of_m(kept, group))
    assert (found.pattern, found.exceptions) == (f"{kept}:{group}", 0)


def test_n_of_m_that_8_bits_rounded_is_still_found() -> None:
    mask = n_of_m(2, 4)
    live = mask.nonzero()[::40]
    mask[live[:, 0], live[:, 1]] = False
    found = structure_of(mask)
    assert (found.pattern, found.exceptions) == ("2:4", len(live))


def test_one_group_with_more_live_weights_is_no_n_of_m() -> None:
    mask = n_of_m(2, 4)
    mask[0, :3] = True
    assert structure_of(mask).pattern == "unstructured"


def test_n_of_m_is_found_beside_dead_rows() -> None:
    mask = n_of_m(2, 4)
    mask[::4] = False
    found = structure_of(mask)
    assert (found.pattern, found.dead_rows, found.dead_columns) == ("2:4", 24, 0)


def test_a_few_groups_may_agree_by_chance() -> None:
    mask = torch.tensor([True, False]).repeat(4, 4).index_fill(0, torch.tensor([1]), value=False)
    mask[1, 1::2] = True
    assert structure_of(mask).pattern == "unstructured"
    assert structure_of(mask.repeat(4, 1)).pattern == "1:2"


def test_groups_lie_along_the_input() -> None:
    assert structure_of(n_of_m(2, 4, (64, 96)).T).pattern == "unstructured"


@pytest.mark.parametrize("block", [(4, 1), (1, 4), (8, 8), (16, 16), (32, 32), (2, 16)])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_the_largest_block_is_found(block: tuple[int, int], sparsity: float) -> None:
    small = random(sparsity, (512 // block[0], 512 // block[1]))
    mask = small.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    found = structure_of(mask)
    assert (found.pattern, found.exceptions) == (f"block {block[0]}x{block[1]}", 0)


def test_blocks_that_are_not_aligned_are_none() -> None:
    mask = random(0.8, (24, 16)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert structure_of(mask.roll((1, 1), (0, 1))).pattern == "unstructured"


def test_a_few_zeros_beside_blocks_are_counted() -> None:
    mask = random(0.5, (24, 16)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    live = mask.nonzero()[::100]
    mask[live[:, 0], live[:, 1]] = False
    found = structure_of(mask)
    assert (found.pattern, found.exceptions) == ("block 4x4", len(live))


def test_dead_rows_and_columns_are_found() -> None:
    rows, columns, both = (torch.ones(96, 64, dtype=torch.bool) for _ in range(3))
    rows[[3, 7, 9]] = False
    columns[:, [5, 6]] = False
    both[[3, 7]], both[:, 5] = False, False
    assert (structure_of(rows).pattern, structure_of(rows).dead_rows) == ("rows", 3)
    assert (structure_of(columns).pattern, structure_of(columns).dead_columns) == ("columns", 2)
    assert structure_of(both).pattern == "rows and columns"


def test_dead_neurons_are_counted_whatever_the_pattern() -> None:
    mask = random(0.8)
    mask[[0, 10, 20]], mask[:, 7] = False, False
    found = structure_of(mask)
    assert (found.pattern, found.dead_rows, found.dead_columns) == ("unstructured", 3, 1)


def test_dead_heads_are_rows_of_queries_and_columns_of_the_projection() -> None:
    query = torch.ones(64, 64, dtype=torch.bool)
    query[16:32] = False
    found = structure_of(query, (0, 4))
    assert (found.pattern, found.dead_heads) == ("heads", 1)
    found = structure_of(query.T, (1, 4))
    assert (found.pattern, found.dead_heads) == ("heads", 1)


def test_heads_do_not_explain_dead_columns() -> None:
    query = torch.ones(64, 64, dtype=torch.bool)
    query[16:32], query[:, 5] = False, False
    found = structure_of(query, (0, 4))
    assert (found.pattern, found.dead_heads) == ("rows and columns", 1)


def test_rows_that_are_no_whole_head_are_rows() -> None:
    query = torch.ones(64, 64, dtype=torch.bool)
    query[10:26] = False
    found = structure_of(query, (0, 4))
    assert (found.pattern, found.dead_heads) == ("rows", 0)


def test_a_handful_of_zeros_has_no_structure() -> None:
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[0, :4] = False
    assert structure_of(mask).pattern == "unstructured"


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert.encoder.layer.0.attention.self.query.weight", (0, 12)),
        ("bert.encoder.layer.0.attention.output.dense.weight", (1, 12)),
        ("distilbert.transformer.layer.3.attention.v_lin.weight", (0, 12)),
        ("model.layers.7.attn.Wqkv.weight", (0, 36)),
        ("model.layers.7.attn.Wo.weight", (1, 12)),
        ("bert.encoder.layer.0.output.dense.weight", None),
    ],
)
def test_which_matrices_have_heads(name: str, heads: tuple[int, int] | None) -> None:
    assert heads_of(name, NumHeads(12)) == heads


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.11.output.dense.weight", ("bert.encoder", 11, "output.dense")),
        ("layers.3.mlp.Wi.weight", ("", 3, "mlp.Wi")),
        (
            "encoder.block.2.layer.0.SelfAttention.q.weight",
            ("encoder", 2, "layer.0.SelfAttention.q"),
        ),
        ("h.5.attn.c_proj.weight", ("", 5, "attn.c_proj")),
        (
            "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight",
            ("albert.encoder.albert_layer_groups.0", 0, "ffn"),
        ),
        ("transformer.ffns.2.lin1.weight", ("transformer", 2, "lin1")),
        ("bert.pooler.dense.weight", None),
    ],
)
def test_which_layer_a_tensor_is_in(name: str, layer: tuple[str, int, str] | None) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("bert.embeddings.word_embeddings.weight", (99, 8), "embeddings"),
        ("cls.predictions.decoder.weight", (99, 8), "embeddings"),
        ("bert.embeddings.LayerNorm.weight", (8,), "norms"),
        ("bert.embeddings.LayerNorm.gamma", (8,), "norms"),
        ("bert.embeddings.LayerNorm.bias", (8,), "biases"),
        ("bert.embeddings.position_ids", (1, 99), "other"),
        ("bert.encoder.layer.0.output.dense.weight", (8, 8), "encoder"),
        ("bert.pooler.dense.weight", (8, 8), "pooler"),
        ("electra.embeddings_project.weight", (8, 8), "embeddings"),
        ("x.encoder.layer.0.output.dense.lora_B.default.weight", (8, 8), "other"),
        ("classifier.weight", (2, 8), "heads"),
    ],
)
def test_which_part_a_tensor_is(name: str, shape: tuple[int, ...], part: str) -> None:
    assert part_of(name, shape) == part


def test_short_names_tell_kinds_apart_and_follow_the_data() -> None:
    kinds = ["attention.output.dense", "attention.self.key", "attention.self.query"]
    kinds += ["attention.self.value", "intermediate.dense", "output.dense"]
    short = ["query", "key", "value", "attention output", "intermediate", "output"]
    assert list(short_kinds(kinds).values()) == short


def test_names_are_paired_with_and_without_the_base_model() -> None:
    bare = ["encoder.layer.0.output.dense.weight", "pooler.dense.weight"]
    whole = [f"bert.{name}" for name in bare] + ["cls.predictions.transform.dense.weight"]
    assert paired_names(bare, whole) == dict(zip(bare, whole, strict=False))
    assert paired_names(whole, bare) == dict(zip(whole, bare, strict=False))
    assert paired_names(["dense.weight"], ["a.dense.weight", "b.dense.weight"]) == {}
    assert paired_names(["a.dense.weight", "b.dense.weight"], ["dense.weight"]) == {}


@pytest.mark.parametrize(
    ("name", "num_zeros", "expected"),
    [
        ("bert.encoder.layer.0.output.dense.weight", 64, True),
        ("bert.encoder.layer.0.output.dense.weight", 1, True),
        ("bert.encoder.layer.0.output.dense.weight", 0, False),
        ("model.bert.encoder.layer.0.output.dense.base_layer.weight", 64, True),
        ("model.bert.encoder.layer.0.output.dense.lora_B.default.weight", 64, False),
        ("bert.encoder.layer.0.output.adapters.task.adapter_up.weight", 64, False),
        ("bert.pooler.dense.weight", 64, True),
        ("classifier.weight", 64, False),
        ("classifier.weight", 63, True),
    ],
)
def test_zeros_alone_are_pruned_by_what_they_belong_to(
    name: str, num_zeros: int, expected: bool
) -> None:
    assert is_pruned(name, (8, 8), num_zeros) == expected


def test_every_method_of_peft_is_known_as_an_adapter() -> None:
    sources = [path.read_text() for path in Path(peft.__file__).parent.glob("tuners/**/model.py")]
    found = re.findall(r'^    prefix(?:: str)? = "(\w+)"', "".join(sources), re.MULTILINE)
    path = "base_model.model.bert.encoder.layer.0.output.dense"
    unknown = {p for p in found if not ADAPTER.search(f"{path}.{p}B.default.weight")}
    assert "lora_" in found and unknown <= {"ln_tuning_", "trainable_tokens_"}  # no matrices


def test_a_matrix_without_a_live_weight_is_empty() -> None:
    found = structure_of(torch.zeros(8, 8, dtype=torch.bool), (0, 2))
    assert (found.pattern, found.dead_rows, found.dead_heads) == ("empty", 8, 2)
