"""Encoders through plain transformers classes: load, take apart for pre-training, save. Nothing
subclassed or patched.

Pre-training needs a model in three parts, so that the vocabulary projection can run in chunks: the
backbone, the head's transform (dense, activation, norm), and the projection. `FAMILIES` says where
each family keeps them; a new family is one more row.
"""

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForPreTraining,
    BertTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils import logging as transformers_logging

from opfa.errors import ModelError, RunError, first_line, opening
from opfa.models.skeleton import SPECIAL, try_out, without_memory
from opfa.sparsity.anatomy import problem_of_storage
from opfa.storage.foreign import (
    CONFIG,
    check_directory,
    check_model,
    check_plain,
    code_refused,
    tokenizer_files,
)
from opfa.weights.compact import METHOD
from opfa.weights.sources import directory_of, open_source, small_files_of

Transform = Callable[[Any, Tensor], Tensor]  # Any: the family's own model class


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family's masked-language head is, and what its configuration calls dropout."""

    transform: Transform
    dropouts: tuple[str, ...]


FAMILIES = {
    "bert": Family(
        transform=lambda m, h: m.cls.predictions.transform(h),
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "distilbert": Family(
        transform=lambda m, h: m.vocab_layer_norm(m.activation(m.vocab_transform(h))),
        dropouts=("dropout", "attention_dropout"),
    ),
    "roberta": Family(
        transform=lambda m, h: m.lm_head.layer_norm(nn.functional.gelu(m.lm_head.dense(h))),
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "modernbert": Family(
        transform=lambda m, h: m.head(h),
        dropouts=("embedding_dropout", "attention_dropout", "mlp_dropout"),
    ),
}


FEW_TOKENS = 5  # that a model is tried out with
SPARE_WEIGHTS = 1 << 24  # beyond those in the files: a new head, and little memory in any case
SPARE_TENSORS = 1_000
HEADS: dict[str, Any] = {  # Any: Auto classes share no base
    "SequenceClassification": AutoModelForSequenceClassification,
    "QuestionAnswering": AutoModelForQuestionAnswering,
    "TokenClassification": AutoModelForTokenClassification,
    "MultipleChoice": AutoModelForMultipleChoice,
}


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a forward pass gives before the vocabulary projection. B batch, T tokens, N of them with
    features, H hidden.
    """

    mlm: Tensor  # [N, H]
    nsp_logits: Tensor | None  # [B, 2]
    hidden_states: tuple[
        Tensor, ...
    ]  # embeddings and every layer, each [B, T, H]; empty unless asked for


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading reports and bars off the console for a while."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Turn every way in which a model or tokenizer can't be loaded into one `ModelError`."""
    with opening(f"{what} {name!r}", ModelError, "can't be loaded"), quiet_transformers():
        try:
            yield
        except ModelError as error:
            raise ModelError(f"{what} {name!r}: can't be loaded: {error}") from error
        except Exception as error:
            if "trust_remote_code" in str(error):  # its advice can't be followed here
                raise code_refused(f"{what} {name!r}", ["auto_map"]) from error
            if "`tiktoken`" in str(error):  # tried with what sentencepiece couldn't read
                raise ModelError(
                    f"{what} {name!r}: can't be loaded: {_no_sentencepiece()}"
                ) from error
            raise


def _no_sentencepiece() -> str:
    if importlib.util.find_spec("sentencepiece") is None:
        return "its tokenizer is of sentencepiece, which is missing: pip install sentencepiece"
    return "its sentencepiece model is damaged, or is none"


def _directory(what: str, name: str, *, with_weights: bool = False) -> Path:
    """The directory that a path or Hub name means, with nothing in it that asks for code."""
    path = Path(name)
    if path.is_dir() and not os.path.lexists(path / CONFIG) and (path / "model").is_dir():
        raise ModelError(f"{what} {name!r}: can't be loaded: a run; did you mean {path / 'model'}?")
    if not path.is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ModelError(f"{what} {name!r}: can't be loaded: no such directory")
    with loading(what, name):
        directory = directory_of(name) if with_weights else small_files_of(name)
        config = check_directory(
            directory,
            CONFIG_MAPPING.__contains__,
            lambda n: tokenizer_class_from_name(n) is not None,
        )
        if with_weights:
            check_plain(directory, config, METHOD)
        return directory


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or Hub name; raises `ModelError` where its files are not there,
    for which transformers makes one up that knows no word.
    """
    directory = _directory("tokenizer", name)
    with loading("tokenizer", name):
        if needed := tokenizer_files(directory, {}):
            raise _no_tokenizer(needed)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        needed = tokenizer_files(directory, tokenizer.vocab_files_names)
        if needed or not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            raise _no_tokenizer(needed or ["an empty vocabulary"])
        tokenizer("What fails", "fails here")
    return tokenizer


def _no_tokenizer(needed: list[str]) -> ModelError:
    return ModelError(
        f"no tokenizer files ({', '.join(needed)}, or tokenizer.json); say which tokenizer it has: "
        "model.tokenizer=NAME"
    )


def wordpiece_tokenizer(
    vocabulary: dict[str, int], *, lowercase: bool, tokens: int
) -> PreTrainedTokenizerBase:
    """BERT's tokenizer over a trained vocabulary."""
    with quiet_transformers():
        return BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, model_max_length=tokens)


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a directory or Hub name."""
    directory = _directory("model", name)
    with loading("model", name):
        check_model(directory)
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def load_weights(
    cls: Any, name: str, config: PretrainedConfig, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A model of a directory or Hub name in one of transformers' classes, fp32, and the names of
    the tensors that its files lack, or have in another shape where the options allow it.

    The model may not be much larger than its files, which is found out before memory is asked for.
    """
    directory = _directory("model", name, with_weights=True)
    with loading("model", name):
        sizes = [tensor.numel() for _, tensor in open_source(str(directory)).tensors(_none)]
        with without_memory(SPARE_TENSORS + 4 * len(sizes), SPARE_WEIGHTS + 2 * sum(sizes)):
            AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False)
        model, info = cls.from_pretrained(
            directory,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    check_storage(name, info)
    changed = (key for key, *_ in info["mismatched_keys"])
    return model, sorted({*info["missing_keys"], *changed})


def _none(*_: Any) -> bool:
    """No tensor's values are wanted."""
    return False


def new_config(values: dict[str, Any]) -> PretrainedConfig:
    """A configuration from its values, `model_type` among them."""
    values = dict(values)
    kind = values.pop("model_type")
    with loading("model.config", kind):
        config = AutoConfig.for_model(kind)
    unknown = sorted(set(values) - set(config.to_dict()) - set(config.attribute_map))
    if unknown:
        raise ModelError(f"model.config.{unknown[0]}: not a value of {type(config).__name__}")
    with loading("model.config", kind):
        return AutoConfig.for_model(kind, **values)


def head_of(config: PretrainedConfig) -> str:
    """Which of `HEADS` a checkpoint was saved with; raises `ModelError` when it is none."""
    made_for = ", ".join(config.architectures or ("nothing",))
    found = [head for head in HEADS if made_for.endswith(f"For{head}")]
    if not found:
        raise ModelError(
            f"a model for {made_for} has no head of a task; fine-tune it first (heads: "
            f"{', '.join(HEADS)})"
        )
    return found[0]


def load_finetuned_model(name: str) -> PreTrainedModel:
    """A model with the head that it was saved with, fp32, for evaluation.

    Attention is written out in full: of the two forms, only this one gives padding the same values
    in torch and in an exported graph.
    """
    config = load_config(name)
    model, missing = load_weights(HEADS[head_of(config)], name, config, attn_implementation="eager")
    if missing:
        raise ModelError(f"model {name!r}: {missing[0]} is missing")
    is_choosing = head_of(config) == "MultipleChoice"
    try_out(model, name, (1, 2, FEW_TOKENS) if is_choosing else (1, FEW_TOKENS))
    return model.eval()


def encoder_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """A bare encoder that has shapes and no memory."""
    with loading("model", config.name_or_path or config.model_type), without_memory():
        return AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False)


