"""Benchmark of upstream training: a recipe's step by part, and against the same step written
plainly.

    ours        the recipe as it is
    no teacher  without [distillation]
    dense       without [distillation] and [pruning]
    plain       transformers and autocast as one would write them: fp32 weights cast at every step,
                all logits kept, a hook that multiplies weights by their masks, torch's AdamW

Each runs in a process of its own, one step at a time and in turn, so that ratios hold when the
machine's speed drifts; after each round the machine's rate in matrix products is measured. Masks
are at the target from the start. Without a recipe it is BERT-base with 8 x 128 random tokens.
"""

import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional

from opfa.bench_plain import Plain
from opfa.clock import Clock, wait_for_gpu
from opfa.distill import Scales, VocabularyLoss
from opfa.distributed import Supervisor
from opfa.engine import choose_accelerator, start_distributed
from opfa.models import (
    new_pretraining_model,
    wordpiece_tokenizer,
    write_model,
)
from opfa.plan import operations, shape_of
from opfa.recipe import RunError
from opfa.run import environment
from opfa.upstream.batches import Prepared, training_steps
from opfa.upstream.corpus import FORMAT, tokenizer_digest
from opfa.upstream.objective import Counts
from opfa.upstream.pretrain import DTYPES, Trainer, order_of
from opfa.upstream.recipe import PretrainRecipe
from opfa.upstream.segments import EXAMPLE

WARMUP = 2  # steps of each variant before the measured ones
SIDE = {"cpu": 4096, "cuda": 8192}  # of the square matrices whose product is timed
LOSS_SHAPE = (4096, 768, 30_522)  # tokens, hidden, vocabulary: 8 x 512 tokens of BERT-base
LOADER_SECONDS = 1.0
STANDARD: dict[str, Any] = {
    "name": "bench",
    "corpus": {"documents": ["random"], "objective": "mlm", "tokenizer": "random"},
    "model": {"config": {"model_type": "bert", "vocab_size": 30_522}},
    "training": {"steps": 10**6, "batch": 8, "learning_rate": 1e-5},
    "pruning": {
        "schedule": {"end": 50_000, "hold_until": 80_000, "every": 1_000, "target": 0.9},
    },
    "distillation": {"teacher": "random"},
}
Results = dict[str, Any]


def bench_train(recipe: PretrainRecipe | None, overrides: Sequence[str], rounds: int) -> Results:
    """Seconds by part, tokens a second, share of the machine's rate, peak memory; and ratios.

    `overrides` are of the standard recipe, if `recipe` is none.
    """
    with tempfile.TemporaryDirectory() as name:
        if recipe is None:
            recipe = _standard(Path(name), overrides)
        names = ["ours"]
        if recipe.distillation is not None and recipe.pruning is not None:
            names.append("no teacher")
        if recipe.distillation is not None or recipe.pruning is not None:
            names.append("dense")
        names.append("plain")
        with _Variants(recipe, names) as variants:
            seconds, rates = variants.measure(rounds)
            facts = variants.facts(rounds)
        work = operations(shape_of(recipe), recipe.training.batch)
    ours, medians = facts["ours"], {name: statistics.median(seconds[name]) for name in names}
    tokens = recipe.training.batch * recipe.corpus.sequence_tokens
    work *= ours["real_tokens"] / tokens  # nothing is gained by padding
    rate = statistics.median(rates)
    every = recipe.pruning.schedule.every if recipe.pruning else 0
    return {
        "machine": environment()["machine"],
        "threads": torch.get_num_threads(),
        "model": recipe.model.model_dump(exclude_none=True),
        "batch": recipe.training.batch,
        "sequence_tokens": recipe.corpus.sequence_tokens,
        "real_tokens": ours["real_tokens"],
        "precision": recipe.training.precision,
        "rounds": rounds,
        "variants": {
            name: {
                "seconds": medians[name],
                "fastest": min(seconds[name]),
                "slowest": max(seconds[name]),
                "peak_bytes": facts[name]["peak_bytes"],
                "library_bytes": facts[name]["library_bytes"],
            }
            for name in names
        },
        "seconds_by_part": ours["parts"],
        "tokens_per_second": ours["real_tokens"] / medians["ours"],
        "flops_per_step": work,
        "matrix_flops_per_second": rate,
        "share_of_matrix_rate": work / medians["ours"] / rate,
        "mask_update_share": ours["mask_update"] / (every * medians["ours"]) if every else None,
        "loader_tokens_per_second": ours["loader"],
        "loss_bytes": _in_a_process(_loss_bytes),
        "ratios": _ratios(medians, facts, names),
    }


