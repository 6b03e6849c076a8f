"""Trim: a model and the texts it is for -> the same model with the tokens of these texts alone.

    count tokens -> cut the tokenizer -> compare on all texts -> cut the tables -> compare outputs

Of a small encoder the embeddings are half of the file. Nothing is written unless each text is split
into the same tokens as before, and some of them give the same hidden states, bit for bit.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opfa.downstream.recipe import recipe_of
from opfa.errors import DataError, ModelError, RunError, blaming, shown
from opfa.inference.texts import Texts
from opfa.models import trained
from opfa.models.configs import checked_directory, load_tokenizer, quiet_transformers
from opfa.models.encoders import FEW_TOKENS, write_model
from opfa.models.fit import check_fit
from opfa.models.sentences import copy_files
from opfa.models.skeleton import num_entries, num_positions
from opfa.models.vocabulary import (
    Cut,
    backend_of,
    cut,
    cut_tables,
    ids_of_config,
    new_tokenizer,
    tokens_in,
    values_of,
)
from opfa.report.bars import Bar
from opfa.report.outcome import Outcome, Place, percent
from opfa.report.tables import Table
from opfa.storage import foreign
from opfa.storage.files import check_new, new_directory, write_text
from opfa.storage.runs import RECIPE
from opfa.training.checkpoint import verify
from opfa.weights.sources import directory_of, open_source

SPARSITY = "sparsity.json"
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt")  # beside tokenizer.json, of older models
MOST_UNLIKE = 100  # texts that are looked at before the comparison begins anew
TRIED, TRIED_TOKENS = 4, 32  # texts whose hidden states are compared, and how much of them


class TrimResult(Outcome):
    """A model with fewer tokens. `covered` is a share of the texts' tokens."""

    directory: Place
    tokens: int  # of the tokenizer
    of_tokens: int
    parameters: int  # of the whole model
    of_parameters: int
    bytes: int  # of the files of weights
    of_bytes: int
    texts: int
    texts_changed: int  # that are split otherwise than before; 0 unless `min_count` is above 1
    texts_tokens: int
    covered: float

    def table(self) -> Table:
        """Sizes before and after."""
        rows = [
            (what, f"{before:,}", f"{after:,}", f"{after / before:.1%}")
            for what, before, after in (
                ("tokens", self.of_tokens, self.tokens),
                ("parameters", self.of_parameters, self.parameters),
                ("bytes of weights", self.of_bytes, self.bytes),
            )
        ]
        return Table(("", "before", "after", "left"), rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """What the texts keep."""
        share = f"{percent(self.covered)} of their {self.texts_tokens:,} tokens are kept"
        same = f"{self.texts - self.texts_changed:,} of {self.texts:,} texts are split as before"
        return [f"{same}; {share}"]

    def places(self) -> Mapping[str, Path | str]:
        """The model."""
        return {"model": self.directory}


def trim(name: str, texts: Texts, output: Path, *, min_count: int = 1) -> TrimResult:
    """Write the new directory `output`; tokens that stand fewer than `min_count` times are cut."""
    check_new(output)
    if min_count < 1:
        raise RunError(f"min_count = {min_count}: must be 1 or more")
    if not texts:
        raise RunError("no texts: give files, texts or a data set of the Hub")
    if trained.ranges_of(name) is not None:
        raise ModelError(f"{name}: is in 8 bits; trim the model that it was made from")
    tokenizer, model = load_tokenizer(name), trained.load(name)
    with blaming("model", name):
        values_of(tokenizer)
        check_fit(model.config, tokenizer, FEW_TOKENS)
    counts = _count(tokenizer, texts)
    used = {token for token, count in counts.items() if count >= min_count}
    with blaming("model", name):
        trimmed = _trimmed(tokenizer, model, texts, used)
    num_rows, kept = num_entries(model), trimmed.made.kept
    if len(kept) >= num_rows:
        raise ModelError(f"{name}: nothing to cut; {len(kept):,} of {num_rows:,} tokens must stay")
    expected = _states(model, tokenizer, trimmed.alike)
    source = open_source(str(directory_of(name)))
    dtypes = {t.dtype for _, t in source.tensors(lambda *_: False) if t.is_floating_point()}
    of_parameters = model.num_parameters()
    cut_tables(model, trimmed.made)
    if dtypes == {torch.half} or dtypes == {torch.bfloat16}:
        torch.nn.Module.to(model, dtypes.pop())  # as its file had it
    with new_directory(output) as work:
        _write(name, model, trimmed.tokenizer, work)
        again = _states(trained.load(str(work)), load_tokenizer(str(work)), trimmed.alike)
        for text, before, after in zip(trimmed.alike, expected, again, strict=True):
            if not torch.equal(before, after):
                raise ModelError(f"{name}: not written, hidden states of {shown(text)} differ")
        num_bytes = open_source(str(work)).file_bytes
    return TrimResult(
        directory=output,
        tokens=len(trimmed.tokenizer),
        of_tokens=len(tokenizer),
        parameters=model.num_parameters(),
        of_parameters=of_parameters,
        bytes=num_bytes,
        of_bytes=source.file_bytes,
        texts=trimmed.num_texts,
        texts_changed=trimmed.num_changed,
        texts_tokens=counts.total(),
        covered=sum(counts[token] for token in kept) / counts.total(),
    )


@dataclass
class _Trimmed:
    """A cut tokenizer, and what came out of comparing it with the old one."""

    tokenizer: PreTrainedTokenizerBase
    made: Cut
    num_texts: int = 0
    num_changed: int = 0  # texts that are split otherwise, since they have tokens that were cut
    alike: list[str] = field(default_factory=list)  # the first few that are split as before
    unlike: list[tuple[str, str]] = field(default_factory=list)  # that have none, and still aren't


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, has_special: bool = False
) -> list[list[int]]:
    with quiet_transformers():  # a text is longer than a model's positions, and that is fine
        return tokenizer(list(texts), add_special_tokens=has_special, return_attention_mask=False)[
            "input_ids"
        ]


