"""The model card of a release: what it is, how it was made, what it is worth, how to use it.

Every number comes from the files of runs; nothing is typed in. The text goes into the template
`data/model_card.md`, the metadata through huggingface_hub's own classes, which refuse what the Hub
would refuse.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from opfa.errors import RunError
from opfa.release.provenance import Facts, Row, Step
from opfa.report.tables import Table, figure
from opfa.sparsity.anatomy import layer_of
from opfa.tasks.kinds import KINDS

PICTURE = "sparsity.png"
BEFORE = "\n\nThat run started from this one:\n\n"
TEMPLATE = Path(__file__).parent / "model_card.md"
PIPELINES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "question-answering": "question-answering",
    "token-classification": "token-classification",
    "multiple-choice": "multiple-choice",
    "mlm_loss": "fill-mask",
    "hidden_loss": "feature-extraction",
}
UPSTREAM = {"mlm_loss": "AutoModelForMaskedLM", "hidden_loss": "AutoModel"}
LOSSES = {
    "mlm_loss": "Loss of a masked token",
    "hidden_loss": "Squared distance of a token's hidden states from the teacher's, a mean over "
    "layers and their dimensions,",
}
INPUTS = {
    "mlm_loss": 'tokenizer(f"The man {tokenizer.mask_token} the sea.", return_tensors="pt")',
    "question-answering": 'tokenizer("Who sees?", "The man sees it.", return_tensors="pt")',
    "multiple-choice": "{name: ids[None] for name, ids in "
    'tokenizer(["He sees"] * 2, ["it.", "her."], return_tensors="pt").items()}',
}
ANY_INPUTS = 'tokenizer("The old man sees the sea.", return_tensors="pt")'


@dataclass(frozen=True, kw_only=True)
class Release:
    """All that a card tells."""

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
    rows: Sequence[Row]  # of the model itself first
    is_measured: bool  # whether the first row is that of these very files
    licence: str | None
    base_model: str | None

    @property
    def kind(self) -> str | None:
        """The kind of task; None for a pre-trained model."""
        return self.steps[0].kind

    @property
    def purpose(self) -> str:
        """The kind of task; of a pre-trained model the loss that it is judged by."""
        return self.kind or next(iter(self.rows[0].metrics))

    @property
    def is_sparse(self) -> bool:
        """Whether any matrix was pruned; of a dense model in 8 bits, matrices without zeros are
        listed.
        """
        return self.sparsity["total"]["zeros"] > 0


def model_card(release: Release) -> ModelCard:
    """The card. Raises `RunError` for metadata that the Hub would not accept."""
    try:
        data = _metadata(release)
        return ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            title=release.name.rpartition("/")[2],
            name=release.name,
            auto=UPSTREAM.get(release.purpose) or KINDS[release.purpose].head.__name__,
            inputs=INPUTS.get(release.purpose, ANY_INPUTS),
            is_compact=release.form != "dense",
            is_sparse=release.is_sparse,
            fingerprint=release.sparsity["fingerprint"],
            summary=_summary(release),
            facts=_facts(release),
            results=_results(release),
            sparsity=_sparsity(release),
            making=BEFORE.join(map(_made, release.steps)),
            limits=_limits(release),
            licence=release.licence or "Not stated.",
        )
    except ValueError as error:
        raise RunError(f"the card of {release.name}: {error}") from error


def _metadata(release: Release) -> ModelCardData:
    task = release.steps[0].recipe.get("task", {})
    results = []
    pipeline = PIPELINES[release.purpose]
    if release.kind:
        for metric, value in release.rows[0].metrics.items():
            results.append(
                EvalResult(
                    task_type=pipeline,
                    dataset_type=task.get("hub") or "local",
                    dataset_name=_data_name(task),
                    dataset_config=task.get("hub_config"),
                    dataset_split=task["validation"] if task.get("hub") else "validation",
                    metric_type=metric,
                    metric_value=value,
                )
            )
    tags = ["opfa", *(["sparse", "pruning", "prune-once-for-all"] if release.is_sparse else [])]
    return ModelCardData(
        model_name=release.name.rpartition("/")[2],
        library_name="transformers",
        pipeline_tag=pipeline,
        license=release.licence,
        base_model=release.base_model,
        datasets=[task["hub"]] if task.get("hub") else None,
        tags=[*tags, "8-bit"] if release.is_quantized else tags,
        eval_results=results or None,
    )


def _data_name(task: Facts) -> str:
    if not task.get("hub"):
        return task["validation"]
    return " ".join(filter(None, (task["hub"], task.get("hub_config"))))


def _summary(release: Release) -> str:
    total = release.sparsity["total"]
    what = f"fine-tuned for {release.kind}" if release.kind else "pre-trained"
    eight = ", quantized to 8 bits while it was trained" if release.is_quantized else ""
    made = "Made with opfa, after *Prune Once for All* (Zafrir et al., 2021)."
    if not release.is_sparse:
        return f"A dense encoder, {what}{eight}. {made}"
    share = f"exactly {total['zeros']:,} of {total['size']:,} ({total['sparsity']:.2%})"
    zeros = f"{share} of the weights of its pruned matrices are zero"
    zeros += f", {release.whole_sparsity:.1%} of all its weights"
    return f"A sparse encoder, {what}{eight}: {zeros}. {made}"


def _facts(release: Release) -> str:
    size = f"{release.num_bytes:,} bytes; dense in fp32: {release.dense_bytes:,}"
    form = f"{release.form}, {release.dtype}"
    if release.form == "compact-int8":
        also = " and embeddings" if release.has_int8_embeddings else ""
        form = f"compact-int8: matrices of the layers{also} in 8 bits, others in {release.dtype}"
    rows = [
        ("format", form),
        ("weights on disk", size),
        *(
            (f"`{file}` (SHA-256)", f"`{sha256}`")
            for file, sha256 in release.weights_sha256.items()
        ),
        ("recipe (SHA-256)", f"`{release.steps[0].sha256}`"),
    ]
    if release.is_sparse:
        rows.append(("zeros (fingerprint)", f"`{release.sparsity['fingerprint']}`"))
    return Table(("", ""), rows).markdown()


def _results(release: Release) -> str:
    names = list(release.rows[0].metrics)
    lines = []
    for row in release.rows:
        means, deviations = row.metrics, row.deviations
        cells = [figure(means[n], deviations.get(n)) if n in means else "" for n in names]
        lines.append(
            (row.label.replace("|", "/"), f"{row.sparsity:.2%}", str(row.num_seeds), *cells)
        )
    table = Table(("model", "sparsity", "seeds", *names), lines).markdown()
    if release.kind:
        task = release.steps[0].recipe["task"]
        split = f"split `{task['validation']}` of " if task.get("hub") else ""
        note = f"On {split}`{_data_name(task)}`."
    else:
        examples = release.steps[0].recipe["logging"]["evaluate_examples"]
        note = f"{LOSSES[release.purpose]} on at most {examples} examples of documents held out."
        if len(release.rows) > 1:
            note += " Where these were trained for different numbers of steps, that counts too."
    what = "these very files" if release.is_measured else "the weights before they were rounded"
    return f"{table}\n\n{note} The first line is that of {what}."


def _sparsity(release: Release) -> str:
    if not release.is_sparse:
        return "None: no matrix has zeros."
    report = release.sparsity
    zeros, sizes = Counter[str](), Counter[str]()
    for name, tensor in report["tensors"].items():
        layer = layer_of(name)
        where = name if layer is None else f"{layer.stack} layer {layer.number}"
        zeros[where] += tensor["zeros"]
        sizes[where] += math.prod(tensor["shape"])
    rows = [
        (where, f"{zeros[where]:,}", f"{size:,}", f"{zeros[where] / size:.4%}")
        for where, size in sizes.items()
    ]
    total = report["total"]
    all_ = (f"{total['zeros']:,}", f"{total['size']:,}", f"{total['sparsity']:.4%}")
    table = Table(("layer", "zeros", "weights", "sparsity"), [*rows, ("all", *all_)]).markdown()
    return f"{table}\n\n![Sparsity by layer and matrix]({PICTURE})"


def _made(step: Step) -> str:
    recipe, machine = step.recipe, step.environment["machine"]
    training = recipe["training"]
    lines = [f"recipe `{recipe['name']}`, SHA-256 `{step.sha256}`, seed {recipe['seed']}"]
    if start := recipe["model"].get("init"):
        digest = step.environment.get("start_sha256")
        lines.append(f"from `{start}`" + (f", SHA-256 `{digest}`" if digest else ""))
    rest = {key: value for key, value in training.items() if key != "steps"}
    lines.append(f"{step.steps:,} steps: {_flat(rest)}")
    if "corpus" in recipe:
        tokens = step.steps * training["batch"] * recipe["corpus"]["sequence_tokens"]
        lines.append(f"{tokens:,} tokens at most, of `{recipe['data']}`")
    for section in ("pruning", "distillation", "quantization", "corpus"):
        if recipe.get(section):
            lines.append(f"{section}: {_flat(recipe[section])}")
    for name, split in step.splits.items():
        lines.append(f"{name} data: {_flat(split)}")
    accelerators = ", ".join(machine["accelerators"]) or "no accelerator"
    size = step.environment["world_size"]
    lines.append(f"processes: {size}, processors: {machine['processors']}, {accelerators}")
    versions = step.environment["versions"]
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return "\n".join(f"- {line}" for line in lines)


def _flat(values: Facts) -> str:
    parts = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            parts.append(_flat(value))
        elif value not in (None, [], {}):
            shown = f"{value:.6g}" if isinstance(value, float) else value
            parts.append(f"{key} `{shown}`")
    return ", ".join(part for part in parts if part)


def _limits(release: Release) -> str:
    lines = []
    if release.kind is None:
        lines.append("It has no head for a task yet: fine-tune it for one first.")
    if release.purpose == "hidden_loss":
        lines.append("It learnt hidden states alone: its head for masked tokens was not trained.")
    if release.is_sparse:
        lines.append("Sparse matrices don't run faster in plain PyTorch.")
    if release.is_sparse and release.form == "dense":
        lines.append("The file stores zeros as zeros, so it is as large as a dense one.")
    if release.is_quantized:
        lines.append(
            "Plain transformers computes in fp32; in 8 bits it answers as in the table above: "
            "`opfa evaluate`, or `opfa export` for ONNX Runtime."
        )
    elif release.form == "compact-int8":
        lines.append("Its matrices were rounded to 8 bits when it was released, without training.")
    lines.append("It knows the language and the biases of its training data.")
    return "\n".join(f"- {line}" for line in lines)
