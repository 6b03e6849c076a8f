"""A tokenizer with a part of its tokens, and a model's tables with the rows of these.

What is kept is chosen so that a text all of whose tokens are kept is split as before:

WordPiece   takes the longest match from the left; a match that is kept is still the longest
BPE         does the merge of the lowest rank; all merges that lead to a kept token are kept
Unigram     takes the path of the best score; the scores stay, and the lowest one, from which the
            score of an unknown character is computed
WordLevel   looks a word up

Single characters (bytes, of a byte-level BPE) are kept too: new words become pieces of what is
left, and no character that was known becomes unknown. Added tokens, special ones among them, stay.

The JSON is that of the `tokenizers` library. It gives added tokens which its model hasn't the
numbers after the model's, in their order, whatever the JSON says; so that order is kept here.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opfa.errors import ModelError
from opfa.models.configs import load_tokenizer, quiet_transformers
from opfa.models.skeleton import padding_of_positions

BYTE = re.compile("<0x[0-9A-F]{2}>")  # what a model with `byte_fallback` calls a byte
TOKENIZER = "tokenizer.json"
IDS = "_token_id"  # of a configuration: pad_token_id, cls_token_id, ...
Values = dict[str, Any]  # Any: what JSON can hold


@dataclass(frozen=True)
class Cut:
    """A tokenizer's new JSON, and the old id of each new one."""

    values: Values
    kept: list[int]

    def new_ids(self) -> dict[int, int]:
        """By the old ones."""
        return {old: new for new, old in enumerate(self.kept)}


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer of the `tokenizers` library; raises `ModelError` where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        what = "is not in the fast (`tokenizers`) form, which alone can be cut"
        raise ModelError(f"the tokenizer ({type(tokenizer).__name__}) {what}")
    return backend


def values_of(tokenizer: PreTrainedTokenizerBase) -> Values:
    """The JSON of a tokenizer; raises `ModelError` where it has no fast form."""
    return json.loads(backend_of(tokenizer).to_str())


def ids_of_config(model: PreTrainedModel, num_rows: int) -> set[int]:
    """The rows of its embedding that a model's configuration names. Positions of RoBERTa are
    counted from the id of padding, so that id must not change, and all below it are among them.
    """
    padding = padding_of_positions(model)
    named = {i for ids in _token_ids(model).values() for i in ids}
    return {i for i in named if 0 <= i < num_rows} | set(range((padding or 0) + 1))


def _token_ids(model: PreTrainedModel) -> dict[str, list[int]]:
    found = {}
    for key, value in model.config.to_dict().items():
        ids = value if isinstance(value, list) else [value]
        if key.endswith(IDS) and all(type(i) is int for i in ids):
            found[key] = ids
    return found


def cut(values: Values, used: Collection[int]) -> Cut:
    """A tokenizer with the tokens of these ids, and what else must stay; ids that are no token's
    come last. Raises `ModelError` for a kind of tokenizer that isn't known.
    """
    model = values["model"]
    if model["type"] not in KINDS:
        known = ", ".join(KINDS)
        raise ModelError(f"a tokenizer of type {model['type']!r} can't be cut; known are {known}")
    vocabulary = _vocabulary(model)
    added = {each["content"]: each["id"] for each in values["added_tokens"]}
    names = {index: token for token, index in {**added, **vocabulary}.items()}
    wanted = set(used)
    _mapped(values["post_processor"], lambda index: wanted.add(index) or index)
    keep = {names[index] for index in wanted if index in names}
    keep |= {*added, *_characters(model, vocabulary), *_unknown(model)}
    if model["type"] == "BPE":
        keep = _with_parts(model, keep)
    kept = sorted(index for token, index in vocabulary.items() if token in keep)
    kept += sorted(index for token, index in added.items() if token not in vocabulary)
    kept += sorted(wanted - names.keys())
    new = {old: index for index, old in enumerate(kept)}
    changed = {
        "model": {**model, **KINDS[model["type"]](model, keep, new)},
        "added_tokens": sorted(
            ({**each, "id": new[each["id"]]} for each in values["added_tokens"]),
            key=lambda each: each["id"],
        ),
        "post_processor": _mapped(values["post_processor"], new.__getitem__),
    }
    if values["padding"] is not None:
        changed["padding"] = {**values["padding"], "pad_id": new[values["padding"]["pad_id"]]}
    return Cut({**values, **changed}, kept)


def _vocabulary(model: Values) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram's, with scores
        return {token: index for index, (token, _) in enumerate(vocabulary)}
    return vocabulary


