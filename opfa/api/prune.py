"""One-shot pruning of any encoder, in memory or on disk."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from opfa.api.progress import progress
from opfa.api.texts import texts_of
from opfa.compression.grains import Grain
from opfa.compression.pattern import ENCODER_LAYER
from opfa.compression.scores import Score
from opfa.errors import ModelError, RunError
from opfa.inference.results import PruneResult
from opfa.storage.files import check_new, new_directory

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from opfa.compression.layerwise import Admm
    from opfa.compression.oneshot import OneShot
    from opfa.inference.oneshot import Reading
    from opfa.inference.texts import Texts
    from opfa.sparsity.chosen import Chosen

Scope = Literal["layer", "global"]
ScoreName = Literal["magnitude", "activation", "curvature", "fisher", "admm"]
SEQUENCES = 512  # of texts: nine tenths are for measuring and fitting
GrainName = str  # "weight", "neurons", "heads", or the size of blocks, such as "32x32"


@overload
def prune(
    model: "nn.Module",
    sparsity: float,
    output: None = None,
    *,
    scope: Scope = "layer",
    score: "ScoreName | Score | Admm" = "magnitude",
    grain: GrainName | Grain = "weight",
    include: Sequence[str] = (ENCODER_LAYER,),
    exclude: Sequence[str] = (),
    reconstruct: bool = False,
    texts: Path | Iterable[str | Path] = (),
    columns: str | Iterable[str] = "text",
    hub: str | None = None,
    hub_config: str | None = None,
    hub_split: str = "train",
    sequences: int = SEQUENCES,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> PruneResult: ...
@overload
def prune(
    model: str | Path,
    sparsity: float,
    output: str | Path,
    *,
    scope: Scope = "layer",
    score: "ScoreName | Score | Admm" = "magnitude",
    grain: GrainName | Grain = "weight",
    include: Sequence[str] = (ENCODER_LAYER,),
    exclude: Sequence[str] = (),
    reconstruct: bool = False,
    texts: Path | Iterable[str | Path] = (),
    columns: str | Iterable[str] = "text",
    hub: str | None = None,
    hub_config: str | None = None,
    hub_split: str = "train",
    sequences: int = SEQUENCES,
) -> PruneResult: ...
@progress()
def prune(
    model: "str | Path | nn.Module",
    sparsity: float,
    output: str | Path | None = None,
    *,
    scope: Scope = "layer",
    score: "ScoreName | Score | Admm" = "magnitude",
    grain: GrainName | Grain = "weight",
    include: Sequence[str] = (ENCODER_LAYER,),
    exclude: Sequence[str] = (),
    reconstruct: bool = False,
    texts: Path | Iterable[str | Path] = (),
    columns: str | Iterable[str] = "text",
    hub: str | None = None,
    hub_config: str | None = None,
    hub_split: str = "train",
    sequences: int = SEQUENCES,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> PruneResult:
    """Prune an encoder in one shot: exactly round(sparsity * size) of its weights become +0.0.

    A model in memory is changed in place and stays plain: `opfa.lock` it before training. A
    directory, a run or a Hub name is written to the new directory `output`, with its head, its
    tokenizer and its files of sentence-transformers, for them and for `model.init` of a recipe.

    `scope` says whether each matrix reaches the sparsity, or all together. `score` is what a weight
    is worth, `grain` what is pruned together: a name, or an object of your own class; "neurons" and
    "heads" are removed by `opfa.shrink`, and "32x32" are blocks of any size. `include` and
    `exclude` are regular expressions that are searched for in names of linear layers; by default
    those of the numbered layers.

    `texts` are as in `opfa.trim`: texts (str), files (`Path`) with texts in `columns`, or `hub`. A
    model in memory needs its `tokenizer` too. So many `sequences` of up to 128 tokens are drawn of
    them. The last tenth is held out, and the result says how far hidden states moved on it. With
    texts, `score` may be "curvature", "activation" or "fisher"; with `reconstruct` what is left is
    fitted by least squares, layer by layer, to what the dense model computes. "admm" finds the mask
    while it fits, and always reconstructs. Raises `RecipeError` for settings, `ModelError` for
    models, `DataError` for texts; then a model in memory is as it was, and nothing is written.
    """
    from opfa.compression.layerwise import Admm
    from opfa.compression.oneshot import OneShot

    own = Admm() if score == "admm" else score if isinstance(score, (Score, Admm)) else None
    shape = grain if isinstance(grain, Grain) else None
    given = {"include": [*include], "exclude": [*exclude], "scope": scope, "sparsity": sparsity}
    given |= {} if own else {"score": score}
    given |= {} if shape else {"grain": grain}
    settings = OneShot.check(given, "prune")
    found = texts_of(texts, columns, hub, hub_config, hub_split)
    is_fitted = reconstruct or isinstance(own, Admm)
    reading = _reading(found, own or settings.score, sequences, is_fitted)
    job = _Job(settings, own, shape, reading)
    if not isinstance(model, (str, Path)):
        if output is not None:
            raise RunError(f"output = {str(output)!r}: is for a model on disk; save this one after")
        if reading is not None and tokenizer is None:
            raise RunError("texts: a model in memory needs its tokenizer=... too")
        return _pruned(model, job, None, tokenizer)
    if output is None:
        raise RunError(f"{model}: is not in memory, so give the new directory `output`")
    if tokenizer is not None:
        raise RunError(f"{model}: has its own tokenizer; tokenizer=... is for a model in memory")
    return _written(str(model), job, Path(output))


@dataclass(frozen=True)
class _Job:
    """What is asked for. `score` and `grain` are objects, in the place of those of the settings."""

    settings: "OneShot"
    score: "Score | Admm | None"
    grain: Grain | None
    reading: "Reading | None"


def _reading(
    texts: "Texts", chosen: "Score | Admm", sequences: int, reconstruct: bool
) -> "Reading | None":
    """How texts are read; None where there are none, and nothing needs them."""
    from opfa.compression.measured import FromText
    from opfa.inference.oneshot import Reading

    if texts:
        return Reading(texts=texts, sequences=sequences, reconstruct=reconstruct)
    needs = "reconstruct" if reconstruct else f"score = {_name(chosen)!r}"
    if reconstruct or isinstance(chosen, FromText):
        raise RunError(f"{needs}: needs texts, as files (--text), a data set (--hub) or a list")
    return None


def _name(one: object) -> str:
    return getattr(one, "kind", type(one).__name__)  # one of your own may have none


def _facts(chosen: "Score | Admm", *, is_fitted: bool) -> "Chosen":
    """What is noted of how the zeros were chosen."""
    facts = chosen.facts()
    return {**facts, "least_squares": True} if is_fitted and facts["kind"] != "admm" else facts


def _pruned(
    model: "nn.Module",
    job: _Job,
    output: Path | None,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> PruneResult:
    from opfa.compression.oneshot import prune_once
    from opfa.inference.oneshot import prune_by_text

    settings, moved = job.settings, dict[str, Any]()
    own: dict[str, Any] = {"score": job.score, "grain": job.grain}
    if job.reading is None:
        report = prune_once(model, settings, **own)
    else:
        assert tokenizer is not None, "checked before"
        report, found = prune_by_text(model, tokenizer, settings, job.reading, **own)
        moved = asdict(found) | {"is_reconstructed": job.reading.reconstruct}
    return PruneResult(
        directory=output,
        score=_name(job.score or settings.score),
        grain=_name(job.grain or settings.grain),
        scope=settings.scope,
        left=report["left"],
        **report["total"],
        fingerprint=report["fingerprint"],
        tensors=report["tensors"],
        **moved,
    )


def _written(name: str, job: _Job, output: Path) -> PruneResult:
    check_new(output)
    from opfa.models.configs import load_config, load_tokenizer
    from opfa.models.sentences import files_of, write_files
    from opfa.models.trained import load, ranges_of
    from opfa.training.checkpoint import fill_finished

    if ranges_of(name) is not None:
        raise ModelError(f"{name}: is in 8 bits; prune the model that it was made of")
    tokenizer, model = load_tokenizer(name), load(name, exact=False)
    files = files_of(name, load_config(name))  # a sentence encoder stays one
    result = _pruned(model, job, output, tokenizer)
    by = _facts(job.score or job.settings.score, is_fitted=result.is_reconstructed)
    with new_directory(output) as work:
        more = partial(write_files, files)
        fill_finished(model, tokenizer, work, more, [by])
    return result
