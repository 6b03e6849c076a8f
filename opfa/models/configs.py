"""Configurations and tokenizers, loaded by plain transformers once nothing asks for code."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils import logging as transformers_logging

from opfa.errors import ModelError, opening
from opfa.extras import has, needs
from opfa.storage import foreign
from opfa.weights.compact import METHOD
from opfa.weights.sources import directory_of, small_files_of


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
                raise foreign.code_refused(f"{what} {name!r}", ["auto_map"]) from error
            if "`tiktoken`" in str(error):  # tried with what sentencepiece couldn't read
                reason = "its sentencepiece model is damaged, or is none"
                if not has("sentencepiece"):
                    reason = needs("it", "sentencepiece", "sentencepiece")
                raise ModelError(f"{what} {name!r}: can't be loaded: {reason}") from error
            raise


def checked_directory(what: str, name: str, *, with_weights: bool = False) -> Path:
    """The directory that a path, run or Hub name means, with nothing in it that asks for code."""
    if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ModelError(f"{what} {name!r}: can't be loaded: no such directory")
    with loading(what, name):
        directory = directory_of(name) if with_weights else small_files_of(name)
        config = foreign.check_directory(
            directory,
            CONFIG_MAPPING.__contains__,
            lambda n: tokenizer_class_from_name(n) is not None,
        )
        if with_weights:
            foreign.check_plain(directory, config, METHOD)
        return directory


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a directory or Hub name."""
    directory = checked_directory("model", name)
    with loading("model", name):
        foreign.check_model(directory)
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


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


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or Hub name; without files transformers would make one up."""
    directory = checked_directory("tokenizer", name)
    with loading("tokenizer", name):
        if needed := foreign.tokenizer_files(directory, {}):
            raise _no_tokenizer(needed)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        needed = foreign.tokenizer_files(directory, tokenizer.vocab_files_names)
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