def _ratios(medians: Mapping[str, float], facts: Results, names: list[str]) -> dict[str, float]:
    peaks = {name: facts[name]["peak_bytes"] for name in names}
    ratios = {
        "ours / plain, time": medians["ours"] / medians["plain"],
        "ours / plain, peak memory": peaks["ours"] / peaks["plain"],
    }
    if "no teacher" in names:
        ratios["ours / no teacher, time"] = medians["ours"] / medians["no teacher"]
        ratios["no teacher / dense, time"] = medians["no teacher"] / medians["dense"]
    return ratios


def _standard(directory: Path, overrides: Sequence[str]) -> PretrainRecipe:
    """BERT-base with random weights, as student and teacher, and random examples."""
    file = directory / "recipe.toml"
    file.write_text(PretrainRecipe.check(STANDARD).to_toml())
    recipe = PretrainRecipe.read(file, overrides)
    assert recipe.model.config is not None
    torch.manual_seed(recipe.seed)
    model = new_pretraining_model(recipe.model.config, recipe.corpus.objective, 0)
    size, tokens = model.config.vocab_size, recipe.corpus.sequence_tokens
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {token: index for index, token in enumerate(special)}
    vocabulary |= {f"word{index}": index for index in range(len(vocabulary), size)}
    tokenizer = wordpiece_tokenizer(vocabulary, lowercase=True, tokens=tokens)
    write_model(model, tokenizer, directory / "model")
    choose = np.random.default_rng(recipe.seed)
    examples = Dataset.from_dict(
        {
            "input_ids": list(choose.integers(len(special), size, (4096, tokens), dtype=np.int32)),
            "second_segment": [tokens] * 4096,
            "next_sentence_label": [-100] * 4096,
        },
        features=EXAMPLE,
    )
    for split in ("train", "validation"):
        examples.save_to_disk(directory / "prepared" / split)
    tokenizer.save_pretrained(directory / "prepared/tokenizer")
    summary = {
        "format": FORMAT,
        "corpus": recipe.corpus.model_dump(mode="json"),
        "tokenizer_sha256": tokenizer_digest(tokenizer),
    }
    (directory / "prepared/corpus.json").write_text(json.dumps(summary))
    path = str(directory / "model")
    values = recipe.model_dump(mode="json", exclude_none=True)
    values |= {"data": str(directory / "prepared"), "model": {"init": path}}
    values["distillation"]["teacher"] = path
    return PretrainRecipe.check(values)


