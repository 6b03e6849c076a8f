"""The model card of a release: what it is, how it was made, what it is worth, how to use it.

Every number comes from the files of runs. The text is in the jinja2 template `model_card.md`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from opfa.extras import has
from opfa.releases.provenance import Facts, Measurement, Step
from opfa.releases.shape import Shape
from opfa.report.tables import figure
from opfa.sparsity.anatomy import layer_of
from opfa.sparsity.chosen import KEY, in_words
from opfa.tasks.kinds import KINDS

PICTURE = "sparsity.png"
TEMPLATE = Path(__file__).parent / "model_card.md"
PIPELINES = {  # of the Hub; the other kinds of tasks have the same name there
    "classification": "text-classification",
    "regression": "text-classification",
    "embedding": "sentence-similarity",
    "mlm_loss": "fill-mask",
    "hidden_loss": "feature-extraction",
}
UPSTREAM = {"mlm_loss": "AutoModelForMaskedLM", "hidden_loss": "AutoModel"}


@dataclass(frozen=True, kw_only=True)
class Release:
    """Everything that a card says."""

    name: str
    form: str
    dtype: str
    is_quantized: bool
    sparsity: Facts  # sparsity.json
    has_int8_embeddings: bool
    num_bytes: int  # of the weight files
    weights_sha256: Mapping[str, str]  # of each of them
    whole_sparsity: float  # share of zeros among all weights
    dense_bytes: int  # of the same weights in fp32
    steps: Sequence[Step]  # the newest first
    rows: Sequence[Measurement]  # of the model itself first
    shape: Shape | None  # of an uneven model
    is_measured: bool  # whether the first row was measured on these very files
    licence: str | None
    base_model: str | None

    @property
    def title(self) -> str:
        """Its name without its owner."""
        return self.name.rpartition("/")[2]

    @property
    def kind(self) -> str | None:
        """The kind of task; None for a pre-trained model."""
        return self.steps[0].kind

    @property
    def purpose(self) -> str:
        """The kind of task, or the loss that a pre-trained model is judged by."""
        return self.kind or next(iter(self.rows[0].metrics))

    @property
    def is_sparse(self) -> bool:
        """Whether any matrix was pruned. A dense model in 8 bits lists matrices without zeros."""
        return self.sparsity["total"]["zeros"] > 0

    def facts(self) -> dict[str, Any]:
        """What `release.json` says of it."""
        return {
            "name": self.name,
            "task": self.steps[0].recipe["name"],
            "kind": self.kind,
            "format": self.form,
            "dtype": self.dtype,
            "quantized": self.is_quantized,
            "sparsity": self.sparsity["total"]["sparsity"],
            "fingerprint": self.sparsity["fingerprint"],
            **({KEY: self.sparsity[KEY]} if KEY in self.sparsity else {}),
            "bytes": self.num_bytes,
            "metrics": dict(self.rows[0].metrics),
            "metrics_of": "these files" if self.is_measured else "the weights before rounding",
            "examples_sha256": self.rows[0].data,
            "seed": self.steps[0].recipe["seed"],
            "recipe_sha256": self.steps[0].sha256,
            **({"shape": asdict(self.shape)} if self.shape else {}),
            "base_model": self.base_model,
            "license": self.licence,
        }


def model_card(release: Release) -> str:
    """The card's text, its metadata at the top."""
    task = release.steps[0].recipe.get("task", {})
    environment = Environment(undefined=_Missing, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        release=release,
        metadata=yaml.safe_dump(_metadata(release), sort_keys=False, allow_unicode=True).strip(),
        auto=UPSTREAM.get(release.purpose) or KINDS[release.purpose].head.__name__,
        data_name=_data_name(task) if task else None,
        layers=_layers(release.sparsity["tensors"]),
        picture=PICTURE if has("matplotlib") else "",
        flat=_flat,
        in_words=in_words,
        figure=figure,
    )


class _Missing(StrictUndefined):
    """What the facts lack is false in a condition, and an error where it would be shown."""

    def __bool__(self) -> bool:
        return False


def _metadata(release: Release) -> dict[str, Any]:
    """What the Hub reads of a card, in the order of huggingface_hub's ModelCardData."""
    task = release.steps[0].recipe.get("task", {})
    hub = task.get("hub")
    pipeline = PIPELINES.get(release.purpose, release.purpose)
    is_embedding = release.kind == "embedding"
    library = "sentence-transformers" if is_embedding else "transformers"
    tags = [*([library] if is_embedding else []), "opfa"]
    tags += ["sparse", "pruning", "prune-once-for-all"] if release.is_sparse else []
    values = {
        "base_model": release.base_model,
        "datasets": [hub] if hub else None,
        "library_name": library,
        "license": release.licence,
        "model_name": None if release.kind else release.title,
        "pipeline_tag": pipeline,
        "tags": [*tags, "8-bit"] if release.is_quantized else tags,
    }
    if release.kind:
        split = task["validation"] if hub else "validation"
        dataset = {"name": _data_name(task), "type": hub or "local"}
        dataset |= {"config": task.get("hub_config"), "split": split}
        metrics = [{"type": n, "value": v} for n, v in release.rows[0].metrics.items()]
        results = {"task": {"type": pipeline}, "dataset": _given(dataset), "metrics": metrics}
        values["model-index"] = [{"name": release.title, "results": [results]}]
    return _given(values)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _data_name(task: Facts) -> str:
    if not task.get("hub"):
        return task["validation"]
    return " ".join(filter(None, (task["hub"], task.get("hub_config"))))


def _layers(tensors: Mapping[str, Facts]) -> dict[str, tuple[int, int]]:
    """Zeros and size by layer; a matrix outside of the layers stands for itself."""
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        layer = layer_of(name)
        where = name if layer is None else f"{layer.stack} layer {layer.number}"
        zeros, size = found.get(where, (0, 0))
        found[where] = zeros + tensor["zeros"], size + math.prod(tensor["shape"])
    return found


def _flat(values: Facts, without: str | None = None) -> str:
    """The values of a recipe's section in one line, with the values of nested tables."""
    parts = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            parts.append(_flat(value))
        elif key != without and value not in (None, [], {}):
            shown = f"{value:.6g}" if isinstance(value, float) else value
            parts.append(f"{key} `{shown}`")
    return ", ".join(part for part in parts if part)
