"""Benchmarks that users can repeat: what a mask update costs at BERT-base size, and what a step
under a teacher costs with its logits kept and without: after the first epoch, all steps are so.

Times are medians of several runs. Extra memory is the growth of the peak resident set during the
updates, the masks included; each scope has a process of its own, since a peak never falls.
"""

import itertools
import json
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from opfa.compression.selection import Scope, magnitude_mask, num_zeros, select
from opfa.downstream.finetune import Trainer
from opfa.downstream.recipe import FinetuneRecipe
from opfa.models.configs import new_config, wordpiece_tokenizer
from opfa.models.encoders import write_model
from opfa.tasks.kinds import KINDS
from opfa.training.loop import accumulate

SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]  # one BERT-base layer
NUM_LAYERS = 12
SPARSITY = 0.9
REPEATS = 5
NUM_EXAMPLES, NUM_WORDS, BATCH = 8, 126, 4
WORDS = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=2)]


def bench_masks() -> dict[str, Any]:
    """Seconds and extra bytes of a mask update over 12 BERT-base layers, per layer and global."""
    scopes = []
    for scope in ("layer", "global"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            scopes.append(pool.apply(_bench_scope, (scope,)))
    size = NUM_LAYERS * sum(rows * columns for rows, columns in SHAPES)
    threads = torch.get_num_threads()
    return {"weights": size, "sparsity": SPARSITY, "threads": threads, "scopes": scopes}


def _bench_scope(scope: Scope) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    weights = {
        f"layer.{layer}.{index}.weight": torch.randn(shape, generator=random).mul_(0.02)
        for layer in range(NUM_LAYERS)
        for index, shape in enumerate(SHAPES)
    }
    magnitude_mask(torch.randn(64, 64), 9)  # what libraries allocate once
    before = _peak_bytes()
    seconds, masks = [], {}
    for _ in range(REPEATS):
        masks.clear()  # the last round's are gone
        start = time.perf_counter()
        scores = {name: weight.abs() for name, weight in weights.items()}
        masks = select(scores, SPARSITY, scope)
        seconds.append(time.perf_counter() - start)
    extra = _peak_bytes() - before
    zeros = {name: mask.numel() - int(mask.sum()) for name, mask in masks.items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    if scope == "global":
        is_exact = sum(zeros.values()) == num_zeros(SPARSITY, sum(sizes.values()))
    else:
        is_exact = all(zeros[name] == num_zeros(SPARSITY, sizes[name]) for name in zeros)
    seconds = statistics.median(seconds)
    return {"scope": scope, "seconds": seconds, "extra_bytes": extra, "is_exact": is_exact}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_distillation() -> dict[str, Any]:
    """Seconds of a step under a teacher, with its logits kept and computed anew.

    The student has BERT-base's shape, but for the vocabulary; the teacher that, or BERT-large's.
    """
    student = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072}
    large = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _write_examples(directory / "examples.jsonl")
        _write_classifier(directory / "student", student)
        _write_classifier(directory / "large", large)
        for what, teacher in (("BERT-base", "student"), ("BERT-large", "large")):
            kept, anew = _seconds_of_a_step(directory, teacher)
            rows.append({"teacher": what, "kept": kept, "anew": anew, "ratio": anew / kept})
    batch = {"batch": BATCH, "tokens": NUM_WORDS + 2, "threads": torch.get_num_threads()}
    return {**batch, "rows": rows}


def _write_examples(path: Path) -> None:
    choose = random.Random(0)
    rows = [
        {"text": " ".join(choose.choices(WORDS, k=NUM_WORDS)), "label": i % 2}
        for i in range(NUM_EXAMPLES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_classifier(directory: Path, shape: dict[str, int]) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = wordpiece_tokenizer(vocabulary, lowercase=True, tokens=NUM_WORDS + 2)
    values = {"model_type": "bert", "num_attention_heads": 16, "vocab_size": len(tokens), **shape}
    torch.manual_seed(0)
    model = KINDS["classification"].head.from_config(new_config(values))
    write_model(model, tokenizer, directory)


def _seconds_of_a_step(directory: Path, teacher: str) -> tuple[float, float]:
    """Medians over steps taken in turn, with the teacher's logits kept and computed anew."""
    examples = str(directory / "examples.jsonl")
    task = {"text": "text", "sequence_tokens": NUM_WORDS + 2}
    trainers = []
    for cache in (True, False):
        values = {
            "name": "bench",
            "model": {"init": str(directory / "student"), "zeros": "free"},
            "task": {"train": examples, "validation": examples, **task},
            "training": {"epochs": 100.0, "batch": BATCH, "learning_rate": 1e-5},
            "distillation": {"teacher": str(directory / teacher), "cache": cache},
        }
        trainers.append(Trainer(FinetuneRecipe.check(values)))
    seconds: tuple[list[float], list[float]] = ([], [])
    for trainer in trainers:
        assert trainer.teacher is not None
        path = directory / f"{teacher}-logits"
        trainer.teacher.remember(trainer.data.train, path, trainer.precision)
        trainer.student.train()
    batches = [trainer.batches(0) for trainer in trainers]
    for step in range(1 + REPEATS):
        for trainer, steps, found in zip(trainers, batches, seconds, strict=True):
            start = time.perf_counter()
            trainer.optimize(step, trainer.schedule.at(step), accumulate(trainer, next(steps)))
            found.append(time.perf_counter() - start)
    for found in seconds:
        del found[0]  # libraries allocate once
    return statistics.median(seconds[0]), statistics.median(seconds[1])
