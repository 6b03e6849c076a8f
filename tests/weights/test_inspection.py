"""Inspection: the same findings from every source, what a sparsity refers to, and comparisons."""

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub import NAME, serving
from onnx import TensorProto, helper, numpy_helper, save_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from opfa.commands import app as cli
from opfa.errors import ModelError
from opfa.sparsity.anatomy import is_matrix
from opfa.sparsity.masks import report
from opfa.weights.comparison import compare
from opfa.weights.inspection import check_stated, directory_of, inspect

KINDS = {
    "attention.self.query": (16, 16),
    "attention.self.key": (16, 16),
    "attention.self.value": (16, 16),
    "attention.output.dense": (16, 16),
    "intermediate.dense": (32, 16),
    "output.dense": (16, 32),
}
ENCODER = 2 * (4 * 256 + 2 * 512)


def pruned(shape: tuple[int, int], seed: int) -> Tensor:
    """A matrix with exactly three quarters of its weights zero, anywhere."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 10
    mask = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(seed))
    return values * (mask >= values.numel() * 3 // 4).view(shape)


@pytest.fixture
def state() -> dict[str, Tensor]:
    """A model of two layers, three quarters of whose encoder weights are zero."""
    tensors = {
        "bert.embeddings.word_embeddings.weight": torch.ones(300, 16),
        "bert.embeddings.LayerNorm.weight": torch.ones(16),
        "bert.embeddings.LayerNorm.bias": torch.zeros(16),
        "bert.pooler.dense.weight": torch.ones(16, 16),
        "bert.pooler.dense.bias": torch.zeros(16),
        "classifier.weight": torch.ones(2, 16),
        "classifier.bias": torch.zeros(2),
    }
    for layer in (0, 1):
        for seed, (kind, shape) in enumerate(KINDS.items()):
            path = f"bert.encoder.layer.{layer}.{kind}"
            tensors[f"{path}.weight"] = pruned(shape, 10 * layer + seed)
            tensors[f"{path}.bias"] = torch.zeros(shape[0])
    return tensors


def write(state: dict[str, Tensor], directory: Path, **config: Any) -> Path:
    directory.mkdir(parents=True)
    save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"num_attention_heads": 2, **config}))
    return directory


@pytest.fixture
def model(state: dict[str, Tensor], tmp_path: Path) -> Path:
    return write(state, tmp_path / "checkpoint")


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def test_tensors_are_those_of_sparsity_json_and_nothing_more(
    state: dict[str, Tensor], model: Path
) -> None:
    names = [name for name in state if ".layer." in name and state[name].ndim == 2]
    expected = report({name: state[name] != 0 for name in sorted(names)})
    found = inspect(model)
    assert {key: found[key] for key in expected} == expected


def test_a_sparsity_is_told_of_the_pruned_the_encoder_and_everything(
    state: dict[str, Tensor], model: Path
) -> None:
    state[QUERY] = torch.ones(16, 16)
    write(state, model.with_name("other"))
    found = inspect(model.with_name("other"))
    zeros = (ENCODER - 256) * 3 // 4
    size = sum(tensor.numel() for tensor in state.values())
    assert (found["total"]["zeros"], found["total"]["size"]) == (zeros, ENCODER - 256)
    assert (found["encoder"]["zeros"], found["encoder"]["size"]) == (zeros, ENCODER)
    assert (found["whole"]["zeros"], found["whole"]["size"]) == (zeros, size)
    assert found["whole"]["sparsity"] == zeros / size


def test_what_is_excluded_is_counted_by_parts(model: Path) -> None:
    assert inspect(model)["excluded"] == {
        "encoder": {"tensors": 0, "size": 0},
        "embeddings": {"tensors": 1, "size": 4800},
        "pooler": {"tensors": 1, "size": 256},
        "heads": {"tensors": 1, "size": 32},
        "norms": {"tensors": 1, "size": 16},
        "biases": {"tensors": 15, "size": 16 + 16 + 2 + 2 * (5 * 16 + 32)},
        "other": {"tensors": 0, "size": 0},
    }


def test_each_layer_has_a_row_with_its_kinds(state: dict[str, Tensor], tmp_path: Path) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    state[name] = torch.ones(16, 32)
    first, second = inspect(write(state, tmp_path / "m"))["layers"]
    assert first["kinds"] == dict.fromkeys(sorted(KINDS), 0.75) and first["sparsity"] == 0.75
    assert (second["layer"], second["kinds"]["output.dense"]) == (1, 0.0)
    assert second["sparsity"] == (2048 - 512) * 0.75 / 2048


def test_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"h.{number}.mlp.weight" for number in (10, 2, 0)]
    found = inspect(write({name: pruned((16, 16), 1) for name in names}, tmp_path / "m"))
    assert [row["layer"] for row in found["layers"]] == [0, 2, 10]


def test_patterns_name_structure_and_dead_heads(state: dict[str, Tensor], tmp_path: Path) -> None:
    heads = torch.ones(16, 16)
    heads[8:] = 0
    state[QUERY] = heads
    half = torch.ones(32, 16)
    half[:, ::4] = half[:, 1::4] = 0
    half[3] = 0
    state["bert.encoder.layer.0.intermediate.dense.weight"] = half
    found = inspect(write(state, tmp_path / "m"))["patterns"]
    assert (found[QUERY]["pattern"], found[QUERY]["dead_heads"]) == ("heads", 1)
    half_pattern = found["bert.encoder.layer.0.intermediate.dense.weight"]
    assert half_pattern["dead_rows"] == 1 and half_pattern["dead_heads"] is None
    assert found["bert.encoder.layer.1.output.dense.weight"]["pattern"] == "unstructured"


def test_heads_are_counted_by_layer(tmp_path: Path) -> None:
    names = [f"bert.encoder.layer.{n}.attention.self.query.weight" for n in range(2)]
    values = {name: torch.ones(16, 16) for name in names}
    for value in values.values():
        value[8:12] = 0
    layers = {"1": {"num_attention_heads": 4, "intermediate_size": 5}, "x": 3}
    for number, (own, dead) in enumerate([(layers, 1), ({}, 0), (3, 0)]):
        directory = write(values, tmp_path / f"{number}", per_layer_config=own)
        assert inspect(directory)["patterns"][names[1]]["dead_heads"] == dead
        assert inspect(directory)["patterns"][names[0]]["dead_heads"] == 0


def test_the_word_for_heads_in_distilbert_is_known(tmp_path: Path) -> None:
    values = torch.ones(16, 16)
    values[:8] = 0
    name = "distilbert.transformer.layer.0.attention.q_lin.weight"
    directory = write({name: values}, tmp_path / "m", num_attention_heads=None, n_heads=2)
    (directory / "config.json").write_text('{"n_heads": 2}')
    assert inspect(directory)["patterns"][name]["pattern"] == "heads"


@pytest.mark.parametrize(("dtype", "value_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_sizes_are_dense_tensors_files_and_entropy(
    tmp_path: Path, dtype: torch.dtype, value_bytes: int
) -> None:
    values = torch.zeros(32, 32, dtype=dtype)
    values.view(-1)[:256] = 1
    other = torch.ones(10, dtype=dtype)
    found = inspect(write({"h.0.a.weight": values, "h.0.a.bias": other}, tmp_path / "m"))
    positions = 1024 * (0.25 * 2 + 0.75 * math.log2(4 / 3)) / 8
    assert found["sizes"] == {
        "dense": 1034 * value_bytes,
        "file": (tmp_path / "m/model.safetensors").stat().st_size,
        "limit": math.ceil(positions + 256 * value_bytes + 10 * value_bytes),
    }
    assert found["bytes"] == found["sizes"]["file"]


def sharded(state: dict[str, Tensor], directory: Path) -> Path:
    directory.mkdir()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:9]}
    parts["model-00002-of-00002.safetensors"] = names[9:]
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text('{"num_attention_heads": 2}')
    return directory


def pickled(state: dict[str, Tensor], directory: Path, *, is_zip: bool) -> Path:
    directory.mkdir()
    path = directory / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    (directory / "config.json").write_text('{"num_attention_heads": 2}')
    return directory


SAME = ("fingerprint", "patterns", "layers", "whole", "excluded", "total", "encoder")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return {key: one[key] for key in SAME} == {key: other[key] for key in SAME}


def test_every_kind_of_file_tells_the_same(
    state: dict[str, Tensor], model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "run/model")
    reference = inspect(model)
    for source in (
        model / "model.safetensors",
        tmp_path / "run",
        sharded(state, tmp_path / "sharded"),
        pickled(state, tmp_path / "pickled", is_zip=True),
        pickled(state, tmp_path / "old", is_zip=False),
        tmp_path / "old/pytorch_model.bin",
    ):
        assert same(inspect(source), reference), source


def test_what_lies_beside_the_model_is_no_part_of_it(model: Path) -> None:
    reference = inspect(model)
    save_file({"h.0.x.weight": torch.eye(16)}, model / "quantization.safetensors")
    save_file({"h.0.x.weight": torch.eye(16)}, model / "adapter.safetensors")
    assert inspect(model) == reference


def test_one_file_of_several_is_not_compared_with_a_sparsity_json(model: Path) -> None:
    (model / "sparsity.json").write_text(json.dumps(inspect(model)))
    assert inspect(model)["stated"] == "matches"
    assert inspect(model / "model.safetensors")["stated"] is None


def onnx_file(path: Path, initializers: dict[str, np.ndarray], nodes: Sequence[Any] = ()) -> Path:
    items = [numpy_helper.from_array(values, name) for name, values in initializers.items()]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [16])
    graph = helper.make_graph(nodes, "g", [value], [value], items)
    save_model(helper.make_model(graph), path)
    return path


def test_onnx_initializers_with_the_names_of_the_state_dict(
    state: dict[str, Tensor], model: Path
) -> None:
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    assert same(inspect(onnx_file(model / "model.onnx", arrays)), inspect(model))


def test_onnx_of_other_exporters_is_named_by_its_nodes_and_turned(
    state: dict[str, Tensor], model: Path
) -> None:
    arrays, nodes = {}, []
    for i, (name, tensor) in enumerate(state.items()):
        if not is_matrix(name, tensor.shape):
            arrays[name] = tensor.numpy()
            continue
        arrays[f"onnx::MatMul_{i}"] = tensor.numpy().T.copy()
        path = "/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
        nodes.append(
            helper.make_node("MatMul", ["x", f"onnx::MatMul_{i}"], [name], f"{path}/MatMul")
        )
    assert same(inspect(onnx_file(model / "model.onnx", arrays, nodes)), inspect(model))


@pytest.mark.parametrize("form", ["MatMulInteger", "DequantizeLinear"])
def test_a_zero_in_8_bits_is_what_equals_the_zero_point(tmp_path: Path, form: str) -> None:
    weight = pruned((32, 16), 0)
    integers = (weight.numpy().T.round() + 130).clip(0, 255).astype(np.uint8).copy()
    arrays: dict[str, Any] = {"w_quantized": integers, "w_zero": np.array(130, np.uint8)}
    arrays["w_scale"] = np.array(1, np.float32)
    name = "/bert/encoder/layer.0/output/dense/MatMul"
    if form == "MatMulInteger":
        nodes = [helper.make_node(form, ["x", "w_quantized", "z", "w_zero"], ["y"], name)]
    else:
        nodes = [
            helper.make_node(form, ["w_quantized", "w_scale", "w_zero"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"], name),
        ]
    found = inspect(onnx_file(tmp_path / "m.onnx", arrays, nodes))
    expected = {"bert.encoder.layer.0.output.dense.weight": weight != 0}
    assert found["tensors"] == report(expected)["tensors"]
    assert found["fingerprint"] == report(expected)["fingerprint"]


def test_a_hub_name_is_read_by_ranges_without_embeddings(
    state: dict[str, Tensor],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = inspect(model)
    matrices = sum(t.numel() for name, t in state.items() if is_matrix(name, t.shape))
    header = (model / "model.safetensors").stat().st_size - 4 * local["whole"]["size"]
    config = (model / "config.json").stat().st_size
    with serving(model, tmp_path / "cache", monkeypatch) as hub:
        found = inspect(NAME)
    assert hub.num_bytes == found["downloaded_bytes"] == header + 4 * matrices + config
    assert found["downloaded_bytes"] < local["bytes"] - 4 * 4800
    assert {**found, "downloaded_bytes": 0} == local
    assert not (tmp_path / "cache").exists()


def test_shards_on_the_hub_are_read_by_ranges(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = sharded(state, tmp_path / "sharded")
    with serving(directory, tmp_path / "cache", monkeypatch) as hub:
        found = inspect(NAME)
    assert same(found, inspect(directory))
    assert hub.num_bytes == found["downloaded_bytes"] < found["bytes"]


def test_what_is_in_the_cache_is_not_fetched_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model, tmp_path / "cache", monkeypatch) as hub:
        directory_of(NAME)
        hub.num_bytes = 0
        assert inspect(NAME) == inspect(model)
    assert hub.num_bytes == 0


def test_a_model_that_will_be_used_is_downloaded_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model, tmp_path / "cache", monkeypatch) as hub:
        check_stated(NAME)
        directory_of(NAME)
    assert hub.paths.count("model.safetensors") == 1


def test_a_hub_model_without_safetensors_is_downloaded_whole(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = pickled(state, tmp_path / "pickled", is_zip=True)
    with serving(directory, tmp_path / "cache", monkeypatch):
        found = inspect(NAME)
    assert found["downloaded_bytes"] == (directory / "pytorch_model.bin").stat().st_size
    assert same(found, inspect(directory))


def header(directory: Path, entries: Any, data: bytes = b"", length: int | None = None) -> Path:
    directory.mkdir()
    text = json.dumps(entries).encode()
    content = (len(text) if length is None else length).to_bytes(8, "little") + text + data
    (directory / "model.safetensors").write_bytes(content)
    return directory


def entry(**values: Any) -> dict[str, Any]:
    return {"h.0.a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **values}}


@pytest.mark.parametrize(
    ("entries", "length", "message"),
    [
        ({}, 1 << 62, "header of 4,611,686,018,427,387,904"),
        ({}, 99_000_000, "header of 99,000,000"),
        (["no", "object"], None, "its header can't be read"),
        (entry(shape=[1 << 30, 1 << 30]), None, "h.0.a.weight: does not fit its place"),
        (entry(data_offsets=[16, 32]), None, "h.0.a.weight: does not fit its place"),
        (entry(data_offsets=[-16, 0]), None, "h.0.a.weight: Input should be greater"),
        (entry(dtype="Q7"), None, "h.0.a.weight: unknown type 'Q7'"),
        ({"h.0.a.weight": {"dtype": "F32"}}, None, "h.0.a.weight: Field required"),
    ],
)
def test_a_damaged_file_on_the_hub_is_refused_before_its_data_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entries: Any,
    length: int | None,
    message: str,
) -> None:
    directory = header(tmp_path / "m", entries, bytes(16), length)
    with (
        serving(directory, tmp_path / "cache", monkeypatch) as hub,
        pytest.raises(ModelError, match=message),
    ):
        inspect(NAME)
    assert hub.num_bytes <= 8 + len(json.dumps(entries))


def test_a_hub_that_sends_more_than_was_asked_for_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        serving(model, tmp_path / "cache", monkeypatch, has_ranges=False),
        pytest.raises(ModelError, match=r"bytes 0 to .* were asked for, .*HTTP 200"),
    ):
        inspect(NAME)


def test_an_unknown_name_is_one_message(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        serving(model, tmp_path / "cache", monkeypatch),
        pytest.raises(ModelError, match="no such directory, and not available from the Hub"),
    ):
        inspect("someone/else")
    with pytest.raises(ModelError, match="not available from the Hub"):  # nobody listens any more
        inspect(NAME)
    with pytest.raises(ModelError, match="not available from the Hub: Repo id"):
        inspect("no name at all")


class Dangerous:
    """A pickle that would make a directory when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    torch.save({"a": Dangerous(tmp_path / "made")}, tmp_path / "m/pytorch_model.bin")
    with pytest.raises(ModelError, match="one of more than tensors"):
        inspect(tmp_path / "m")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"x", "can't be read"),
        ("a.safetensors", (1 << 62).to_bytes(8, "little") + b"{}", "header too large"),
        ("a.safetensors", (2).to_bytes(8, "little") + b"{}", "hold no weights"),
        ("a.bin", b"no pickle", "can't be read"),
        ("a.onnx", b"", "is empty"),
        ("a.onnx", b"\x08\xff" * 99, "can't be read as ONNX"),
        ("a.txt", b"x", "not weights; .safetensors, .bin, .onnx can be read"),
    ],
)
def test_a_damaged_file_is_one_message(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        inspect(tmp_path / name)


def test_a_pickle_of_something_else_is_one_message(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds a list, not a state dict"):
        inspect(tmp_path)


def test_a_copy_has_equal_masks_and_values(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    found = compare(str(model), str(tmp_path / "copy"))
    assert found.same_masks and found.fingerprints["a"] == found.fingerprints["b"]
    assert found.summary == f"masks equal, {ENCODER * 3 // 4:,} zeros; live values equal"


def test_how_far_live_values_moved(state: dict[str, Tensor], model: Path, tmp_path: Path) -> None:
    state["classifier.weight"] = torch.full((2, 16), 1.25)
    found = compare(str(model), str(write(state, tmp_path / "other")))
    assert found.same_masks
    assert found.tensors["classifier.weight"].moved == 0.25
    squares = sum(
        float(tensor.double().square().sum())
        for name, tensor in load_file(model / "model.safetensors").items()
        if is_matrix(name, tensor.shape)
    )
    assert found.total.moved == pytest.approx(math.sqrt(32 * 0.25**2 / squares))
    assert found.total.max_abs == 0.25


def test_what_came_back_and_what_was_newly_pruned(
    state: dict[str, Tensor], model: Path, tmp_path: Path
) -> None:
    values = state[QUERY].view(-1)
    values[values.nonzero()[:5]] = 0
    values[-256:][(values == 0).nonzero()[-3:]] = 1
    found = compare(str(model), str(write(state, tmp_path / "other")))
    row = found.tensors[QUERY]
    assert (row.both, row.only_a, row.only_b) == (192 - 3, 3, 5)
    assert (row.zeros_a, row.zeros_b) == (192, 194)
    assert not found.same_masks and found.fingerprints["a"] != found.fingerprints["b"]
    assert "3 weights came back, 5 were newly pruned" in found.summary
    assert found.layers[0].kinds["attention.self.query"] == 8 / 256


def test_a_bare_encoder_is_compared_with_a_whole_model(
    state: dict[str, Tensor], model: Path, tmp_path: Path
) -> None:
    bare = {n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")}
    bare["pooler.dense.weight"] = torch.ones(8, 8)
    found = compare(str(model), str(write(bare, tmp_path / "bare")))
    assert found.same_masks and len(found.tensors) == 12
    assert (found.only_in_a, found.only_in_b) == (["classifier.weight"], [])
    assert found.different_shapes == {"bert.pooler.dense.weight": [[16, 16], [8, 8]]}


def test_a_dense_twin_gets_its_zeros_newly_pruned(
    state: dict[str, Tensor], model: Path, tmp_path: Path
) -> None:
    dense = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    found = compare(str(write(dense, tmp_path / "dense")), str(model))
    assert (found.total.only_a, found.total.only_b) == (0, ENCODER * 3 // 4)


def test_integers_and_floats_have_masks_in_common_but_no_distance(
    state: dict[str, Tensor], model: Path
) -> None:
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    arrays |= {n: a.round().astype(np.int8) for n, a in arrays.items() if a.ndim == 2}
    found = compare(str(model), str(onnx_file(model / "model.onnx", arrays)))
    assert found.same_masks and found.total.moved is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other.weight": torch.ones(2, 2)}, "no matrix with the same name"),
        ({"classifier.weight": torch.ones(3, 16)}, "no two matrices have the same shape"),
    ],
)
def test_models_without_anything_in_common_are_not_compared(
    model: Path, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        compare(str(model), str(write(tensors, tmp_path / "other")))


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> str:
    assert cli.run(["inspect", *(str(argument) for argument in arguments)]) == status
    return capsys.readouterr().out


def test_the_command_prints_a_row_for_each_layer(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.split() for line in printed(capsys, model).splitlines()]
    assert ["0", *["75.00"] * 7] in lines and ["1", *["75.00"] * 7] in lines
    assert ["excluded:", "embeddings", "1", "4,800", "-"] in lines
    assert ["everything", "9,458", "32.48%"] in lines
    assert ["pattern", "(matrices):", "unstructured", "(12)"] in lines


def test_the_command_prints_every_tensor_if_asked(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # rich's, which is not os.environ any more once a library has put another object there
    monkeypatch.setitem(Console._environ, "COLUMNS", "150")  # pyright: ignore[reportArgumentType]
    out = printed(capsys, model, "--tensors")
    row = next(line.split() for line in out.splitlines() if QUERY in line)
    assert row[:7] == [QUERY, "16", "x", "16", "192", "75.0000%", "unstructured"]


def test_a_dense_model_is_said_to_be_dense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write({"h.0.a.weight": torch.ones(4, 4)}, tmp_path / "m")
    assert "dense, no linear matrix has zeros" in printed(capsys, directory)
    assert json.loads(printed(capsys, directory, "--json"))["encoder"]["sparsity"] == 0


@pytest.mark.parametrize("form", [(), ("--tensors",), ("--json",), ("--plot", "p.png")])
def test_the_command_counts_from_the_other_model_to_this_one(
    state: dict[str, Tensor],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    form: tuple[str, ...],
) -> None:
    """The exit code tells whether masks differ, whatever is written."""
    monkeypatch.chdir(tmp_path)
    state[QUERY][state[QUERY] == 0] = torch.cat([torch.ones(100), torch.zeros(92)])
    after = write(state, tmp_path / "after")
    printed(capsys, model, "--against", model, *form)
    out = printed(capsys, after, "--against", model, *form, status=1)
    if "--json" in form:
        found = json.loads(out)
        assert found == compare(str(model), str(after)).values()
        assert (found["a"], found["b"]) == (str(model), str(after))
        assert (found["total"]["only_a"], found["total"]["only_b"]) == (100, 0)
    else:
        assert f"from {model} to {after}, 14 matrices:" in out
        assert "masks differ: 100 weights came back, 0 were newly pruned" in out
    assert ("--plot" in form) == (tmp_path / "p.png").exists()
    back = printed(capsys, model, "--against", after, status=1)
    assert "0 weights came back, 100 were newly pruned" in back


def test_an_error_of_a_comparison_is_not_the_code_of_different_masks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["inspect", str(model), "--against", str(tmp_path / "nowhere")]) == 2
    assert cli.run(["inspect", str(tmp_path / "nowhere"), "--against", str(model)]) == 2
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_pruned_matrix_without_a_partner_is_another_mask(
    state: dict[str, Tensor], model: Path, tmp_path: Path, is_missing: bool
) -> None:
    if is_missing:
        del state[QUERY]
    else:
        state[QUERY] = state[QUERY][:8]
    other = write(state, tmp_path / "other")
    for found in (compare(str(model), str(other)), compare(str(other), str(model))):
        assert found.unpaired == [QUERY] and not found.same_masks
        assert "0 were newly pruned, 1 pruned matrices have no partner" in found.summary


def test_another_head_is_no_other_mask(
    state: dict[str, Tensor], model: Path, tmp_path: Path
) -> None:
    """It may be missing, of another shape, or have begun as zeros."""
    del state["bert.pooler.dense.weight"]
    state["classifier.weight"] = torch.ones(5, 16)
    other = write(state, tmp_path / "other")
    assert compare(str(model), str(other)).same_masks
    state["classifier.weight"] = torch.zeros(2, 16)
    found = compare(str(write(state, tmp_path / "new")), str(model))
    assert found.same_masks and found.total.only_a == 0


def test_a_matrix_of_zeros_that_comes_back_is_counted(
    state: dict[str, Tensor], model: Path, tmp_path: Path
) -> None:
    state[QUERY] = torch.zeros(16, 16)
    found = compare(str(write(state, tmp_path / "empty")), str(model))
    assert (found.total.only_a, found.same_masks) == (64, False)


def height(path: Path) -> int:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[20:24], "big")


def test_pictures_have_room_for_every_layer(
    state: dict[str, Tensor], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        n.replace("layer.1.", f"layer.{i}."): t.clone()
        for n, t in state.items()
        for i in range(1, 12)
    }
    deep = write(more, tmp_path / "deep")
    printed(capsys, model, "--plot", tmp_path / "two.png")
    printed(capsys, deep, "--plot", tmp_path / "deep.png")
    printed(capsys, model, "--against", deep, "--plot", tmp_path / "both.png", status=1)
    assert height(tmp_path / "deep.png") > 2 * height(tmp_path / "two.png")
    assert height(tmp_path / "both.png") > 100


@pytest.mark.parametrize("plot", ["picture.jpg", "nowhere/picture.png"])
def test_a_picture_that_can_not_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plot: str
) -> None:
    assert cli.run(["inspect", "./nowhere", "--plot", str(tmp_path / plot)]) == 2
    assert "must be a .png file in a directory that exists" in capsys.readouterr().err


def test_a_model_without_layers_can_not_be_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write({"a.weight": pruned((16, 16), 0)}, tmp_path / "m")
    assert cli.run(["inspect", str(directory), "--plot", str(tmp_path / "p.png")]) == 2
    assert "no numbered layers" in capsys.readouterr().err


# weights apart from their masks


PRUNE = r"stored apart from its mask or in parts; call torch.nn.utils.prune.remove\("


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("weight_orig", "weight_mask"), PRUNE),
        (("weight", "bias_orig", "bias_mask"), PRUNE),
        (("parametrizations.weight.original",), r"parametrize.remove_parametrizations\("),
        (("weight", "mask_scores"), "scores from which masks are made"),
        (("weight", "mask"), f"{re.escape(QUERY)} has live weights where it is zero; multiply"),
        (("weight", "weight_mask"), "mask that is not applied"),
        (("weight", "sparse_pruning_mask"), "mask that is not applied"),
        (("weight", "row_mask"), "mask that is not applied"),
    ],
)
@pytest.mark.parametrize("act", ["inspect", "compare"])
def test_masks_that_are_not_applied_are_refused(
    state: dict[str, Tensor],
    model: Path,
    tmp_path: Path,
    parts: tuple[str, ...],
    message: str,
    act: str,
) -> None:
    path = QUERY.removesuffix(".weight")
    del state[QUERY]
    values = {"bias_orig": torch.ones(16), "row_mask": torch.arange(16)[:, None]}
    for part in parts:
        value = pruned((16, 16), 0) if part.endswith("mask") else torch.ones(16, 16)
        state[f"{path}.{part}"] = values.get(part, value)
    other = write({n: t for n, t in state.items()}, tmp_path / "other")
    with pytest.raises(ModelError, match=message):
        inspect(other) if act == "inspect" else compare(str(model), str(other))