class _Variants:
    """Processes that take a step when they are told to; a context manager."""

    def __init__(self, recipe: PretrainRecipe, names: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._device = choose_accelerator()
        self._dtype = DTYPES[recipe.training.precision]
        self._connections: dict[str, Connection] = {}
        self._processes = []
        for name in names:
            self._connections[name], theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, name, recipe))
            process.start()
            theirs.close()  # so that its end is seen here
            self._processes.append(process)

    def __enter__(self) -> Self:
        for name in self._connections:
            self._ask(name, WARMUP)
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.close()
        for process in self._processes:
            process.join()

    def measure(self, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
        """Seconds of each variant's steps, and the machine's rate in products, round by round."""
        seconds: dict[str, list[float]] = {name: [] for name in self._connections}
        rates = []
        for _ in range(rounds):
            for name in seconds:
                seconds[name] += self._ask(name, 1)
            rates.append(_matrix_rate(self._device, self._dtype))
        return seconds, rates

    def facts(self, rounds: int) -> dict[str, Results]:
        """What each variant found out about itself, ours in `rounds` more steps."""
        return {name: self._ask(name, -rounds) for name in self._connections}

    def _ask(self, name: str, steps: int) -> Any:  # Any: what a variant sends
        try:
            self._connections[name].send(steps)
            return self._connections[name].recv()
        except (EOFError, OSError) as error:
            raise RunError(f"{name}: this variant's process ended; its output says why") from error


def _matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second in the product of two large square matrices."""
    side = SIDE[device]
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    functional.linear(a, b)
    seconds = []
    for _ in range(3):
        wait_for_gpu()
        start = time.perf_counter()
        functional.linear(a, b)
        wait_for_gpu()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def _serve(connection: Connection, name: str, recipe: PretrainRecipe) -> None:
    """Take as many steps as asked for, and send their seconds; for a negative number, facts."""
    library_bytes = _peak_bytes()
    variant = Plain(recipe) if name == "plain" else Ours(variant_of(recipe, name))
    try:
        while True:
            num_steps = connection.recv()
            if num_steps > 0:
                connection.send([_timed(variant.step) for _ in range(num_steps)])
            else:
                peaks = {"peak_bytes": _peak_bytes(), "library_bytes": library_bytes}
                is_ours = name == "ours"
                facts = variant.facts(-num_steps) if isinstance(variant, Ours) and is_ours else {}
                connection.send({**peaks, **facts})
    except EOFError:
        return


def _timed(step: Callable[[], None]) -> float:
    wait_for_gpu()
    start = time.perf_counter()
    step()
    wait_for_gpu()
    return time.perf_counter() - start


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def variant_of(recipe: PretrainRecipe, name: str) -> PretrainRecipe:
    """The recipe of a variant, with masks at the target from the start."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    values["training"]["rewind_learning_rate"] = False
    if name != "ours":
        values.pop("distillation", None)
    if name == "dense":
        values.pop("pruning", None)
    if "pruning" in values:
        values["pruning"]["schedule"] = {
            "end": 0,
            "target": values["pruning"]["schedule"]["target"],
        }
    return PretrainRecipe.check(values)


class Ours:
    """A recipe's trainer, step by step."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        """Load what the recipe names; this process alone is the run."""
        device = start_distributed(recipe.launch.timeout_seconds)
        prepared = Prepared.open(Path(recipe.data), recipe.corpus)
        order = order_of(recipe, prepared.lengths(), rank=0, world_size=1)
        self._clock = Clock()
        watch = Supervisor(float("inf"))
        self.trainer = Trainer(recipe, prepared, order, device, watch, self._clock)
        self.trainer.engine.module.train()
        self._has_masks = recipe.pruning is not None
        if self._has_masks:
            self.trainer.prune(0)
        self._batches = self.trainer.batches(0)
        self._tokens: list[int] = []

    def step(self) -> None:
        """One optimizer step."""
        batches = next(self._batches)
        counts = Counts(*(float(sum(c)) for c in zip(*(b.counts() for b in batches), strict=True)))
        losses = self.trainer.accumulate(batches, counts)
        self.trainer.optimize(0, self.trainer.recipe.training.learning_rate, losses)
        self._tokens.append(int(counts.real))

    def facts(self, num_steps: int) -> Results:
        """Seconds by part of a step, of a mask update, and the loader's speed alone."""
        self._clock.is_on = True
        for _ in range(num_steps):
            self.step()
        parts = {name: seconds / num_steps for name, seconds in self._clock.seconds.items()}
        updates = []
        for _ in range(3 if self._has_masks else 0):
            updates.append(_timed(lambda: self.trainer.prune(0)))
        return {
            "parts": parts,
            "mask_update": statistics.median(updates) if updates else None,
            "loader": self._loader_rate(),
            "real_tokens": statistics.mean(self._tokens),
        }

    def _loader_rate(self) -> float:
        """Real tokens a second, loaded in this process."""
        trainer = self.trainer
        steps = training_steps(
            trainer.prepared, trainer.mask, trainer.order, steps=range(10**6), workers=0
        )
        start, tokens = time.perf_counter(), 0
        while time.perf_counter() - start < LOADER_SECONDS:
            tokens += sum(batch.counts()[1] for batch in next(steps))
        return tokens / (time.perf_counter() - start)


def _in_a_process(function: Callable[[], int]) -> int:
    """What a function finds in a process of its own, since a peak never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


def _loss_bytes() -> int:
    """Memory that the loss under a teacher takes at its peak, beside models and features."""
    tokens, hidden, size = LOSS_SHAPE
    device = choose_accelerator()
    numbers = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        empty = torch.empty(shape, device=device, dtype=torch.bfloat16)
        return empty.normal_(generator=numbers)

    layers = [nn.Linear(hidden, 1, device=device, dtype=torch.bfloat16) for _ in range(2)]
    for layer in layers:
        layer.weight, layer.bias = nn.Parameter(random(size, hidden)), nn.Parameter(random(size))
    features = [random(tokens, hidden) for _ in range(2)]
    labels = torch.arange(tokens // 7, device=device)
    weight, bias = layers[0].weight, layers[0].bias
    loss = VocabularyLoss(layers[0])
    for num_tokens in (8, tokens):  # what libraries allocate once comes first
        before = _peak_bytes()
        student = features[0][:num_tokens].detach().requires_grad_()
        teacher = features[1][:num_tokens], layers[1]
        scales = Scales(hard=1e-3, soft=1e-3, temperature=2.0)
        loss(student, labels[: num_tokens // 7], scales, teacher).total.backward()
        weight.grad = bias.grad = None
    return _peak_bytes() - before
