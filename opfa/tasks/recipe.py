"""What a recipe can say of a task: its examples, what their columns mean, and its metrics."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from opfa.extras import require
from opfa.recipe import Count, Positive, Section

Kind = Literal[
    "classification",
    "regression",
    "question-answering",
    "token-classification",
    "multiple-choice",
    "embedding",
]
Form = Literal["graded pairs", "pairs", "texts"]  # of examples of embeddings
GRADED = ("pearson", "spearman")
RETRIEVAL = ("recall@1", "recall@5", "recall@10", "recall@100", "mrr@10")
METRICS: dict[str, tuple[str, ...]] = {  # what each kind of task knows; higher is better in all
    "classification": ("accuracy", "f1", "matthews"),
    "regression": GRADED,
    "question-answering": (
        "exact_match",
        "squad_f1",
        "has_answer_exact_match",
        "has_answer_squad_f1",
        "no_answer_accuracy",
        "best_exact_match",
        "best_squad_f1",
    ),
    "token-classification": ("entity_f1", "entity_precision", "entity_recall", "accuracy"),
    "multiple-choice": ("accuracy",),
    "embedding": (*GRADED, *RETRIEVAL),
}
ONLY_UNANSWERABLE = METRICS["question-answering"][2:]
EMBEDDING = ("loss", "scale", "highest_grade", "pooling", "normalize", "train_text")
WHOLE_BATCH = ("cosent", "ranking")  # losses that compare an example with the others of its batch


class Task(Section):
    """The examples, by column, and the metrics."""

    kind: Kind = "classification"
    """The kind of task."""
    hub: str | None = None
    """A data set of the Hub, in place of local files."""
    hub_config: str | None = None
    """The data set's configuration."""
    train: str = "train"
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .conll; also .gz, .zst), or a split of `hub`."""
    validation: str | Annotated[float, Field(gt=0.0, lt=1.0)] = "validation"
    """In the same way, or a share of the training examples to hold out, such as 0.1."""
    more_validation: dict[str, str] = {}
    """name = file or split; measured at the end as name_metric."""
    text: str = "sentence"
    """Column of the text, of the question, or of the list of words."""
    text_pair: str | None = None
    """Column of the second text, of the context, or of how each choice begins."""
    choices: tuple[str, ...] = ()
    """Columns of one choice each, or one column with a list of them."""
    label: str = "label"
    """Column of the class, of the number, of the answers, or of the list of tags."""
    classes: tuple[str, ...] = ()
    """Names in label order; by default found in the training examples."""
    metrics: tuple[str, ...] = ("accuracy",)
    """What is measured; the first one chooses between runs."""
    sequence_tokens: int = Field(default=128, ge=8, le=1 << 20)
    """Longest sequence or window in tokens."""
    stride_tokens: Count = 128
    """Overlap of neighbouring windows of one context."""
    answer_tokens: int = Field(default=30, ge=1, le=1 << 20)
    """Longest answer in tokens."""
    n_best: Count = 20
    """Start and end positions that are combined to answers."""
    has_unanswerable: bool = False
    """Questions may have no answer, as in SQuAD v2.0."""
    no_answer_threshold: float = 0.0
    """There is no answer where its logits lead by more than this."""
    loss: Literal["cosent", "cosine", "ranking", "teacher"] | None = None
    """Of embeddings: graded pairs (by default "cosent"), pairs, or nothing but [distillation]."""
    scale: Positive | None = None
    """What cosines are multiplied by in "cosent" and "ranking"; by default 20."""
    highest_grade: Positive | None = None
    """The grade of a cosine of 1, for "cosine"; by default 1."""
    pooling: Literal["mean", "first"] | None = None
    """A vector is the mean token or the first; by default as in the model's files, or the mean."""
    normalize: bool | None = None
    """Vectors have length 1; by default as in the model's files, or yes."""
    train_text: str | None = None
    """Column of training texts for "teacher"; by default `text` and `text_pair`."""

    @field_validator("validation", mode="before")
    @classmethod
    def _check_share(cls, value: Any) -> Any:  # Any: whatever JSON can hold
        if isinstance(value, str) or (isinstance(value, float) and 0.0 < value < 1.0):
            return value
        what = "a file, a split, or a share of the training examples between 0.0 and 1.0"
        raise ValueError(f"must be {what}")

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = METRICS[self.kind]
        if self.kind == "question-answering" and not self.has_unanswerable:
            known = tuple(name for name in known if name not in ONLY_UNANSWERABLE)
        if set(self.metrics) - set(known) or not self.metrics:
            what = f"for {self.kind} these are known: {', '.join(known)}"
            raise ValueError(f"metrics = {list(self.metrics)}: {what}")
        _check_classes(self.classes)
        if (self.kind == "multiple-choice") != bool(self.choices):
            what = "multiple-choice needs its columns, and no other kind has any"
            raise ValueError(f"choices = {list(self.choices)}: {what}")
        if self.kind == "token-classification" and self.text_pair is not None:
            raise ValueError(f"text_pair = {self.text_pair!r}: tagged words have no pair")
        if self.kind == "question-answering" and self.text_pair is None:
            raise ValueError("text_pair: question answering needs the column of the context")
        if self.kind == "question-answering" and self.stride_tokens >= self.sequence_tokens:
            what = f"windows of sequence_tokens = {self.sequence_tokens} can't overlap by that much"
            raise ValueError(f"stride_tokens = {self.stride_tokens}: {what}; SQuAD: 384 and 128")
        _check_embedding(self)
        return self

    def check_packages(self) -> None:
        """Raise `RunError` if a package is missing that it needs, to read or to learn."""
        if self.hub is not None:
            require(f"task.hub = {self.hub!r}", "opfa[datasets]", "datasets")
        if self.kind == "embedding" and (self.loss != "teacher" or {*self.metrics} & {*RETRIEVAL}):
            require("task.kind = 'embedding'", "opfa[embeddings]", "sentence_transformers")

    @property
    def train_form(self) -> Form:
        """What the training examples of embeddings are."""
        if self.loss == "teacher":
            return "texts"
        return "pairs" if self.loss == "ranking" else "graded pairs"

    @property
    def validation_form(self) -> Form:
        """What the validation examples of embeddings are."""
        return "graded pairs" if set(self.metrics) & set(GRADED) else "pairs"