def _count(tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Counter[int]:
    """How often each token stands in the texts."""
    counts: Counter[int] = Counter()
    with Bar("counting tokens", None, counts=False) as bar:
        for _, chunk in texts.chunks():
            for ids in _tokens(tokenizer, chunk):
                counts.update(ids)
            bar.say(f"{counts.total():,}")
    if not counts:
        raise DataError("the texts have no tokens")
    return counts


def _trimmed(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, texts: Texts, used: Collection[int]
) -> _Trimmed:
    """The tokenizer with these tokens, and with what else it takes to split texts as before."""
    wanted = {*used, *tokenizer.all_special_ids, *ids_of_config(model, num_entries(model))}
    while True:
        made = cut(values_of(tokenizer), wanted)
        with tempfile.TemporaryDirectory() as aside:
            found = _Trimmed(new_tokenizer(tokenizer, model, made, Path(aside)), made)
        _compare(tokenizer, texts, found)
        if not found.unlike:
            return found
        # An unknown word may have become pieces: what kept it from that was cut.
        more = set().union(*(tokens_in(tokenizer, text) for _, text in found.unlike))
        if more <= wanted:
            place, text = found.unlike[0]
            raise ModelError(f"{place}: would not be split as before: {shown(text)}")
        wanted |= more


def _compare(tokenizer: PreTrainedTokenizerBase, texts: Texts, found: _Trimmed) -> None:
    new = found.made.new_ids()
    for places, chunk in _shown(texts):
        before, after = (_tokens(each, chunk) for each in (tokenizer, found.tokenizer))
        for place, text, old, ids in zip(places, chunk, before, after, strict=True):
            mapped = [new.get(token) for token in old]
            found.num_texts += 1
            if mapped == ids:
                if len(found.alike) < TRIED:
                    found.alike.append(text)
            elif None in mapped:
                found.num_changed += 1
            else:
                found.unlike.append((place, text))
        if len(found.unlike) > MOST_UNLIKE:
            return


def _shown(texts: Texts) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    with Bar("comparing", None, counts=False) as bar:
        num_texts = 0
        for places, chunk in texts.chunks():
            yield places, chunk
            num_texts += len(chunk)
            bar.say(f"{num_texts:,} texts")


def _states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[Tensor]:
    """Hidden states [1, T, H] of how each text begins, with its special tokens."""
    most = min(TRIED_TOKENS, num_positions(model, model.config) or TRIED_TOKENS)
    ids = _tokens(tokenizer, texts, has_special=True)
    with torch.inference_mode():
        return [model.base_model(input_ids=torch.tensor([each[:most]]))[0] for each in ids]


def _write(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, work: Path
) -> None:
    """The model with all that stood beside it."""
    directory = checked_directory("model", name)
    write_model(model, tokenizer, work)
    copy_files(directory, work)
    if (directory / SPARSITY).is_file():  # nothing that it is about has changed
        shutil.copyfile(directory / SPARSITY, work / SPARSITY)
        verify(work, foreign.read_object(work / SPARSITY))
    if any((directory / each).is_file() for each in VOCABULARIES):
        backend_of(tokenizer).model.save(str(work))
    if (recipe := recipe_of(name)) is not None:
        write_text(work / RECIPE, recipe.to_public_toml())
