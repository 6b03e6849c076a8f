"""Scores of a model on a task's validation split.

Classification and regression: 0..1 (correlations -1..1), from scikit-learn and scipy. Question
answering: SQuAD v1.1's exact match and F1, 0..100, by the official definition (lower case, no
punctuation, no articles, single blanks; best over the answers). The answer is the context's span
with the highest start + end logit over all windows of a question, among the `n_best` starts and
ends of each window, at most `answer_tokens` long; "" if there is none.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Subset

from opfa.downstream.recipe import Metric, Task
from opfa.downstream.tasks import Split, inputs_of, logits_of

Span = tuple[float, int, int]  # start + end logit, first and last token


def evaluate(
    model: nn.Module, task: Task, split: Split, *, batch: int, device: torch.device | str
) -> dict[str, float]:
    """The task's metrics, in the order of the recipe. The model is left in the mode it came in."""
    return score(task, predict(model, task, split, batch=batch, device=device), split)


def predict(
    model: nn.Module, task: Task, split: Split, *, batch: int, device: torch.device | str
) -> tuple[Tensor, ...]:
    """Logits for each feature, in order, fp32 on the CPU; -inf where a window has no token.

    Features are batched by length, the longest first: little is padded, and memory runs out at
    once or never.
    """
    lengths = [len(tokens) for tokens in split.features["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    loader = DataLoader(
        Subset(split.features, order),  # pyright: ignore[reportArgumentType]
        batch_size=batch,
        collate_fn=split.collate,
    )
    was_training = model.training
    model.eval()
    batches = []
    with torch.no_grad():
        for tensors in loader:
            inputs = {name: tensor.to(device) for name, tensor in inputs_of(tensors).items()}
            logits = logits_of(task, model(**inputs))
            batches.append([tensor.float().cpu() for tensor in logits])
    model.train(was_training)
    places = torch.tensor(order).argsort()
    return tuple(_stack(tensors)[places] for tensors in zip(*batches, strict=True))


def score(task: Task, logits: tuple[Tensor, ...], split: Split) -> dict[str, float]:
    """Metrics of logits. `f1` is that of class 1 where there are two classes, else the macro mean.

    A correlation with a constant is undefined and counts as 0.
    """
    if task.kind == "question-answering":
        predictions = decode(task, logits, split)
        answers = [labels["text"] for labels in split.examples.labels]
        return {name: _best_over_answers(name, predictions, answers) for name in task.metrics}
    targets = np.asarray(split.features["labels"])
    if task.kind == "regression":
        values = logits[0].squeeze(-1).numpy()
        return {name: _correlation(name, values, targets) for name in task.metrics}
    indices, num_classes = logits[0].argmax(-1).numpy(), len(split.classes)
    return {name: _agreement(name, indices, targets, num_classes) for name in task.metrics}


def _agreement(name: Metric, indices: np.ndarray, targets: np.ndarray, num_classes: int) -> float:
    if name == "f1":
        average = "binary" if num_classes == 2 else "macro"
        kept = {"labels": range(num_classes), "average": average, "zero_division": 0}
        return float(f1_score(targets, indices, **kept))
    measure = {"accuracy": accuracy_score, "matthews": matthews_corrcoef}[name]
    return float(measure(targets, indices))


def _correlation(name: Metric, values: np.ndarray, targets: np.ndarray) -> float:
    if np.ptp(values) == 0.0 or np.ptp(targets) == 0.0:
        return 0.0
    measure = {"pearson": pearsonr, "spearman": spearmanr}[name]
    return float(measure(values, targets)[0])


def _best_over_answers(
    name: Metric, predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> float:
    measure = {"exact_match": exact_match, "squad_f1": squad_f1}[name]
    pairs = zip(predictions, answers, strict=True)
    return 100.0 * fmean(max(measure(text, gold) for gold in golds) for text, golds in pairs)


def _stack(batches: Sequence[Tensor]) -> Tensor:
    """One tensor from batches that may differ in tokens."""
    width = max(tensor.shape[-1] for tensor in batches)
    return torch.cat([pad(t, (0, width - t.shape[-1]), value=-torch.inf) for t in batches])


def decode(task: Task, logits: tuple[Tensor, ...], split: Split) -> list[str]:
    """The best span's text for each question."""
    contexts = split.examples.pairs
    assert contexts is not None, "the recipe asks for text_pair"
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(contexts)
    columns = (split.features[name] for name in ("example", "context", "offsets"))
    starts, ends = (tensor.numpy() for tensor in logits)
    for start, end, example, context, offsets in zip(starts, ends, *columns, strict=True):
        total, first, last = _best_span(start, end, context, task.n_best, task.answer_tokens)
        if total > best[example][0]:
            best[example] = total, contexts[example][offsets[first][0] : offsets[last][1]]
    return [text for _, text in best]


def _best_span(
    start: np.ndarray, end: np.ndarray, context: Sequence[int], n_best: int, answer_tokens: int
) -> Span:
    """The window's best span; its logit is -inf if none of the n_best is possible."""
    starts = np.argsort(-start, kind="stable")[:n_best, None]
    ends = np.argsort(-end, kind="stable")[None, :n_best]
    is_possible = (starts >= context[0]) & (ends < context[1])
    is_possible &= (ends >= starts) & (ends < starts + answer_tokens)
    total = np.where(is_possible, start[starts] + end[ends], -np.inf)
    row, column = np.unravel_index(total.argmax(), total.shape)
    return float(total[row, column]), int(starts[row, 0]), int(ends[0, column])


def normalize(answer: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single blanks."""
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if both have the same normal form, else 0."""
    return float(normalize(prediction) == normalize(answer))


def squad_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words of the normal forms."""
    words, gold = normalize(prediction).split(), normalize(answer).split()
    num_same = (Counter(words) & Counter(gold)).total()
    return 2 * num_same / (len(words) + len(gold)) if num_same else 0.0
