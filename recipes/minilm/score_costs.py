"""What each score costs: seconds and memory of one mask update, measured, and what `opfa plan` says
of it for this model and for BERT-base.

python recipes/minilm/score_costs.py MODEL TEXT.jsonl RESULTS.json [SCORE ...]

Each score has a process of its own. Memory is the highest during the update, above what the process
held before; on Linux alone. A score that learns has its cost in each step instead: that of looking
at the gradients, and what it keeps.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from opfa.api.texts import texts_of
from opfa.bench.measure import memory
from opfa.compression.calibration import ROWS, Calibration, Text, hidden_states
from opfa.compression.measured import FromText
from opfa.compression.pattern import Pattern
from opfa.compression.pruner import Pruner
from opfa.compression.schedules import Gradual
from opfa.inference.sequences import Sequences, read_sequences
from opfa.models.configs import load_tokenizer
from opfa.training.machine import processor
from opfa.upstream.formulas import measuring_operations, memory_bytes, shape_of
from opfa.upstream.plan import FILES
from opfa.upstream.recipe import PretrainRecipe

RECIPES = Path(__file__).parents[1]
SCORES = ("magnitude", "activation", "curvature", "fisher", "movement")
BERT = ("model.init=", 'model.config={model_type="bert"}')  # as a configuration, it is BERT-base
RATE = 100e12  # operations a second of the planned GPU
TARGET = 0.9
Found = Mapping[str, Any]


def table(found: Found) -> str:
    """One line for each score, in Markdown."""
    head = ("score", "sequences", "MiniLM, seconds", "MiniLM, MB", "by plan", "BERT-base, seconds")
    lines: list[tuple[str, ...]] = [(*head, "BERT-base, MB")]
    lines.append(("---", *["---:"] * 6))
    for row in found["rows"]:
        numbers = (f"{row['bytes'] / 1e6:,.0f}", f"{row['planned_bytes'] / 1e6:,.0f}")
        base = row["base_seconds"]
        lines.append(
            (
                f"`{row['score']}`" + (", each step" if row["is_learnt"] else ""),
                f"{row['sequences']:,}" if row["sequences"] else "",
                f"{row['seconds']:.3g}",
                *numbers,
                f"{base:.1f}" if base else "",
                f"{row['base_bytes'] / 1e6:,.0f}",
            )
        )
    shown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{shown}\n\nMeasured with {found['threads']} thread(s) of {found['processor']}."


def measured(score: Any, model: PreTrainedModel, sequences: Sequences) -> dict[str, Any]:
    """Seconds and bytes of one update by this score, or of one step of one that learns."""
    is_learnt = score.observes(1)
    text = Text(partial(sequences.first, size=ROWS), hidden_states)
    if is_learnt:
        _backward(model, sequences)  # whatever is trained has gradients
    before = _reset()
    ramp = Gradual(start=2, end=2, target=TARGET) if is_learnt else Gradual(end=0, target=TARGET)
    pruner = Pruner(model, ramp, Pattern(), score=score, calibration=Calibration(model, text))
    if is_learnt:
        _backward(model, sequences)
    start = time.perf_counter()
    if is_learnt:
        pruner.after_backward(1)
    else:
        pruner.after_step(0)
    seconds = time.perf_counter() - start
    return {
        "score": score.kind,
        "sequences": score.sequences if isinstance(score, FromText) else 0,
        "is_learnt": is_learnt,
        "seconds": seconds,
        "bytes": max(0, memory("VmHWM") - before),
    }


def _backward(model: PreTrainedModel, sequences: Sequences) -> None:
    batch = next(iter(sequences.batches(sequences.fitted[:ROWS])))
    torch.stack([state.square().sum() for state in hidden_states(model, batch)]).sum().backward()


def _reset() -> int:
    """Bytes that are held now, from which on the highest counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def planned(name: str, recipe: str, *changes: str) -> tuple[float, float]:
    """Bytes on one GPU beside the training itself, and seconds of one measurement, by the plan."""
    score = f"pruning.pattern.score={name}"
    start = "pruning.schedule.start=1000"  # a score that learns has none before the first step
    shape = shape_of(PretrainRecipe.read(RECIPES / recipe, [score, start, *changes]))
    held = memory_bytes(shape, FILES["zero1"], gpus=1, micro_batch=1)["scores"]
    return held, measuring_operations(shape) / RATE


def row_of(name: str, model: str, text: str) -> dict[str, Any]:
    """A process of its own measures; the plan is made here."""
    command = [sys.executable, __file__, "--one", name, model, text]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    own = (f"model.init={model}", f"distillation.teacher={model}")
    row["planned_bytes"], _ = planned(name, "minilm/minilm-sparse-90.toml", *own)
    row["base_bytes"], row["base_seconds"] = planned(name, "upstream/bert-base-90.toml", *BERT)
    return row


def one(name: str, model: str, text: str, most: int | None = None) -> None:
    """Measure in this process on `most` sequences, by default the score's own, and print a row."""
    score = Pattern.model_validate({"score": name}).score
    if isinstance(score, FromText) and most is not None:
        score = score.model_copy(update={"sequences": most})
    num = score.sequences if isinstance(score, FromText) else ROWS
    loaded = AutoModel.from_pretrained(model).eval()
    texts = texts_of(Path(text), "text", None, None, "train")
    sequences = read_sequences(texts, load_tokenizer(model), loaded, num + num // 8 + 2)
    print(json.dumps(measured(score, loaded, sequences)))


def main(model: str, text: str, results: str, *scores: str) -> None:
    """Measure each score, and write what came out after each."""
    found: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads()}
    found["rows"] = []
    for name in scores or SCORES:
        found["rows"].append(row_of(name, model, text))
        Path(results).write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        name, model, text = sys.argv[2:]
        one(name, model, text)
    else:
        main(*sys.argv[1:])
