"""Whether a tokenizer, a model and a length belong together: a token, token type or position
without a row in the model's tables ends a whole process on a GPU.
"""

import logging

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from opfa.errors import ModelError
from opfa.models.encoders import skeleton
from opfa.models.skeleton import TOKENS, check_positions, num_entries, num_token_types

TYPES = "token_type_ids"
log = logging.getLogger(__name__)


def fit_tokenizer(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, tokens: int, key: str = TOKENS
) -> None:
    """Let a tokenizer give no token types to a model that has at most one; then `check_fit`."""
    model = skeleton(config)
    if num_token_types(model) in (0, 1) and TYPES in tokenizer.model_input_names:
        names = [name for name in tokenizer.model_input_names if name != TYPES]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    _check(model, config, tokenizer, tokens, key)


def fit_padding(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, tokens: int, key: str = TOKENS
) -> int:
    """`fit_tokenizer`, and the token that pads; raises `ModelError` where there is none."""
    fit_tokenizer(config, tokenizer, tokens, key)
    pad_token_id = tokenizer.pad_token_id
    if not (isinstance(pad_token_id, int) and tokenizer.is_fast):
        raise ModelError("the tokenizer needs a padding token and the fast (`tokenizers`) form")
    return pad_token_id


def check_fit(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, tokens: int, key: str = TOKENS
) -> None:
    """Refuse more entries or token types than the model has, and sequences that are too long, as
    this key or option says.
    """
    _check(skeleton(config), config, tokenizer, tokens, key)


def _check(
    model: PreTrainedModel,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    key: str,
) -> None:
    entries = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    rows = num_entries(model)
    if entries > rows:
        what = f"{entries} entries and the model's embedding only {rows}"
        raise ModelError(f"the tokenizer has {what}; they don't belong together")
    if 2 * entries < rows:
        log.warning("the tokenizer has %d entries, the model's embedding %d", entries, rows)
    types, pair = num_token_types(model), dict(tokenizer("one", "two"))
    if types is not None and (most := max(pair.get(TYPES, [0]))) >= types:
        what = f"up to {most}, and this model has only {types} (type_vocab_size)"
        raise ModelError(f"the tokenizer gives token types {what}; they don't belong together")
    check_positions(model, config, tokens, key)
