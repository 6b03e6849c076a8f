"""One-shot pruning that looks at text: what is fitted, on which inputs, and how far states move."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONFIGS, model_of
from torch import Tensor, nn
from transformers import AutoModel, BartConfig, BartModel, PreTrainedModel, PreTrainedTokenizerBase
from words import WORDS

import opfa
from opfa.api.results import PruneResult
from opfa.commands import app as cli
from opfa.compression.layerwise import RIDGE, Admm
from opfa.compression.measured import Curvature, Fisher
from opfa.errors import DataError, ModelError, OpfaError, RecipeError, RunError
from opfa.inference.sequences import read_sequences
from opfa.inference.texts import Texts
from opfa.models import reconstruct
from opfa.models.configs import wordpiece_tokenizer
from opfa.models.encoders import write_model
from opfa.models.stepping import inputs_of
from opfa.sparsity.masks import fingerprint

NUM = 20
FEW = Admm(iterations=4, ramp=3)
SPARSE = {"sparsity": 0.6, "sequences": NUM}


def tokenizer_of(tokens: int = 40) -> PreTrainedTokenizerBase:
    return wordpiece_tokenizer({w: i for i, w in enumerate(WORDS)}, lowercase=True, tokens=tokens)


def words(index: int, length: int) -> str:
    """A text of so many words."""
    seed = torch.Generator().manual_seed(index)
    return " ".join(WORDS[i] for i in torch.randint(5, len(WORDS), (length,), generator=seed))


TEXTS = [words(index, 5 + index) for index in range(NUM)]  # one sequence each
HELD = TEXTS[-2:]


def pruned(
    family: str = "bert", *, is_training: bool = False, **options: Any
) -> tuple[PreTrainedModel, PruneResult]:
    model = model_of(family).train(is_training)
    values = {**SPARSE, "texts": TEXTS, "tokenizer": tokenizer_of(), **options}
    return model, opfa.prune(model, values.pop("sparsity"), **values)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def fed(model: PreTrainedModel, name: str, texts: list[str]) -> np.ndarray:
    """What comes into a linear layer for these texts, one by one: [tokens, in]."""
    with torch.no_grad(), inputs_of(model.get_submodule(name)) as found:
        for text in texts:
            model(**tokenizer_of()(text, return_tensors="pt"))
    return torch.cat([each.flatten(0, -2) for each in found]).double().numpy()


LAYER = "bert.encoder.layer"


@pytest.mark.parametrize("score", ["curvature", FEW, Fisher(block=4, sequences=18)], ids=str)
@pytest.mark.parametrize("name", [f"{LAYER}.0.attention.self.key", f"{LAYER}.1.output.dense"])
def test_a_matrix_is_fitted_on_what_the_pruned_model_feeds_it(score: str, name: str) -> None:
    dense = model_of("bert")
    model, _ = pruned(score=score, reconstruct=True)
    theirs, x = (fed(each, name, TEXTS[:-2]) for each in (dense, model))
    assert np.abs(x - theirs).max() > 3e-3 or ".0." in name
    keys = f"{name}.weight", f"{name}.bias"
    weight, bias = (dense.get_parameter(key).detach().double().numpy() for key in keys)
    new_weight, new_bias = (model.get_parameter(key).detach().numpy() for key in keys)
    y = theirs @ weight.T + bias
    means = x.mean(0), y.mean(0)
    ridge = RIDGE * ((x - means[0]) ** 2).mean()
    for row in range(4):
        kept = new_weight[row] != 0
        more = np.sqrt(ridge * len(x)) * np.eye(len(kept))[kept]
        left = np.concatenate([(x - means[0])[:, kept], more[:, kept]])
        right = np.concatenate([(y - means[1])[:, row], more @ weight[row]])
        expected = np.linalg.lstsq(left, right, rcond=None)[0]
        np.testing.assert_allclose(new_weight[row][kept], expected, rtol=2e-3, atol=2e-3)
        constant = means[1][row] - expected @ means[0][kept]
        np.testing.assert_allclose(new_bias[row], constant, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", CONFIGS)
def test_zeros_are_exact_and_hidden_states_come_nearer(family: str) -> None:
    results = {}
    for score, is_fitted in (("magnitude", False), ("magnitude", True), (FEW, False)):
        model, found = pruned(family, score=score, reconstruct=is_fitted)
        results[found.score, is_fitted] = found
        state = model.state_dict()
        for name, each in found.tensors.items():
            size = state[name].numel()
            zeros = int((state[name] == 0).sum())
            assert zeros == each["zeros"] == round(0.6 * size)
            assert not bool(state[name][state[name] == 0].signbit().any())
        masks = {name: state[name] != 0 for name in found.tensors}
        assert fingerprint(masks) == found.fingerprint
        assert not model.training
    plain, fitted, admm = results.values()
    assert (plain.is_reconstructed, fitted.is_reconstructed, admm.is_reconstructed) == (
        *(False, True, True),
    )
    assert fitted.fingerprint == plain.fingerprint != admm.fingerprint
    assert fitted.mean_distance < plain.mean_distance > admm.mean_distance  # pyright: ignore


def test_distances_are_mean_squares_on_texts_that_nothing_was_fitted_to() -> None:
    dense = model_of("bert")
    model, found = pruned(reconstruct=True)
    tokens, sums, num = tokenizer_of(), [0.0, 0.0], 0
    for text in HELD:
        given = {**tokens(text, return_tensors="pt"), "output_hidden_states": True}
        with torch.no_grad():
            pair = [each.base_model(**given).hidden_states for each in (model, dense)]
        moved = [float((a - b).square().mean()) for a, b in zip(*pair, strict=True)]
        size = pair[0][0].shape[1]
        sums = [sums[0] + size * moved[-1], sums[1] + size * sum(moved) / len(moved)]
        num += size
    assert found.held_out == len(HELD)
    expected = pytest.approx([each / num for each in sums], rel=1e-4)
    assert [found.final_distance, found.mean_distance] == expected
    assert "distance from the dense model's, on 2 sequences held out" in str(found)
    other, again = pruned(reconstruct=True, texts=[*TEXTS[:-2], words(98, 9), words(99, 9)])
    assert again.mean_distance != found.mean_distance
    assert all(torch.equal(value, model.state_dict()[n]) for n, value in values_of(other).items())


@pytest.mark.parametrize(
    "score", [Curvature(sequences=8), Admm(iterations=2, ramp=1), "activation"]
)
def test_scores_with_their_settings_and_the_same_bits_each_time(score: Any) -> None:
    (one, found), (two, again) = (pruned(score=score, is_training=each) for each in (False, True))
    assert two.training and not one.training  # dropout or not
    assert found.fingerprint == again.fingerprint and found.score == getattr(score, "kind", score)
    state = two.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in values_of(one).items())
    name = "admm" if isinstance(score, Admm) else "curvature"
    assert pruned(score=name, reconstruct=True)[1].fingerprint != found.fingerprint


def test_scope_grain_and_layers_are_as_without_text() -> None:
    options: dict[str, Any] = {"scope": "global", "exclude": [r"layer\.2\."], "reconstruct": True}
    model, found = pruned(**options)
    assert found.zeros == round(0.6 * found.size) and len(found.tensors) == 12
    shares = {each["sparsity"] for each in found.tensors.values()}
    assert len(shares) > 1
    assert not bool((model.get_parameter(f"{LAYER}.2.output.dense.weight") == 0).any())
    _, heads = pruned(grain="heads", reconstruct=True)
    assert heads.left == {"heads": (3, 12)} or heads.left["heads"][0] < 12


def test_long_texts_are_cut_to_sequences_and_a_part_is_drawn() -> None:
    model, tokens = model_of("bert"), tokenizer_of()
    texts = Texts(in_memory=("", *(words(index, 100) for index in range(30))))
    found = read_sequences(texts, tokens, model, 20)
    assert (len(found.fitted), len(found.held)) == (18, 2)
    ids = [tokens(text, add_special_tokens=False)["input_ids"] for text in texts.in_memory]
    pieces = [each[start : start + 38] for each in ids[:21] for start in range(0, 100, 38)]
    places = [pieces.index(list(each)[1:-1]) for each in [*found.fitted, *found.held]]
    assert places == sorted(places) and len({*places}) == 20  # in the order of the texts
    assert {place % 3 for place in places} == {0, 1, 2}  # not only how texts begin
    (batch,) = found.batches(found.fitted, 18)
    assert batch["input_ids"].shape == (18, 40)
    assert batch["attention_mask"].sum(1).tolist() == [len(each) for each in found.fitted]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder") / "model"
    directory.mkdir()
    write_model(model_of("bert", AutoModel), tokenizer_of(), directory)
    return directory


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "texts.jsonl"
    path.write_text("".join(json.dumps({"review": text}) + "\n" for text in TEXTS))
    return path


def test_the_command_and_the_function_write_the_same_bytes(
    encoder: Path, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = opfa.prune(
        encoder, 0.6, tmp_path / "one", score="admm", texts=lines, columns="review", sequences=NUM
    )
    options = ["--sparsity", "0.6", "--score", "admm", "--text", str(lines), "--column", "review"]
    options += ["--sequences", str(NUM), "--json", "--output", str(tmp_path / "two")]
    assert cli.run(["prune", str(encoder), *options]) == 0
    two = json.loads(capsys.readouterr().out)
    assert two["fingerprint"] == one.fingerprint and two["is_reconstructed"]
    assert two["final_distance"] == one.final_distance and two["held_out"] == 2
    for name in ("model.safetensors", "tokenizer.json", "sparsity.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.usefixtures("nothing_stays_registered")
def test_an_uneven_model_is_fitted_too(encoder: Path, lines: Path, tmp_path: Path) -> None:
    opfa.prune(encoder, 0.5, tmp_path / "heads", grain="heads", scope="global")
    opfa.shrink(tmp_path / "heads", tmp_path / "uneven", form="uneven")
    found = opfa.prune(
        tmp_path / "uneven", 0.6, tmp_path / "out", reconstruct=True, texts=lines,
        columns="review", sequences=NUM,
    )  # fmt: skip
    assert found.zeros == sum(round(0.6 * np.prod(t["shape"])) for t in found.tensors.values())


MISTAKES: list[tuple[dict[str, Any], type[OpfaError], str]] = [
    ({"texts": [], "reconstruct": True}, RunError, r"^reconstruct: needs texts, as files \(--te"),
    ({"texts": [], "score": "curvature"}, RunError, "^score = 'curvature': needs texts"),
    ({"texts": [], "score": "admm"}, RunError, "^reconstruct: needs texts"),
    ({"tokenizer": None}, RunError, r"^texts: a model in memory needs its tokenizer=\.\.\. too"),
    ({"texts": "a text"}, RunError, "could be a text or a file"),
    ({"sequences": 21}, DataError, "^sequences = 21: the texts give only 20, each of up to 40 tok"),
    ({"sequences": 1}, RunError, "^sequences = 1: must be 2 or more, as a tenth is held out"),
    ({"texts": [""]}, DataError, "^sequences = 20: the texts give only 0"),
    (
        {"score": Curvature(sequences=19)},
        DataError,
        "^score.sequences: the score measures 19 sequences, and 18 are there",
    ),
    ({"score": "admm", "scope": "global"}, RecipeError, r'"admm" counts by matrix'),
    ({"score": "admm", "grain": "heads"}, RecipeError, '"admm" finds single weights'),
    ({"score": "saliency"}, RecipeError, "score"),
    (
        {"reconstruct": True, "include": ["pooler|layer"]},
        ModelError,
        "^bert.pooler.dense.weight: is in no numbered layer of the encoder",
    ),
    (
        {"score": "activation", "include": ["classifier"]},
        ModelError,
        "^classifier.weight: is in no numbered layer of the encoder, so texts say nothing of it",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), MISTAKES)
def test_a_mistake_is_named_and_the_model_stays(
    options: dict[str, Any], error: type[OpfaError], message: str
) -> None:
    model = model_of("bert").train()
    before = values_of(model)
    values = {**SPARSE, "texts": TEXTS, "tokenizer": tokenizer_of(), **options}
    with pytest.raises(error, match=message):
        opfa.prune(model, values.pop("sparsity"), **values)
    assert model.training and type(model.get_submodule(f"{LAYER}.0.output.dense")) is nn.Linear
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


def test_what_is_not_finite_is_named_and_the_model_stays() -> None:
    for name, message in (
        (f"{LAYER}.1.output.dense.weight", "1.output.dense.weight: holds a non-finite"),
        (f"{LAYER}.0.output.LayerNorm.weight", "layer.1.attention.self.query.weight: its inputs"),
    ):
        model = model_of("bert")
        model.get_parameter(name).data.view(-1)[0] = float("nan")
        before = values_of(model)
        with pytest.raises(ModelError, match=message):
            opfa.prune(
                model, 0.6, texts=TEXTS, tokenizer=tokenizer_of(), score="admm", sequences=20
            )
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ModelError, match="hidden states on these texts are not finite"):
        opfa.prune(model, 0.6, texts=TEXTS, tokenizer=tokenizer_of(), sequences=20)


def test_half_of_the_work_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reconstruct._inputs

    def stopped(*args: Any) -> Any:
        if args[-1] == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(reconstruct, "_inputs", stopped)
    model = model_of("bert")
    before = values_of(model)
    with pytest.raises(KeyboardInterrupt):
        opfa.prune(
            model, 0.6, texts=TEXTS, tokenizer=tokenizer_of(), reconstruct=True, sequences=NUM
        )
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert type(model.get_submodule(f"{LAYER}.0.output.dense")) is nn.Linear


def test_what_is_no_encoder_of_transformers_or_in_8_bits_is_refused(
    encoder: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="Sequential: texts are for a model of transformers"):
        plain = nn.Sequential(nn.Linear(4, 4))
        opfa.prune(plain, 0.5, include=["0"], texts=TEXTS, tokenizer=tokenizer_of())
    config = BartConfig(d_model=16, encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=len(WORDS))
    with pytest.raises(ModelError, match="BartModel: texts are for an encoder, without a decoder"):
        opfa.prune(BartModel(config), 0.5, texts=TEXTS, tokenizer=tokenizer_of())
    with pytest.raises(RunError, match="has its own tokenizer"):
        opfa.prune(encoder, 0.5, tmp_path / "x", texts=lines, tokenizer=tokenizer_of())  # pyright: ignore
    monkeypatch.setattr("opfa.models.trained.ranges_of", lambda _: encoder)
    with pytest.raises(ModelError, match="is in 8 bits"):
        opfa.prune(encoder, 0.5, tmp_path / "x", texts=lines, columns="review", reconstruct=True)
    assert not (tmp_path / "x").exists()