def test_a_mask_that_is_applied_is_no_obstacle(
    state: dict[str, Tensor], model: Path, tmp_path: Path
) -> None:
    """NVIDIA's ASP leaves it in the file; one of attention masks no weight."""
    state["bert.encoder.attn_mask"] = torch.zeros(16, 16)
    state[f"{QUERY.removesuffix('query.weight')}causal_mask"] = torch.zeros(24, 24)
    state[QUERY.removesuffix("weight") + "__weight_mma_mask"] = state[QUERY] != 0
    other = write(state, tmp_path / "other")
    assert inspect(other)["fingerprint"] == inspect(model)["fingerprint"]
    assert compare(str(model), str(other)).same_masks


# matrices of zeros alone


def test_an_encoders_matrix_of_zeros_is_counted_and_a_new_one_is_not(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    state[QUERY] = torch.zeros(16, 16)
    new = ["classifier.weight", f"{QUERY.removesuffix('weight')}lora_B.weight"]
    for name in new:
        state[name] = torch.zeros(2, 16)
    found = inspect(write(state, tmp_path / "m"))
    assert found["tensors"][QUERY] == {"shape": [16, 16], "zeros": 256, "sparsity": 1.0}
    assert found["total"]["zeros"] == ENCODER * 3 // 4 + 64
    assert not set(new) & set(found["tensors"])


def test_a_stated_matrix_counts_whatever_its_name_is(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Such as a head of zeros that was locked by name, or an untied decoder."""
    names = ["classifier.weight", "cls.predictions.decoder.weight"]
    state[names[0]], state[names[1]] = torch.zeros(2, 16), pruned((32, 16), 3)
    directory = write(state, tmp_path / "m")
    stated = report({name: state[name] != 0 for name in names})
    (directory / "sparsity.json").write_text(json.dumps(stated))
    assert set(names) < set(inspect(directory)["tensors"])


@pytest.mark.parametrize("tensors", [None, [], {"a": None}, {"a": {"shape": 3}}])
def test_a_sparsity_json_of_another_shape_is_one_message(model: Path, tensors: Any) -> None:
    values = {"tensors": tensors, "fingerprint": "", "total": {}}
    (model / "sparsity.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="not a sparsity report"):
        inspect(model)
