"""Whether a tokenizer, a model and a length belong together, before anything is computed.

On a GPU a token, token type or position that a model has no row for ends the whole process, so each
is compared with the model's own tables.
"""

import logging

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from opfa.errors import ModelError
from opfa.models.encoders import encoder_skeleton
from opfa.models.skeleton import check_positions, num_entries, num_token_types

TYPES = "token_type_ids"
log = logging.getLogger(__name__)


def fit_tokenizer(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> None:
    """Stop a tokenizer from giving token types to a model that has at most one, as RoBERTa's own
    tokenizers do, also after it is saved. Then `check_fit`.
    """
    model = encoder_skeleton(config)
    if num_token_types(model) in (0, 1) and TYPES in tokenizer.model_input_names:
        names = [name for name in tokenizer.model_input_names if name != TYPES]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    check_fit(config, tokenizer, tokens)


def check_fit(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    """Refuse a tokenizer with more entries or token types than the model, and sequences longer than
    its positions.
    """
    model = encoder_skeleton(config)
    entries = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    rows = num_entries(model)
    if entries > rows:
        raise ModelError(
            f"the tokenizer has {entries} entries and the model's embedding only {rows}; they "
            "don't belong together"
        )
    if 2 * entries < rows:
        log.warning("the tokenizer has %d entries, the model's embedding %d", entries, rows)
    types, pair = num_token_types(model), dict(tokenizer("one", "two"))
    if types is not None and (most := max(pair.get(TYPES, [0]))) >= types:
        raise ModelError(
            f"the tokenizer gives a pair token types up to {most}, and this model has only {types} "
            "(type_vocab_size); they don't belong together"
        )
    check_positions(model, config, tokens)
