"""Exported files against torch, for every head and family; what is written, and what is refused."""

import copy
import importlib
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from conftest import finetune_recipe, sentences
from onnx import numpy_helper
from onnxruntime import (
    GraphOptimizationLevel,  # pyright: ignore[reportAttributeAccessIssue] - made at run time
    InferenceSession,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from opfa.commands import app as cli
from opfa.compression import quant
from opfa.compression.pattern import Pattern
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import ModelError, RunError
from opfa.inference import export, onnx_graph, parity
from opfa.inference.onnx_graph import nonzeros
from opfa.inference.parity import OnnxModel, session_options
from opfa.inference.results import Parity
from opfa.models.encoders import HEADS, load_finetuned_model
from opfa.sparsity import masks
from opfa.sparsity.layers import lock, mask_layers
from opfa.tasks.kinds import load_validation
from opfa.tasks.recipe import Task
from opfa.weights.inspection import inspect

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 140,
    "initializer_range": 0.3,  # logits of about 1
    "pad_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {},
    "roberta": {},
    "modernbert": {  # two kinds of layers
        "num_hidden_layers": 2,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
    },
}


def tiny(family: str, head: str) -> PreTrainedModel:
    """A random model, half of whose encoder weights are zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = HEADS[head].from_config(config)
    for layer in Pattern().layers(model).values():
        layer.weight.data[torch.rand(layer.weight.shape) < 0.5] = 0
    return model


def inputs_of(family: str, head: str, batch: int, tokens: int) -> dict[str, Tensor]:
    """Random tokens; every second row is half padding."""
    random = torch.Generator().manual_seed(batch)
    shape = (batch, 3, tokens) if head == "MultipleChoice" else (batch, tokens)
    mask = torch.ones(shape, dtype=torch.long)
    mask[1::2, ..., tokens // 2 + 1 :] = 0
    ids = torch.randint(5, 50, shape, generator=random)
    inputs = {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}
    if family == "bert":
        inputs["token_type_ids"] = torch.randint(0, 2, shape, generator=random)
    return inputs


def worst(model: nn.Module, path: Path, family: str, head: str, *, is_fused: bool = True) -> float:
    """The largest difference of a logit over batches of many shapes."""
    exported, found = OnnxModel(path), []
    if not is_fused:  # node by node, as the standard says
        options = session_options()
        options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
        exported.session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch, tokens in ((1, 5), (7, 128), (7, 5), (1, 128), (2, 1)):
        inputs = inputs_of(family, head, batch, tokens)
        with torch.no_grad():
            expected = model(**inputs)
        actual = exported(**inputs)
        found += [(actual[name] - expected[name]).abs().max() for name in actual]
    return float(max(found))


# To trace one takes torch 4 s. Families differ in their bodies and in how they pool one vector.
PAIRS = [
    *(("SequenceClassification", family) for family in FAMILIES),
    ("QuestionAnswering", "bert"),
    ("TokenClassification", "distilbert"),
    ("MultipleChoice", "roberta"),
    ("MultipleChoice", "modernbert"),
]
EVERY_PAIR = [*itertools.product(HEADS, FAMILIES)]


@pytest.mark.parametrize(
    ("head", "family"), EVERY_PAIR if "OPFA_EVERY_PAIR" in os.environ else PAIRS
)
def test_every_head_and_family_answers_as_torch_does_at_any_shape(
    tmp_path: Path, head: str, family: str
) -> None:
    tiny(family, head).save_pretrained(tmp_path / "model")
    model = load_finetuned_model(str(tmp_path / "model"))
    names = list(inputs_of(family, head, 1, 5))
    graph = onnx_graph.trace(model, names)
    onnx_graph.write(graph, tmp_path / "fp32.onnx")
    assert worst(model, tmp_path / "fp32.onnx", family, head) < 1e-5
    initializers = {x.name: tuple(x.dims) for x in graph.graph.initializer}
    matrices = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 2}
    assert matrices.items() <= initializers.items()
    lock(model)
    layers = quant.prepare(model, 0.5, embeddings=True)
    for layer in layers.values():
        layer.train()
    model(**inputs_of(family, head, 7, 128))
    quant.start(model.eval())
    onnx_graph.quantize(graph, model)
    onnx_graph.write(graph, tmp_path / "int8.onnx")
    for is_fused in (True, False):  # a step more or less
        assert worst(model, tmp_path / "int8.onnx", family, head, is_fused=is_fused) < 0.05
    kinds = {x.name: x.data_type for x in graph.graph.initializer}
    eight = {*layers, *quant.quant_embeddings(model)}
    assert {kinds[f"{name}.weight"] for name in eight} == {onnx.TensorProto.INT8}


def test_a_quantized_layer_behind_a_pooler_is_exported_too(tmp_path: Path) -> None:
    head = "SequenceClassification"  # two axes there: Gemm, not MatMul
    tiny("bert", head).save_pretrained(tmp_path / "model")
    plain = load_finetuned_model(str(tmp_path / "model"))
    traced = onnx_graph.trace(plain, list(inputs_of("bert", head, 1, 5)))
    for scheme in get_args(quant.Scheme):
        model, graph = copy.deepcopy(plain), copy.deepcopy(traced)
        mask_layers(model, ["bert.pooler.dense", "classifier"])
        for layer in quant.prepare(model, 0.5, weights=scheme).values():
            layer.train()
        model(**inputs_of("bert", head, 7, 9))
        quant.start(model.eval())
        onnx_graph.quantize(graph, model)
        onnx_graph.write(graph, tmp_path / f"{scheme}.onnx")
        assert worst(model, tmp_path / f"{scheme}.onnx", "bert", head) < 0.05


# whole commands, on a model that was fine-tuned


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 examples of two sentences each: is the first one about an animal or about a person?"""
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    lines = list(sentences())
    with path.open("w") as file:
        for i in range(600):
            first, second = lines[i * 11 % len(lines)], lines[i * 13 % len(lines)]
            label = "animal" if first.startswith(("the cat", "a dog", "a bird")) else "person"
            file.write(json.dumps({"text": f"{first} {second}", "label": label}) + "\n")
    return path


