"""A vocabulary cut to what texts use, as a function."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from opfa.api.progress import progress
from opfa.api.texts import texts_of
from opfa.storage.files import check_new

if TYPE_CHECKING:
    from opfa.inference.trim import TrimResult


@progress()
def trim(
    model: str | Path,
    texts: Path | Iterable[str | Path],
    output: str | Path,
    *,
    columns: str | Iterable[str] = "text",
    min_count: int = 1,
    hub: str | None = None,
    hub_config: str | None = None,
    hub_split: str = "train",
) -> "TrimResult":
    """Cut a vocabulary to the tokens that texts use: fewer rows of embeddings, the same outputs.

    `model` is a run, a directory in any form or a Hub name, with any head. `texts` are texts (str)
    or files (`Path`, also a glob pattern) with texts, or lists of texts, in `columns`; `hub` is a
    data set of the Hub in place of them, or beside them. The new directory `output` gets a plain
    model and its tokenizer. Tokens that stand fewer than `min_count` times are cut, unless they
    are special, added, single characters or bytes, or a part of what a BPE makes. On the texts
    the ids are the old ones, renumbered, and hidden states are equal bit for bit; with a
    `min_count` above 1 only on those without a token that was cut. Other texts get other pieces,
    and no unknown token where the old vocabulary knew the characters. A head of masked language
    predicts the kept tokens alone. Raises `ModelError`, `DataError`, `RunError`; nothing is written
    then.
    """
    check_new(Path(output))
    found = texts_of(texts, columns, hub, hub_config, hub_split)
    from opfa.inference.trim import trim as execute

    return execute(str(model), found, Path(output), min_count=min_count)