def _check_classes(names: tuple[str, ...]) -> None:
    seen = set()
    for name in names:
        if not name or name != name.strip():
            raise ValueError(f"classes: {name!r} is empty, or has blanks at its ends")
        if name in seen:
            raise ValueError(f"classes: {name!r} stands twice")
        seen.add(name)


def _check_embedding(task: Task) -> None:
    if task.kind != "embedding":
        if given := [key for key in EMBEDDING if getattr(task, key) is not None]:
            value = getattr(task, given[0])
            raise ValueError(f"{given[0]} = {value!r}: is for kind = 'embedding' alone")
        return
    if task.text_pair is None:
        what = "embeddings are measured on pairs of texts, and this is the column of the second"
        raise ValueError(f"text_pair: {what}")
    if len({metric in GRADED for metric in task.metrics}) > 1:
        what = f"{' and '.join(GRADED)} need graded pairs, the others pairs; take one or the other"
        raise ValueError(f"metrics = {list(task.metrics)}: {what}")
    if not isinstance(task.validation, str) and task.train_form != task.validation_form:
        what = f"training examples are {task.train_form}, and {task.metrics[0]} needs"
        raise ValueError(f"validation = {task.validation}: {what} {task.validation_form}")
    loss = task.loss or "cosent"
    for key, losses in (
        ("scale", WHOLE_BATCH),
        ("highest_grade", ("cosine",)),
        ("train_text", ("teacher",)),
    ):
        if (value := getattr(task, key)) is not None and loss not in losses:
            what = f"is for loss = {' or '.join(map(repr, losses))}, and this is {loss!r}"
            raise ValueError(f"{key} = {value!r}: {what}")