def pretraining_skeleton(config: PretrainedConfig, objective: str) -> PreTrainedModel:
    """A model with its pre-training head that has shapes and no memory (on torch's meta device)."""
    cls = _pretraining_class(config, objective)
    with loading("model", config.name_or_path or config.model_type), without_memory():
        return cls.from_config(config) if cls is AutoModelForMaskedLM else cls(config)


def load_pretraining_model(
    name: str, objective: str, dropout: float | None = None, *, needs_head: bool = False
) -> PreTrainedModel:
    """A model with its pre-training head, fp32. A head that the checkpoint lacks, or a pooler, is
    initialized; with `needs_head`, and for tensors of the encoder, `ModelError` is raised instead.
    """
    config = load_config(name)
    cls = _pretraining_class(config, objective)
    changed = dropouts(config, dropout)
    model, new = load_weights(cls, name, config, attn_implementation=_attention(), **changed)
    if lost := new if needs_head else of_encoder(model, new):
        raise ModelError(f"model {name!r}: {len(lost)} tensors are missing, first {lost[0]}")
    try_out(model, name, (1, FEW_TOKENS))
    keep_values(model, config, changed)
    return model


def check_storage(name: str, info: Mapping[str, Any]) -> None:
    """Raise `ModelError` when a checkpoint has weights apart from their masks; `info` is what
    transformers tells of loading it.
    """
    for problem in filter(None, map(problem_of_storage, sorted(info["unexpected_keys"]))):
        raise ModelError(f"model {name!r}: {problem}")


