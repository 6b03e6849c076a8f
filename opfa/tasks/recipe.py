"""What a recipe can say of a task: its examples, what their columns mean, and its metrics."""

from typing import Literal, Self

from pydantic import Field, model_validator

from opfa.recipe import Section

Kind = Literal[
    "classification",
    "regression",
    "question-answering",
    "token-classification",
    "multiple-choice",
]
METRICS: dict[str, tuple[str, ...]] = {  # what each kind of task knows; higher is better in all
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
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
}
ONLY_UNANSWERABLE = METRICS["question-answering"][2:]


class Task(Section):
    """The examples, by column, and the metrics; the first metric chooses between runs.

    Local files: `train` and `validation` are paths (.jsonl, .csv, .parquet, also .gz; .conll for
    tagged words). From the Hub: `hub` names the data set, `hub_config` its configuration, and
    `train` and `validation` are splits.
    """

    kind: Kind = "classification"
    hub: str | None = None
    hub_config: str | None = None
    train: str = "train"
    validation: str = "validation"
    more_validation: dict[str, str] = {}  # name: split; measured at the end as name_metric
    text: str = "sentence"  # question answering: the question; token classification: the words
    text_pair: str | None = None  # question answering: the context; choices: how each one begins
    choices: tuple[str, ...] = ()  # columns of one choice each, or one column that holds a list
    label: str = "label"  # question answering: the answers; token classification: the tags
    classes: tuple[str, ...] = ()  # names in label order; empty: taken from the training examples
    metrics: tuple[str, ...] = ("accuracy",)
    sequence_tokens: int = Field(default=128, ge=8, le=1 << 20)
    stride_tokens: int = Field(default=128, ge=1)  # overlap of neighbouring windows of one context
    answer_tokens: int = Field(default=30, ge=1, le=1 << 20)  # longest answer span
    n_best: int = Field(default=20, ge=1)  # start and end positions that are combined to spans
    has_unanswerable: bool = False  # questions may have no answer, as in SQuAD v2.0
    no_answer_threshold: float = 0.0  # "" is the answer when its logits lead by more than this

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = METRICS[self.kind]
        if self.kind == "question-answering" and not self.has_unanswerable:
            known = tuple(name for name in known if name not in ONLY_UNANSWERABLE)
        if set(self.metrics) - set(known) or not self.metrics:
            raise ValueError(
                f"metrics = {list(self.metrics)}: for {self.kind} these are known: "
                f"{', '.join(known)}"
            )
        _check_classes(self.classes)
        if (self.kind == "multiple-choice") != bool(self.choices):
            raise ValueError(
                f"choices = {list(self.choices)}: multiple-choice needs its columns, and no other "
                "kind has any"
            )
        if self.kind == "token-classification" and self.text_pair is not None:
            raise ValueError(f"text_pair = {self.text_pair!r}: tagged words have no pair")
        if self.kind == "question-answering" and self.text_pair is None:
            raise ValueError("text_pair: question answering needs the column of the context")
        if self.kind == "question-answering" and self.stride_tokens >= self.sequence_tokens:
            raise ValueError(
                f"stride_tokens = {self.stride_tokens}: windows of sequence_tokens = "
                f"{self.sequence_tokens} can't overlap by that much; SQuAD's are 384 and 128"
            )
        return self


def _check_classes(names: tuple[str, ...]) -> None:
    seen = set()
    for name in names:
        if not name or name != name.strip():
            raise ValueError(f"classes: {name!r} is empty, or has blanks at its ends")
        if name in seen:
            raise ValueError(f"classes: {name!r} stands twice")
        seen.add(name)