@pytest.fixture(scope="module")
def run(sparse: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished 8-bit run that learned its task."""
    output = tmp_path_factory.mktemp("run") / "run"
    task = {"train": str(many), "validation": str(many)}
    training = {"epochs": 6.0, "learning_rate": 1e-2}
    recipe = finetune_recipe(sparse, sparse, task=task, quantization={}, training=training)
    finetune(recipe, output)
    return output


@pytest.fixture(scope="module", params=["int8", "fp32"])
def exported(
    request: pytest.FixtureRequest, run: Path, many: Path, tmp_path_factory: Any
) -> tuple[Path, dict[str, Any]]:
    """An exported file, compared on 600 examples, and the report. 8 bits are the default here."""
    directory = tmp_path_factory.mktemp(request.param)
    arguments = ["--verify", str(many), "--recipe", str(run / "recipe.toml")]
    arguments += ["--report", str(directory / "report.json")]
    arguments += ["--fp32"] * (request.param == "fp32")
    output = directory / "new" / "model.onnx"
    assert cli.run(["export", str(run / "model"), "--output", str(output), *arguments]) == 0
    report = json.loads((directory / "report.json").read_text())
    assert report["precision"] == request.param
    return output, report


def task_of(run: Path, data: Path) -> Task:
    task = FinetuneRecipe.read(run / "recipe.toml").task
    return task.model_copy(update={"validation": str(data)})


def test_the_report_says_that_both_agree(run: Path, exported: tuple[Path, dict[str, Any]]) -> None:
    path, report = exported
    found = report["parity"]
    assert found["examples"] == 600
    assert found["equal_predictions"] >= 0.99 and found["metrics"]["torch"]["accuracy"] > 0.9
    assert found["max_difference"] < (1e-4 if report["precision"] == "fp32" else 0.5)
    assert report["problems"] == []
    assert report["bytes"]["onnx"] == path.stat().st_size
    assert report["bytes"]["model"] == (run / "model/model.safetensors").stat().st_size


def test_the_zeros_of_the_initializers_are_those_of_sparsity_json(
    run: Path, exported: tuple[Path, dict[str, Any]]
) -> None:
    stated = json.loads((run / "model/sparsity.json").read_text())
    initializers = {
        x.name: torch.from_numpy(numpy_helper.to_array(x) != 0)
        for x in onnx.load(exported[0]).graph.initializer
        if x.name in stated["tensors"]
    }
    path, report = exported
    counted = masks.report(initializers)["total"]["zeros"]
    zeros = {"model": stated["total"]["zeros"], "onnx": counted}
    assert report["zeros"] == zeros | {"rounded": counted - zeros["model"]}
    assert set(report["fingerprint"].values()) == {stated["fingerprint"]}
    if report["precision"] == "fp32":  # in 8 bits some live weights are rounded to zero
        assert masks.fingerprint(initializers) == stated["fingerprint"]
    weights = load_file(run / "model/model.safetensors")
    for name, live in initializers.items():
        assert not live[weights[name] == 0].any()


def test_inspecting_the_file_finds_the_zeros_that_the_report_tells(
    run: Path, exported: tuple[Path, dict[str, Any]]
) -> None:
    path, report = exported
    found, stated = inspect(path), inspect(run)
    assert found["total"]["zeros"] == report["zeros"]["onnx"]
    assert found["tensors"].keys() == stated["tensors"].keys()
    assert report["precision"] == "int8" or found["fingerprint"] == stated["fingerprint"]


def test_the_file_lies_beside_what_is_needed_to_use_it(
    run: Path, exported: tuple[Path, dict[str, Any]]
) -> None:
    path, _ = exported
    names = {other.name for other in path.parent.iterdir()}
    beside = {"config.json", "tokenizer.json", "tokenizer_config.json", "recipe.toml"}
    assert names == {"model.onnx", *beside}
    inputs = AutoTokenizer.from_pretrained(path.parent)("the cat sees a dog.", return_tensors="pt")
    assert OnnxModel(path)(**inputs)["logits"].shape == (1, 2)
    assert AutoConfig.from_pretrained(path.parent).id2label == {0: "animal", 1: "person"}
    assert str(Path(torch.__file__).parent.parent).encode() not in path.read_bytes()


def altered(path: Path, name: str, change: Any, output: Path) -> Path:
    """A copy of a file with one initializer changed."""
    proto = onnx.load(path)
    (initializer,) = [x for x in proto.graph.initializer if x.name == name]
    values = change(numpy_helper.to_array(initializer))
    initializer.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(proto, output)
    return output


def one_live(values: np.ndarray) -> np.ndarray:
    """The same with its first zero made a one."""
    values = values.copy()
    values.flat[values.flatten().tolist().index(0)] = 1
    return values


MATRIX = "bert.encoder.layer.1.output.dense.weight"


def loaded(run: Path, precision: str) -> PreTrainedModel:
    """What an exported file must agree with."""
    model = load_finetuned_model(str(run / "model"))
    if precision == "int8":
        quant.load(model, run / "model" / quant.FILE)
    return model


def test_an_altered_zero_turns_the_report_red(
    run: Path, exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = altered(exported[0], MATRIX, one_live, tmp_path / "a.onnx")
    model = loaded(run, exported[1]["precision"])
    found, wrong = export._zeros(inspect(run / "model"), model, path)
    assert found["zeros"].onnx == exported[1]["zeros"]["onnx"] - 1
    assert found["fingerprint"].onnx != found["fingerprint"].model
    assert len(wrong) == 1


def test_an_altered_classifier_turns_the_report_red(
    run: Path, many: Path, exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = altered(exported[0], "classifier.weight", np.negative, tmp_path / "a.onnx")
    precision, task = exported[1]["precision"], task_of(run, many)
    model = loaded(run, precision)
    split = load_validation(task, AutoTokenizer.from_pretrained(run / "model"), model.config)
    is_int8 = precision == "int8"
    found = parity.parity(model, path, task, split, is_int8=is_int8)
    wrong = parity.problems(found, task, is_int8=is_int8)
    expected = {
        "fp32": ["logits differ by up to"],
        "int8": ["of the predictions are equal", "accuracy is"],
    }
    assert len(wrong) == len(expected[precision])
    assert all(text in problem for text, problem in zip(expected[precision], wrong, strict=True))


def test_a_file_that_answers_otherwise_is_not_written(
    run: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "MOST_DIFFERENCE", -1.0)
    with pytest.raises(ModelError, match="not written, it is not the model: logits differ by"):
        export.export(
            str(run / "model"),
            tmp_path / "a.onnx",
            is_int8=False,
            task=task_of(run, many),
            report=tmp_path / "report.json",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert len(json.loads((tmp_path / "report.json").read_text())["problems"]) == 1


def test_live_weights_that_8_bits_round_to_zero_are_found() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[127.0, 0.4, 0.0, -0.6]])
    lock(model)
    quant.prepare(model, 0.5)
    assert onnx_graph.rounded_to_zero(model)["0.weight"].tolist() == [[False, True, False, False]]


def test_a_tampered_model_is_not_exported(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors[MATRIX].view(-1)[(tensors[MATRIX].view(-1) == 0).nonzero()[0]] = 1.0
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its zeros are not what its sparsity.json says"):
        export.export(str(tmp_path / "model"), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_onnx_runtime_computes_with_integers(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # such a file is for this machine only: known
    InferenceSession(exported[0], options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    expected = 12 if exported[1]["precision"] == "int8" else 0
    assert kinds.count("MatMulIntegerToFloat") == expected


def test_a_file_of_8_bits_is_a_quarter_of_its_matrices(tmp_path: Path, examples: Path) -> None:
    model = tiny("bert", "SequenceClassification")
    config = AutoConfig.for_model(
        "bert", **{**SIZES, "hidden_size": 256, "intermediate_size": 1024}
    )
    model = HEADS["SequenceClassification"].from_config(config).eval()
    model.config.architectures = ["BertForSequenceClassification"]
    graph = onnx_graph.trace(model, ["input_ids", "attention_mask"])
    onnx_graph.write(graph, tmp_path / "fp32.onnx")
    mask_layers(model, Pattern().layers(model))
    quant.prepare(model, 0.5, embeddings=True)
    onnx_graph.quantize(graph, model)
    onnx_graph.write(graph, tmp_path / "int8.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("int8", "fp32")]
    assert sizes[0] / sizes[1] < 0.33  # the pooler stays fp32


def test_weights_that_one_file_can_not_hold_go_into_a_second(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "EXTERNAL_FROM", 1000)
    onnx_graph.write(onnx.load(exported[0]), tmp_path / "a.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "a.onnx.data"}
    ids = torch.tensor([[2, 9, 3]])
    inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    logits = [OnnxModel(path)(**inputs)["logits"] for path in (exported[0], tmp_path / "a.onnx")]
    assert torch.equal(*logits)


def external(directory: Path, place: str = "data") -> Path:
    """An ONNX file with its one matrix in another file, said to be at this place."""
    values = numpy_helper.from_array(np.eye(8, dtype=np.float32), "layer.0.query.weight")
    graph = onnx.helper.make_graph([], "graph", [], [], [values])
    file = directory / "model.onnx"
    model = onnx.helper.make_model(graph)
    onnx.save(model, file, save_as_external_data=True, location="data", size_threshold=0)
    proto = onnx.load(file, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = place if entry.key == "location" else entry.value
    file.write_bytes(proto.SerializeToString())
    return file


def test_weights_in_another_file_are_read_and_their_bytes_counted(tmp_path: Path) -> None:
    found = inspect(external(tmp_path))
    assert found["total"]["zeros"] == 56
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir()) > 256


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        ("../data", None, "'../data' is no file beside it"),
        ("/etc/passwd", None, "'/etc/passwd' is no file beside it"),
        ("", None, "'' is no file beside it"),
        ("moved", None, "model.onnx: moved is missing; the weights are not complete"),
        ("data", b"version https://git-lfs.github.com/spec/v1\n", "data: is a git-lfs pointer"),
        ("data", b"", "data: is empty"),
        ("data", bytes(200), r"can't be read: External data length \(256\) exceeds"),
    ],
)
def test_weights_that_are_not_in_the_other_file_are_one_message(
    tmp_path: Path, place: str, content: bytes | None, message: str
) -> None:
    file = external(tmp_path, place)
    if content is not None:
        (tmp_path / "data").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        inspect(file)


def test_a_class_that_torch_can_not_export_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:  # as of XLNet, for which that takes seconds
        raise torch.onnx.errors.OnnxExporterError("Failed to decompose the graph.\n\nTraceback")

    monkeypatch.setattr(torch.onnx, "export", fail)
    model = tiny("bert", "SequenceClassification")
    model.config.architectures = [type(model).__name__]
    with pytest.raises(ModelError, match=r"BertForSequence.*: torch can't export .* the graph.$"):
        onnx_graph.trace(model, ["input_ids"])


# other tasks


def test_answers_are_compared_as_texts_and_numbers_by_their_logits(
    sparse: Path, tmp_path: Path
) -> None:
    row = {
        "question": "who sees the sea?",
        "context": "the captain sees the sea. a dog hears a song. the cat wants a house.",
        "answers": {"text": ["the captain"], "answer_start": [0]},
        "number": 1.5,
    }
    rows = [row, row | {"number": 2.5, "context": "the captain sees the sea."}]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows * 4))
    columns = {"text": "question", "text_pair": "context", "sequence_tokens": 30}
    answering = {"kind": "question-answering", "label": "answers", "metrics": ["exact_match"]}
    numbers = {"kind": "regression", "label": "number", "metrics": ["pearson"]}
    for kind in (answering | {"stride_tokens": 4}, numbers):
        options: dict[str, Any] = {"training": {"epochs": 2.0}}
        options |= {"quantization": {}} if kind is not numbers else {}
        recipe = finetune_recipe(sparse, tmp_path, task=columns | kind, **options)
        output = tmp_path / str(kind["kind"])
        finetune(recipe, output)
        path = output / "onnx" / "a.onnx"
        result = export.export(str(output / "model"), path, task=recipe.task)
        assert result.precision == ("fp32" if kind is numbers else "int8")
        equal = result.parity and result.parity.equal_predictions
        assert equal == (None if kind is numbers else 1.0)


def found(
    ours: float,
    theirs: float,
    equal: float = 1.0,
    *,
    again: float | None = None,
    repeated: float = 1,
) -> Parity:
    again = ours if again is None else again
    metrics = {"torch": {"a": ours}, "onnx": {"a": theirs}, "torch, disturbed": {"a": again}}
    shares = {"equal_predictions": equal, "repeated_predictions": repeated}
    return Parity(max_difference=0.5, examples=2500, **shares, metrics=metrics)


@pytest.mark.parametrize(
    ("kind", "report", "num_problems"),
    [
        ("classification", found(0.9, 0.9029), 0),
        ("classification", found(0.9, 0.9031), 1),
        ("classification", found(0.9, 0.9, 0.9901), 0),
        ("classification", found(0.9, 0.5, 0.9899), 2),
        ("classification", found(0.9, float("nan")), 1),
        ("question-answering", found(90.0, 90.29), 0),
        ("question-answering", found(90.0, 90.31), 1),
        # where torch does not repeat its own answers, as much and a little more is allowed
        ("question-answering", found(90.0, 90.0, 0.9401, repeated=0.95), 0),
        ("question-answering", found(90.0, 90.0, 0.9399, repeated=0.95), 1),
        ("question-answering", found(90.0, 90.0, 0.9899, repeated=1.0), 1),
        ("question-answering", found(90.0, 89.51, again=90.2), 0),
        ("question-answering", found(90.0, 89.49, again=90.2), 1),
        # and what one of 20 answers may win or lose by chance: 0.45 points
        ("question-answering", found(90.0, 90.74, 0.95, repeated=0.95), 0),
        ("question-answering", found(90.0, 89.24, 0.95, repeated=0.95), 1),
        ("classification", found(0.9, 0.9074, 0.95, repeated=0.95), 0),
        ("classification", found(0.9, 0.9076, 0.95, repeated=0.95), 1),
    ],
)
def test_tolerances_in_8_bits(kind: Any, report: Parity, num_problems: int) -> None:
    task = Task.model_construct(kind=kind)
    assert len(parity.problems(report, task, is_int8=True)) == num_problems


def test_disturbing_changes_the_last_digits_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8))
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    before = model(inputs)
    with parity._disturbed(model):
        during = model(inputs)
    assert not torch.equal(before, during)
    torch.testing.assert_close(before, during, rtol=0, atol=5e-6)
    assert torch.equal(before, model(inputs))


def test_windows_without_a_token_do_not_differ() -> None:
    ours, theirs = torch.tensor([1.0, -torch.inf]), torch.tensor([1.5, -torch.inf])
    assert parity._difference(ours, theirs) == 0.5
    assert math.isnan(parity._difference(ours, torch.tensor([torch.nan, -torch.inf])))


@pytest.mark.parametrize(("difference", "is_fine"), [(9e-5, 1), (2e-4, 0), (float("nan"), 0)])
def test_tolerance_in_fp32(difference: float, is_fine: bool) -> None:
    report = Parity(examples=1, max_difference=difference, equal_predictions=None, metrics={})
    assert (parity.problems(report, Task(), is_int8=False) == []) == bool(is_fine)


# refusals


def test_a_file_that_exists_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("important")
    with pytest.raises(RunError, match=r"a\.onnx: exists already"):
        export.export(str(run / "model"), tmp_path / "a.onnx")


def test_8_bits_of_a_model_that_has_none_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "plain", ignore=lambda *_: [quant.FILE])
    with pytest.raises(ModelError, match=r"fine-tune it with \[quantization\], or use `opfa cali"):
        export.export(str(tmp_path / "plain"), tmp_path / "a.onnx", is_int8=True)


def test_a_model_without_a_head_is_refused(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a model for BertForPreTraining has no head of a task"):
        export.export(str(sparse), tmp_path / "a.onnx")


def test_a_model_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    model = tiny("bert", "SequenceClassification")
    state = {n: t for n, t in model.state_dict().items() if n != "classifier.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match="classifier.weight is missing"):
        load_finetuned_model(str(tmp_path))


def test_the_files_of_another_model_are_not_mixed_with(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"config\.json: is there and is different; give a dir"):
        export.export(str(run / "model"), tmp_path / "a.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_data_need_a_recipe_and_a_recipe_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"--verify": "--recipe: is needed, since", "--recipe": "--recipe is for --verify"}
    for option, message in said.items():
        arguments = ["export", "model", "--output", str(tmp_path / "a.onnx"), option, "sst2"]
        assert cli.run(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "package"),
    [("onnx_graph", "onnx"), ("onnx_graph", "onnxscript"), ("parity", "onnxruntime")],
)
def test_a_missing_package_is_one_message(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"opfa.inference.{module}")
    with pytest.raises(RunError, match=rf'needs {package}: pip install "opfa\[export\]"'):
        importlib.import_module(f"opfa.inference.{module}")


def test_nonzeros_of_a_name_that_is_not_there_is_left_out(
    exported: tuple[Path, dict[str, Any]],
) -> None:
    assert list(nonzeros(exported[0], [MATRIX, "nowhere"])) == [MATRIX]
