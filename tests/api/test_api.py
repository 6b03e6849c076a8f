"""Every command as a function: results, models as they were trained, one-shot pruning."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_BERT, finetune_recipe, pretrain_recipe
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    PreTrainedModel,
)

import opfa
from opfa.api.progress import progress
from opfa.api.results import FinetuneResult, SweepResult
from opfa.commands import app as cli
from opfa.compression.scores import Part, Score
from opfa.downstream.results import SweepRun
from opfa.errors import ModelError, OpfaError, RecipeError, RunError
from opfa.models.sentences import Pooling, write_pooling
from opfa.storage.files import write_text


@pytest.fixture(scope="module")
def quantized(sparse: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was fine-tuned in 8 bits, by the function."""
    output = tmp_path_factory.mktemp("quantized") / "run"
    recipe = finetune_recipe(sparse, examples)
    found = opfa.finetune(recipe, output, {"quantization": {"embeddings": True}})
    assert isinstance(found, FinetuneResult) and found.model == output / "model"
    return output


# results


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    capsys.readouterr()
    assert cli.run([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_a_result_is_a_table_with_places_and_next_commands_or_the_files_json(
    quantized: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe, model = quantized / "recipe.toml", quantized / "model"
    written = json.loads((quantized / "results.json").read_text())
    again = ["finetune", recipe, "--output", quantized, "--resume"]  # finished already
    assert json.loads(run(capsys, *again, "--json")) == written
    shown = run(capsys, *again)
    assert f"accuracy  {written['metrics']['accuracy']:>16.4f}"[:8] in shown
    assert f"    model    {model}\n" in shown
    assert f"    next     opfa release {quantized} --output" in shown
    words = ["evaluate", model, "--recipe", recipe]
    values = json.loads(run(capsys, *words, "--json", "--output", tmp_path / "e.json"))
    assert values == json.loads((tmp_path / "e.json").read_text())
    assert list(values) == [
        "task", "metrics", "quantized", "model_files_sha256", "examples_sha256"
    ]  # fmt: skip
    assert "opfa inspect" in run(capsys, *words)
    assert max(map(len, shown.splitlines())) < 200


def test_results_are_frozen_and_show_themselves(quantized: Path) -> None:
    found = FinetuneResult.read(quantized)
    with pytest.raises(ValueError, match="frozen"):
        found.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert str(found).splitlines()[1].split() == ["tiny-task", "validation"]
    assert found._repr_markdown_() == found.markdown()
    among = SweepRun.model_validate({"run": "a", **found.values(), "later": 1})
    assert [*among.model_dump(exclude_unset=True)] == ["run", *found.values(), "later"]
    assert found.markdown().startswith("| tiny-task | validation |\n|---|---:|\n| accuracy |")


def test_a_damaged_results_file_is_one_message(quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"task": 3}')
    with pytest.raises(RunError, match=r"results\.json: is damaged"):
        FinetuneResult.read(tmp_path)


def test_several_seeds_in_another_thread_have_the_best_model(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    """As a server would: signals are the main thread's affair."""
    found: list[FinetuneResult | SweepResult] = []

    def work() -> None:
        recipe = finetune_recipe(sparse, examples)
        changes = {"training.epochs": 0.2}
        found.append(opfa.finetune(recipe, str(tmp_path / "out"), changes, seeds=2))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (result,) = found
    assert isinstance(result, SweepResult) and (result.model / "config.json").exists()
    assert [run.seed for run in result.rows[0].runs] == [42, 43]
    assert result.metrics == result.rows[0].mean


def test_an_output_that_exists_is_an_error_and_no_exit(
    sparse: Path, examples: Path, quantized: Path
) -> None:
    with pytest.raises(OpfaError, match="holds another run"):
        opfa.finetune(finetune_recipe(sparse, examples), quantized)


def test_a_program_without_logging_sees_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    log, root = logging.getLogger("opfa"), logging.getLogger()
    handlers, root.handlers, level = root.handlers, [], log.level
    log.setLevel(logging.NOTSET)
    try:
        with progress():
            log.info("step 1/2")
        assert capsys.readouterr().err == "step 1/2\n"
        assert not log.handlers and not log.level
        root.handlers = [logging.NullHandler()]  # it has its own
        with progress():
            log.info("step 2/2")
        assert not capsys.readouterr().err
    finally:
        root.handlers = handlers
        log.setLevel(level)


# load


def answers(model: PreTrainedModel, directory: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(["the cat sees a dog.", "my sister"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_a_model_in_8_bits_computes_as_it_was_evaluated(
    quantized: Path, examples: Path, tmp_path: Path
) -> None:
    """The accuracy by hand, with `load`, is what the run says; in fp32 the numbers differ."""
    model, directory = opfa.load(quantized), quantized / "model"  # a run will do
    assert not model.training
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [json.loads(x) for x in (examples / "validation.jsonl").read_text().splitlines()]
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).logits.argmax(-1)
    names: Any = model.config.id2label
    right = [names[int(i)] == row["label"] for i, row in zip(found, rows, strict=True)]
    assert sum(right) / len(right) == FinetuneResult.read(quantized).metrics["accuracy"]
    plain = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    exact, fp32 = answers(model, directory), answers(plain, directory)
    assert not torch.allclose(exact, fp32, atol=1e-6)
    assert torch.equal(answers(opfa.load(directory, exact=False), directory), fp32)
    opfa.release(quantized, tmp_path / "small", format="compact-int8", dtype="fp32")
    small = answers(opfa.load(tmp_path / "small"), directory)
    torch.testing.assert_close(small, exact, rtol=0, atol=1e-5)


def test_a_model_has_the_head_that_it_was_saved_with(sparse: Path, tmp_path: Path) -> None:
    assert isinstance(opfa.load(sparse.parent), BertForPreTraining)
    config = BertConfig(vocab_size=40, **{k: v for k, v in TINY_BERT.items() if k[:5] != "model"})
    for cls in (BertForMaskedLM, BertForSequenceClassification):
        cls(config).save_pretrained(tmp_path / cls.__name__)
        assert type(opfa.load(tmp_path / cls.__name__)) is cls
    bare = AutoModel.from_config(config)
    bare.save_pretrained(tmp_path / "bare")
    assert type(opfa.load(str(tmp_path / "bare"))) is type(bare)
    with pytest.raises(ModelError, match="no such directory"):
        opfa.load(tmp_path / "nowhere")


# prune


def dense() -> Any:  # Any: its layers have types that pyright does not know
    torch.manual_seed(0)
    values = {name: value for name, value in TINY_BERT.items() if name != "model_type"}
    return BertForSequenceClassification(BertConfig(vocab_size=40, **values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_in_memory_zeroes_the_smallest_of_each_matrix(dtype: torch.dtype) -> None:
    model = dense().to(dtype)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    found = opfa.prune(model, 0.9)
    assert (found.zeros, found.size) == (8 * 230 + 4 * 461, 8 * 256 + 4 * 512)
    for name, weight in model.named_parameters():
        num_zeros = round(0.9 * weight.numel()) if name in found.tensors else 0
        lost = weight != before[name]
        assert int(lost.sum()) == num_zeros and not weight[lost].any()
        if num_zeros:
            kept, gone = before[name][~lost].abs(), before[name][lost].abs()
            assert gone.max() <= kept.min()
    assert type(model.bert.encoder.layer[0].output.dense) is torch.nn.Linear
    assert opfa.lock(model)["fingerprint"] == found.fingerprint
    assert "| zeros | 3,684 |" in found.markdown()


def test_of_all_together_and_of_some_layers() -> None:
    found = opfa.prune(dense(), 0.75, scope="global", include=["attention"], exclude=["output"])
    assert found.zeros == round(0.75 * 6 * 256) and len(found.tensors) == 6
    assert len({tensor["zeros"] for tensor in found.tensors.values()}) > 1


def test_a_score_of_ones_own() -> None:
    class Largest(Score):
        def of(self, part: Part) -> torch.Tensor:
            return -part.weight.abs()

    model = dense()
    largest = model.bert.encoder.layer[0].output.dense.weight.abs().max()
    found = opfa.prune(model, 0.5, score=Largest())
    assert found.score == "Largest" and found.zeros == found.size / 2
    assert model.bert.encoder.layer[0].output.dense.weight.abs().max() < largest


def test_pruning_a_directory_writes_a_plain_model_with_its_head(
    tmp_path: Path, sparse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sparse)
    torch.manual_seed(0)
    values = {name: value for name, value in TINY_BERT.items() if name != "model_type"}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **values))
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    words = ["prune", tmp_path / "dense", "--sparsity", 0.9, "--output", tmp_path / "out"]
    values = json.loads(run(capsys, *words, "--json"))
    found = opfa.inspect(tmp_path / "out")
    assert found["stated"] == "matches" and found["fingerprint"] == values["fingerprint"]
    assert values["zeros"] == found["total"]["zeros"] == 8 * 230 + 4 * 461
    opfa.prune(model, 0.9)
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    for name, weight in model.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight), name
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)
    assert cli.run([str(word) for word in [*words[:3], 90, "--output", tmp_path / "x"]]) == 2
    assert "--sparsity 90: must be a share below 1, such as 0.9" in capsys.readouterr().err
    words[-1] = tmp_path / "again"
    shown = run(capsys, *words)
    assert f"finetune RECIPE --output RUN model.init={tmp_path}/again" in shown


@pytest.mark.parametrize(
    ("pooling", "made_by"),
    [(Pooling("first", is_normalized=False), "prune"), (Pooling(), "pretrain")],
)
def test_a_pruned_sentence_encoder_stays_one(
    pooling: Pooling, made_by: str, prepared: Path, sparse: Path, tmp_path: Path
) -> None:
    init, model = tmp_path / "encoder", tmp_path / "out"
    encoder = opfa.load(sparse).base_model
    assert isinstance(encoder, PreTrainedModel)
    encoder.save_pretrained(init)
    AutoTokenizer.from_pretrained(sparse).save_pretrained(init)
    write_pooling(pooling, init, hidden=16, tokens=20)
    if made_by == "prune":
        opfa.prune(init, 0.95, model)
    else:
        sections = {"model": {"init": str(init)}, "training": {"steps": 2, "warmup_steps": 1}}
        schedule = {"end": 0, "target": 0.95}
        recipe = pretrain_recipe(prepared, pruning={"schedule": schedule}, **sections)
        opfa.pretrain(recipe, tmp_path / "run")
        model = tmp_path / "run/model"
    texts = ["the cat sees the sea.", "a dog wants a house. " * 9]
    found = torch.tensor([each.prediction for each in opfa.predict(model, texts)])
    encoder = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    torch.testing.assert_close(found, torch.tensor(encoder.encode(texts)), atol=1e-5, rtol=0)
    assert encoder.max_seq_length == 20
    is_normalized = torch.allclose(found.norm(dim=-1), torch.ones(()))
    assert is_normalized == pooling.is_normalized
    states = opfa.load(model)(**encoder.tokenize(texts[:1])).last_hidden_state
    expected = pooling(states, torch.ones(states.shape[:2]))[0]
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"sparsity": 1.0}, RecipeError, "sparsity: Input should be less than 1"),
        ({"sparsity": 0.9, "scope": "rows"}, RecipeError, "scope: Input should be 'layer' or"),
        ({"sparsity": 0.9, "score": "size"}, RecipeError, "score"),
        ({"sparsity": 0.9, "include": ["nothing"]}, RecipeError, "matches no linear layer"),
        ({"sparsity": 0.9, "output": "x"}, RunError, "is for a model on disk"),
    ],
)
def test_settings_that_can_not_be_are_refused(
    settings: dict[str, Any], kind: type[OpfaError], message: str
) -> None:
    model = dense()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(kind, match=message):
        opfa.prune(model, **settings)
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())


