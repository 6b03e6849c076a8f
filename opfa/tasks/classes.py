"""Classes by name: which there are, in which order a model has them, and their numbers."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from transformers import PretrainedConfig

from opfa.errors import DataError, ModelError, shown
from opfa.tasks.examples import Examples
from opfa.tasks.recipe import Task

IN_ENTITY = re.compile(r"[BIESMLUW]([-_].*)?")  # IOB's tags, and those of IOBES, BMES and BILOU
OUTSIDE = "O"  # the tag of a word in no entity
DECIMAL = re.compile(r"[-+]?\d*\.\d+")
FEW = 20  # examples, whose classes may all be different
log = logging.getLogger(__name__)


def of_training(task: Task, train: Examples) -> tuple[str, ...]:
    """Those of the task, or of the training examples."""
    if task.classes or train.names:
        return task.classes or train.names
    tags = task.kind == "token-classification"
    names = {tag for row in train.labels for tag in row} if tags else set(train.labels)
    _check_two(train.source, list(names))
    are_numbers = all(name.isdecimal() and len(name) < 20 for name in names)
    if "f1" in task.metrics and len(names) == 2 and not are_numbers:
        advice = f"say which one that is, task.classes = {sorted(names)} or the other way round"
        raise DataError(f"{train.source}: f1 of two classes is the second one's; {advice}")
    return tuple(sorted(names, key=lambda name: (int(name), name) if are_numbers else (0, name)))


def tell(task: Task, train: Examples, classes: Sequence[str], num_held: int) -> None:
    """Say how many examples and classes there are; warn of numbers that are taken for classes."""
    num = len(train.labels)
    held = f", {num_held:,} held out (task.validation = {task.validation})" if num_held else ""
    found = f"{num - num_held:,} examples to train on{held}"
    if classes:
        found += f"; {len(classes):,} classes, {shown(list(classes))[1:-1]}"
    if task.kind != "classification":
        log.info("%s: %s", train.source, found)
        return
    counts = Counter(train.labels)
    ((most, times),) = counts.most_common(1)
    frequent = f"; the most frequent, {shown(most)}, has {100 * times / num:.0f} %"
    log.info("%s: %s%s", train.source, found, frequent)
    has_many = num >= FEW and 2 * len(counts) > num
    if not task.classes and (has_many or all(map(DECIMAL.fullmatch, counts))):
        what = "%s: %r has %d different values in %d examples, and each becomes a class; "
        way = "for numbers take my-scores (task.kind = 'regression')"
        log.warning(what + way, train.source, task.label, len(counts), num)


def _check_two(source: str, names: Sequence[str]) -> None:
    if len(names) < 2:
        there = f"there is only {shown(names[0])}" if names else "there are none"
        raise DataError(f"{source}: two classes are needed, and {there}")


def of_model(config: PretrainedConfig, stated: tuple[str, ...]) -> tuple[str, ...]:
    """Stated classes in the order of the model's outputs, which may be just LABEL_0, LABEL_1. Names
    that aren't the same may differ in case and in blanks at the ends.
    """
    by_index: dict[Any, Any] = config.id2label or {}  # Any: transformers says int or str
    trained = tuple(str(by_index[index]) for index in sorted(by_index))
    if twice := [name for name in trained if trained.count(name) > 1]:
        raise ModelError(f"the model's class {shown(twice[0])} stands twice")
    if not stated:
        stripped = tuple(name.strip() for name in trained)
        return stripped if len(set(stripped)) == len(stripped) else trained
    same = set(trained) & set(stated)
    if not same and len(trained) == len(stated) and all(n.startswith("LABEL_") for n in trained):
        return stated
    theirs, ours = (_folded(names, same) for names in (trained, stated))
    if len(trained) != len(stated) or theirs.keys() != ours.keys():
        what, wanted = ", ".join(trained), ", ".join(stated)
        raise ModelError(f"the model's classes are {what}; the task's are {wanted}")
    by_name = {theirs[fold]: name for fold, name in ours.items()}
    return tuple(by_name.get(name, name) for name in trained)


def _folded(names: tuple[str, ...], same: Collection[str]) -> dict[str, str]:
    """What names say without regard to case and blanks, and the names; without those in `same`."""
    rest = [name for name in names if name not in same]
    folded = {name.strip().casefold(): name for name in rest}
    return folded if len(folded) == len(rest) else dict(zip(rest, rest, strict=True))


def indices(task: Task, examples: Examples, classes: tuple[str, ...], whose: str) -> list[Any]:
    """Labels as the loss wants them: classes by index, tags by lists of them."""
    _check_two(examples.source, classes)
    _check_tags(task, examples, classes)
    names = task.classes or examples.names or classes
    index = {name: classes.index(name) for name in names if name in classes}
    if not any(name.isdecimal() for name in names):
        index |= {str(i): index[name] for i, name in enumerate(names) if name in index}
    tags = task.kind == "token-classification"
    rows = examples.labels if tags else [[label] for label in examples.labels]
    for place, row in zip(examples.places, rows, strict=True):
        unseen = [label for label in row if label not in index]
        if unseen:
            known = shown(list(classes))[1:-1]
            whose = "task.classes" if task.classes else whose
            what = f"class {shown(unseen[0])} is not one of {known} ({whose})"
            raise DataError(f"{examples.source}, {place}: {what}")
    numbers = [[index[label] for label in row] for row in rows]
    return numbers if tags else [number for (number,) in numbers]


def _check_tags(task: Task, examples: Examples, classes: tuple[str, ...]) -> None:
    """Raise `DataError` where whole entities are to be scored and the tags don't tell them."""
    metrics = [name for name in task.metrics if name.startswith("entity")]
    inside = [name for name in classes if name != OUTSIDE]
    numbers = [name for name in inside if name.isdecimal()]
    if not metrics or (not numbers and any(map(IN_ENTITY.fullmatch, inside))):
        return
    advice = "other tags are measured by task.metrics = ['accuracy']"
    if numbers:
        advice = "say their names in order, such as task.classes = ['O', 'B-PER', 'I-PER']"
    found = f"needs tags such as O, B-PER and I-PER, and there is {shown((numbers or inside)[0])}"
    raise DataError(f"{examples.source}: {metrics[0]} {found}; {advice}")


def head_options(task: Task, classes: Sequence[str]) -> dict[str, Any]:
    """What transformers' configuration says of the head."""
    if task.kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    options: dict[str, Any] = {}
    if classes:
        options["id2label"] = dict(enumerate(classes))
        options["label2id"] = {name: index for index, name in enumerate(classes)}
    if task.kind == "classification":
        options["problem_type"] = "single_label_classification"
    return options
