"""Benchmarks that users can repeat: a mask update at BERT-base's size, and a step under a teacher
whose logits are kept (every step after the first epoch) or computed anew. Times are medians. Extra
memory is how far the updates raise the peak, masks included.
"""

import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opfa.bench.measure import in_a_process, peak_of_host, timed
from opfa.bench.standard import SPECIAL, vocabulary
from opfa.compression.selection import magnitude_mask, num_zeros, select
from opfa.downstream.finetune import Trainer
from opfa.downstream.recipe import FinetuneRecipe
from opfa.models.configs import new_config, wordpiece_tokenizer
from opfa.models.encoders import write_model
from opfa.report.tables import Result, Row, Table, column
from opfa.tasks.kinds import KINDS
from opfa.training.loop import accumulate

SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]  # one BERT-base layer
NUM_LAYERS = 12
SPARSITY = 0.9
REPEATS = 5
NUM_EXAMPLES, NUM_WORDS, BATCH = 8, 126, 4
VOCABULARY = vocabulary(len(SPECIAL) + 64)
TEACHERS = {  # the student has the first shape too
    "BERT-base": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
    "BERT-large": {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096},
}


class Scope(Row):
    """A mask update per layer, or with one threshold for all."""

    scope: str
    seconds: float = column("seconds (median)", ".2f")
    extra_bytes: int = column("extra memory, GB", ".2f", 1e-9)
    is_exact: bool = column("zeros exact")


class MaskUpdates(Result):
    """What `opfa bench masks` finds."""

    weights: int
    sparsity: float
    threads: int
    scopes: list[Scope]

    def parts(self, *, is_long: bool = False) -> Iterator[Table]:
        """One line for each scope."""
        yield Table.of("scope", {row.scope: row for row in self.scopes})


class TeacherStep(Row):
    """A step with the teacher's logits kept, and computed anew."""

    teacher: str
    kept: float = column("seconds, kept", ".2f")
    anew: float = column("seconds, anew", ".2f")
    ratio: float = column("ratio", ".2f")


class TeacherSteps(Result):
    """What `opfa bench distillation` finds."""

    batch: int
    tokens: int
    threads: int
    rows: list[TeacherStep]

    def parts(self, *, is_long: bool = False) -> Iterator[Table]:
        """One line for each teacher."""
        yield Table.of("teacher's shape", {row.teacher: row for row in self.rows})


def bench_masks() -> MaskUpdates:
    """Measure a mask update over 12 BERT-base layers, per layer and global."""
    return MaskUpdates(
        weights=NUM_LAYERS * sum(rows * columns for rows, columns in SHAPES),
        sparsity=SPARSITY,
        threads=torch.get_num_threads(),
        scopes=[in_a_process(_bench_scope, scope) for scope in ("layer", "global")],
    )


def _bench_scope(scope: Any) -> Scope:  # Any: one of Pattern's scopes
    random = torch.Generator().manual_seed(0)
    weights = {
        f"layer.{layer}.{index}.weight": torch.randn(shape, generator=random).mul_(0.02)
        for layer in range(NUM_LAYERS)
        for index, shape in enumerate(SHAPES)
    }
    masks: dict[str, Tensor] = {}

    def update() -> None:
        masks.clear()  # the last round's
        scores = {name: weight.abs() for name, weight in weights.items()}
        masks.update(select(scores, SPARSITY, scope))

    magnitude_mask(torch.randn(64, 64), 9)  # what libraries allocate once
    before = peak_of_host()
    seconds = statistics.median(timed(update) for _ in range(REPEATS))
    extra = peak_of_host() - before
    groups = [list(weights)] if scope == "global" else [[name] for name in weights]
    is_exact = all(
        sum(masks[name].numel() - int(masks[name].sum()) for name in group)
        == num_zeros(SPARSITY, sum(weights[name].numel() for name in group))
        for group in groups
    )
    return Scope(scope=scope, seconds=seconds, extra_bytes=extra, is_exact=is_exact)


def bench_distillation() -> TeacherSteps:
    """Measure a step of a student of BERT-base's shape, but for the vocabulary, by teacher."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _write_examples(directory / "examples.jsonl")
        for teacher, shape in TEACHERS.items():
            _write_classifier(directory / teacher, shape)
            kept, anew = _seconds_of_a_step(directory, teacher)
            rows.append(TeacherStep(teacher=teacher, kept=kept, anew=anew, ratio=anew / kept))
    threads = torch.get_num_threads()
    return TeacherSteps(batch=BATCH, tokens=NUM_WORDS + 2, threads=threads, rows=rows)


def _write_examples(path: Path) -> None:
    choose, words = random.Random(0), list(VOCABULARY)[len(SPECIAL) :]
    texts = (" ".join(choose.choices(words, k=NUM_WORDS)) for _ in range(NUM_EXAMPLES))
    rows = [json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(rows))


def _write_classifier(directory: Path, shape: dict[str, int]) -> None:
    tokenizer = wordpiece_tokenizer(VOCABULARY, lowercase=True, tokens=NUM_WORDS + 2)
    size = len(VOCABULARY)
    values = {"model_type": "bert", "num_attention_heads": 16, "vocab_size": size, **shape}
    torch.manual_seed(0)
    model = KINDS["classification"].head.from_config(new_config(values))
    write_model(model, tokenizer, directory)


def _seconds_of_a_step(directory: Path, teacher: str) -> tuple[float, float]:
    """Medians over steps taken in turn, with the teacher's logits kept and computed anew."""
    examples = str(directory / "examples.jsonl")
    task = {"text": "text", "sequence_tokens": NUM_WORDS + 2}
    logits = directory / f"{teacher}-logits"
    steps = []
    for cache in (True, False):
        values = {
            "name": "bench",
            "model": {"init": str(directory / "BERT-base"), "zeros": "free"},
            "task": {"train": examples, "validation": examples, **task},
            "training": {"epochs": 100.0, "batch": BATCH, "learning_rate": 1e-5},
            "distillation": {"teacher": str(directory / teacher), "cache": cache},
        }
        trainer = Trainer(FinetuneRecipe.check(values))
        assert trainer.teacher is not None
        trainer.teacher.remember(trainer.data.train, logits, trainer.precision)
        trainer.student.train()
        steps.append(_steps(trainer))
    for step in steps:
        step()  # what libraries allocate once
    rounds = [[timed(step) for step in steps] for _ in range(REPEATS)]
    kept, anew = zip(*rounds, strict=True)
    return statistics.median(kept), statistics.median(anew)


def _steps(trainer: Trainer) -> Callable[[], object]:
    batches = enumerate(trainer.batches(0))

    def step() -> None:
        index, batch = next(batches)
        trainer.optimize(index, trainer.schedule.at(index), accumulate(trainer, batch))

    return step