def of_encoder(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Of a model's tensors, those that no head and no pooler has: never to be made anew."""
    encoder = f"{model.base_model_prefix}."
    return [name for name in names if name.startswith(encoder) and ".pooler." not in name]


def new_pretraining_model(
    values: dict[str, Any],
    objective: str,
    tokenizer: PreTrainedTokenizerBase,
    dropout: float | None = None,
) -> PreTrainedModel:
    """A model from scratch: `values` are those of its configuration; the size of the vocabulary and
    the ids of special tokens are the tokenizer's, where the values have no others.
    """
    known = new_config(values).to_dict()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    ids = {name: value for name, value in special.items() if name in known and value is not None}
    config = new_config({"vocab_size": len(tokenizer), **ids, **values})
    cls = _pretraining_class(config, objective)
    changed = dropouts(config, dropout)
    trained = copy.deepcopy(config)
    trained.update(changed)
    with loading("model.config", config.model_type):
        model = cls.from_config(trained) if cls is AutoModelForMaskedLM else cls(trained)
    model.set_attn_implementation(_attention())
    keep_values(model, config, changed)
    return model


def _attention() -> str:
    """On a CPU, torch's fused attention takes longer than the plain products in training."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def dropouts(config: PretrainedConfig, probability: float | None) -> dict[str, float]:
    """This probability under each name that the family has for dropout in embeddings, attention and
    layers, to train with; nothing if it is None. Raises `ModelError` for another family.
    """
    if probability is None:
        return {}
    return dict.fromkeys(_family(config).dropouts, probability)


def keep_values(model: PreTrainedModel, config: PretrainedConfig, changed: Iterable[str]) -> None:
    """Let the model, which was built with other ones, be saved with those of `config`: how one run
    trains is not to decide for the next.
    """
    for name in changed:
        setattr(model.config, name, getattr(config, name))


def _family(config: PretrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise ModelError(f"model type {config.model_type!r}: known are {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def _pretraining_class(
    config: PretrainedConfig, objective: str
) -> Any:  # Any: Auto classes share no base
    _family(config)
    if objective == "mlm":
        return AutoModelForMaskedLM
    if config.model_type != "bert":
        raise ModelError(
            f"objective 'mlm+nsp': {config.model_type} has no next-sentence head; use 'mlm'"
        )
    return BertForPreTraining


def pretraining_features(
    model: PreTrainedModel, inputs: dict[str, Tensor], rows: Tensor, hidden_states: bool = False
) -> Features:
    """Run the backbone, and the head's transform for the tokens at these flat positions [N], but
    not the vocabulary projection.
    """
    outputs = model.base_model(**inputs, output_hidden_states=hidden_states)
    last = outputs.last_hidden_state
    nsp = None
    if isinstance(model, BertForPreTraining):
        nsp = model.cls.seq_relationship(outputs.pooler_output)
    return Features(
        mlm=FAMILIES[model.config.model_type].transform(model, last.flatten(0, 1)[rows]),
        nsp_logits=nsp,
        hidden_states=outputs.hidden_states if hidden_states else (),
    )


def compile_models(*models: PreTrainedModel) -> None:
    """Run their backbones through torch.compile, in place; raises `RunError` where it can't."""
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except (RuntimeError, OSError) as error:
        reason = first_line(error)
        raise RunError(f"launch.compile = true: torch can't compile here: {reason}") from error
    for model in models:
        model.base_model.compile(dynamic=True)  # batches differ in length


def projection(model: PreTrainedModel) -> nn.Linear:
    """The layer from features to vocabulary logits."""
    layer = model.get_output_embeddings()
    assert isinstance(layer, nn.Linear), f"{type(model).__name__} has no output embeddings"
    return layer


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Save in plain transformers form."""
    with quiet_transformers():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: no decay for biases and norms, that is, for vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