def test_models_that_can_not_be_pruned_stay_as_they_are(quantized: Path, tmp_path: Path) -> None:
    model = dense()
    opfa.prune(model, 0.9)
    with pytest.raises(ModelError, match="has 230 zeros of 256 already, more than sparsity = 0.5"):
        opfa.prune(model, 0.5)
    opfa.lock(model)
    with pytest.raises(ModelError, match=r"locked; prune it after opfa\.fuse"):
        opfa.prune(model, 0.95)
    broken = dense()
    broken.bert.encoder.layer[0].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="holds a non-finite weight"):
        opfa.prune(broken, 0.5)
    assert type(broken.bert.encoder.layer[1].output.dense) is torch.nn.Linear
    with pytest.raises(RunError, match="give the new directory `output`"):
        opfa.prune(quantized, 0.95)  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ModelError, match="is in 8 bits; prune the model that it was made of"):
        opfa.prune(quantized, 0.95, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_score_of_gradients_has_none_in_one_shot() -> None:
    class Needy(Score):
        def observes(self, step: int) -> bool:
            return True

    with pytest.raises(ModelError, match="this score needs gradients"):
        opfa.prune(dense(), 0.5, score=Needy())


def test_the_plan_is_a_typed_result(tmp_path: Path) -> None:
    from conftest import pretrain_recipe

    write_text(tmp_path / "r.toml", pretrain_recipe(tmp_path).to_toml())
    found = opfa.plan(tmp_path / "r.toml", gpus=1, memory_gb=8, bandwidth_gbps=100)
    assert found.gpus == 1 and found.recommended
