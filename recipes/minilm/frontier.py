"""What each way to a smaller model keeps, takes and weighs: accuracy on SST-2 against milliseconds
on one core and megabytes, as a table and a picture.

python recipes/minilm/frontier.py VALIDATION WORK RESULTS.json DENSE NAME=MODEL ...

Each model is a run for SST-2, measured as it is and, unless it computes in 8 bits already, also
calibrated to 8 bits. All are measured on VALIDATION, once, and timed in one run: 128 tokens in
torch, ONNX Runtime and the runtime of this project, of which the fastest counts.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from onnxruntime import InferenceSession

import opfa
from opfa import runtime
from opfa.bench.contest import Turns
from opfa.bench.measure import timed
from opfa.compression.quant import FILE as RANGES
from opfa.inference.parity import session_options
from opfa.models.configs import load_config
from opfa.releases.rounding import write_weights
from opfa.report.pictures import BLUE, GREEN, GREY, ORANGE
from opfa.training.machine import processor
from opfa.weights.inspection import inspect

TOKENS, ROUNDS, FIRST_ID = 128, 25, 1000
COLOURS = {"torch, fp32": GREY, "torch, 8 bits": GREY, "ONNX Runtime": ORANGE}
COLOURS |= {"ours, fp32": BLUE, "ours, int8": GREEN}
EIGHT_BITS = ", 8 bits"
Row = Mapping[str, Any]


def table(found: Mapping[str, Any]) -> str:
    """One line for each model, the slowest first, in Markdown."""
    lines = ["| model | accuracy | of dense | ms | times as fast | by | MB |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- | ---: |")
    dense = found["rows"][0]
    for row in sorted(found["rows"], key=lambda row: -row["milliseconds"]):
        kept = row["accuracy"] / dense["accuracy"]
        faster = dense["milliseconds"] / row["milliseconds"]
        numbers = f"{row['accuracy']:.4f} | {kept:.1%} | {row['milliseconds']:.1f} | {faster:.1f}"
        lines.append(f"| {row['model']} | {numbers} | {row['engine']} | {row['bytes'] / 1e6:.1f} |")
    return "\n".join(lines)


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Share of dense accuracy against milliseconds; areas are megabytes."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    dense = found["rows"][0]["accuracy"]
    for row in found["rows"]:
        x, y, size = row["milliseconds"], 100 * row["accuracy"] / dense, row["bytes"] / 1e6
        axes.scatter(x, y, 6 * size, COLOURS[row["engine"]], alpha=0.6, linewidths=0)
        label = f"{row['model']}, {size:.0f} MB"
        away = (0, -18 if row["model"].endswith(EIGHT_BITS) else 14)
        axes.annotate(label, (x, y), away, textcoords="offset points", ha="center", fontsize=8)
    axes.set_xscale("log")
    ticks = [5, 7, 10, 15, 20, 30]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.margins(0.18, 0.25)
    axes.set_xlabel(f"milliseconds for {TOKENS} tokens on one core, by the fastest engine")
    axes.set_ylabel("SST-2 accuracy, % of dense")
    axes.set_title("Accuracy kept against time; areas are the files' megabytes")
    for engine in dict.fromkeys(row["engine"] for row in found["rows"]):
        axes.scatter([], [], 60, COLOURS[engine], alpha=0.6, linewidths=0, label=engine)
    axes.legend(title="fastest engine", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def models(work: Path, dense: str, others: Sequence[str]) -> dict[str, Path]:
    """Each model by its name, and what is calibrated of it."""
    found = {}
    for name, _, run in (("dense", "", dense), *(each.partition("=") for each in others)):
        found[name] = Path(run, "model")
        if not (found[name] / RANGES).exists():
            found[name + EIGHT_BITS] = calibrated = work / f"{name.replace(' ', '-')}-int8"
            if not calibrated.exists():
                opfa.calibrate(run, calibrated)
    return found


def engines(name: str, model: Path, work: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What computes one sequence, by the engine's name."""
    size = (1, TOKENS)
    ids = torch.randint(FIRST_ID, load_config(str(model)).vocab_size, size)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(size, dtype=torch.long)}
    file = work / f"{name.replace(' ', '-')}.onnx" / "model.onnx"
    if not file.exists():
        opfa.export(model, file)
    options = session_options()
    options.intra_op_num_threads = 1
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = {each.name for each in session.get_inputs()}
    arrays = {"token_type_ids": np.zeros(size, np.int64)}
    arrays |= {key: value.numpy() for key, value in inputs.items()}
    arrays = {key: value for key, value in arrays.items() if key in names}
    is_8_bits = (model / RANGES).exists()
    plain = opfa.load(model)
    yield "torch, 8 bits" if is_8_bits else "torch, fp32", lambda: plain(**inputs)
    yield "ONNX Runtime", lambda: session.run(None, arrays)
    ours = runtime.load(model, threads=1)
    yield "ours, int8" if is_8_bits else "ours, fp32", lambda: ours(**inputs)


@torch.no_grad()
def one_call(way: Callable[[], object]) -> list[float]:
    """A turn, in seconds."""
    return [timed(way)]


def size_of(model: Path) -> int:
    """Bytes of the weights in a file as it is released: compact where there are zeros."""
    report = inspect(model)
    form = "compact" if report["tensors"] else "dense"
    if (model / RANGES).exists():
        form = "compact-int8"
    with tempfile.TemporaryDirectory() as aside:
        dtype = "fp16" if form == "compact-int8" else "fp32"
        write_weights(model, Path(aside), set(report["tensors"]), form, dtype)
        return sum(file.stat().st_size for file in Path(aside).iterdir())


def main(validation: str, work: str, results: str, dense: str, *others: str) -> None:
    """Measure, and write table and picture."""
    torch.set_num_threads(1)
    place, recipe = Path(work), Path(dense, "recipe.toml")
    place.mkdir(exist_ok=True)
    found = models(place, dense, others)
    ways = {name: dict(engines(name, model, place)) for name, model in found.items()}
    tasks = {f"{n}/{e}": partial(one_call, way) for n in ways for e, way in ways[n].items()}
    turns = Turns().take(tasks, ROUNDS)
    rows = []
    for name, model in found.items():
        by_engine = {engine: turns.median(f"{name}/{engine}") for engine in ways[name]}
        fastest = min(by_engine, key=by_engine.__getitem__)
        score = opfa.evaluate(model, recipe, {"task.validation": validation})
        rows.append(
            {
                "model": name,
                "accuracy": score.metrics["accuracy"],
                "milliseconds": by_engine[fastest],
                "engine": fastest,
                "by_engine": by_engine,
                "bytes": size_of(model),
            }
        )
    written = {"processor": processor(), "tokens": TOKENS, "threads": 1, "rows": rows}
    Path(results).write_text(json.dumps(written, indent=1) + "\n")
    picture(written, Path(results).with_suffix(".png"))
    print(table(written))


if __name__ == "__main__":
    main(*sys.argv[1:])