def _characters(model: Values, vocabulary: Mapping[str, int]) -> set[str]:
    prefix, suffix = (
        model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    found = {t for t in vocabulary if len(t.removeprefix(prefix).removesuffix(suffix)) == 1}
    if model.get("byte_fallback"):
        found |= {token for token in vocabulary if BYTE.fullmatch(token)}
    return found


def _unknown(model: Values) -> set[str]:
    """The token of what is unknown; of Unigram also the one of the lowest score."""
    if model["type"] == "Unigram":
        lowest = min(model["vocab"], key=lambda piece: piece[1])[0]
        unknown = model["unk_id"]
        return {lowest} if unknown is None else {lowest, model["vocab"][unknown][0]}
    return {model["unk_token"]} & model["vocab"].keys()


def _with_parts(model: Values, keep: Collection[str]) -> set[str]:
    """Tokens with all of which a BPE makes them."""
    parts = defaultdict(set)
    for pair in model["merges"]:
        parts[_merged(model, pair)].update(pair)
    found, waiting = set(keep), [*keep]
    while waiting:
        new = parts[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _merged(model: Values, pair: Iterable[str]) -> str:
    first, second = pair
    return first + second[len(model["continuing_subword_prefix"] or "") :]


def _listed(model: Values, keep: Collection[str], new: Mapping[int, int]) -> Values:
    return {"vocab": {token: new[old] for token, old in model["vocab"].items() if token in keep}}


def _merging(model: Values, keep: Collection[str], new: Mapping[int, int]) -> Values:
    merges = [pair for pair in model["merges"] if _merged(model, pair) in keep]
    return {**_listed(model, keep, new), "merges": merges}


def _scored(model: Values, _: Collection[str], new: Mapping[int, int]) -> Values:
    size, unknown = len(model["vocab"]), model["unk_id"]
    pieces = [model["vocab"][old] for old in new if old < size]
    return {"vocab": pieces, "unk_id": None if unknown is None else new[unknown]}


KINDS: dict[str, Callable[[Values, Collection[str], Mapping[int, int]], Values]] = {
    "WordPiece": _listed,
    "BPE": _merging,
    "Unigram": _scored,
    "WordLevel": _listed,
}


def _mapped(processor: Any, new: Callable[[int], int]) -> Any:  # Any: what JSON can hold
    """A post-processor with other ids: they stand in pairs [token, id] and in lists `ids`."""
    if isinstance(processor, list):
        return [_mapped(each, new) for each in processor]
    if not isinstance(processor, dict):
        return processor
    found = {key: _mapped(value, new) for key, value in processor.items()}
    if found.get("type") in ("BertProcessing", "RobertaProcessing"):
        found |= {key: [found[key][0], new(found[key][1])] for key in ("sep", "cls")}
    if isinstance(found.get("ids"), list):
        found["ids"] = [new(index) for index in found["ids"]]
    return found


def tokens_in(tokenizer: PreTrainedTokenizerBase, text: str) -> set[int]:
    """All ids whose tokens could be found somewhere in a text, if others weren't found before."""
    backend: Any = backend_of(tokenizer)  # its stubs lack properties
    model = values_of(tokenizer)["model"]
    prefix, suffix = (
        model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        text = "\n".join(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    vocabulary = tokenizer.get_vocab().items()
    return {i for t, i in vocabulary if t.removeprefix(prefix).removesuffix(suffix) in text}


def new_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, made: Cut, directory: Path
) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers loads it again, written into an empty directory."""
    with quiet_transformers():
        model.config.save_pretrained(directory)  # its type has a say in the tokenizer's class
        tokenizer.save_pretrained(directory)
    (directory / TOKENIZER).write_text(json.dumps(made.values, ensure_ascii=False))
    found = load_tokenizer(str(directory))
    new = made.new_ids()
    expected = {token: new[i] for token, i in tokenizer.get_vocab().items() if i in new}
    if found.get_vocab() != expected:
        what = "transformers gives its tokens other ids than were written"
        raise ModelError(f"the tokenizer ({type(tokenizer).__name__}) can't be cut: {what}")
    return found


@torch.no_grad()
def cut_tables(model: PreTrainedModel, made: Cut) -> None:
    """Keep the rows of kept tokens, in place: of the embedding [V, H], and of the projection of a
    head of masked language with its bias [V]; and let the configuration say so.
    """
    new, rows = made.new_ids(), torch.tensor(made.kept)
    embedding: Any = model.get_input_embeddings()  # a module with a table
    projection = model.get_output_embeddings()
    tables = {id(p): p for module in (embedding, projection) if module for p in module.parameters()}
    for table in tables.values():  # in place, since parts of a model share them
        table.data = table.data[rows]
    for module, size in ((embedding, "num_embeddings"), (projection, "out_features")):
        if module is not None:
            setattr(module, size, len(rows))
    if embedding.padding_idx is not None:
        embedding.padding_idx = new[embedding.padding_idx]
    for key, ids in _token_ids(model).items():
        mapped = [new.get(i, i) for i in ids]
        is_list = isinstance(getattr(model.config, key), list)
        setattr(model.config, key, mapped if is_list else mapped[0])
    model.config.vocab_size = len(rows)
