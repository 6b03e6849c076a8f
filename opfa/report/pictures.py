"""Pictures of runs, of checkpoints and of two compared; readers with colour-blindness can tell the
colours apart (Okabe and Ito's).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opfa.extras import importing
from opfa.report.curves import Plan, series, smoothed
from opfa.report.logged import Row, by_kind
from opfa.report.search_page import Tried
from opfa.sparsity.anatomy import layer_labels, short_kinds
from opfa.storage.files import new_directory, new_file

with importing("drawing a picture", "opfa[plots]"):
    import matplotlib

    matplotlib.use("Agg")  # files only; needs no display
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"
COLOURS = (BLUE, GREEN, "#E69F00", GREY, ORANGE)
ALL = "whole layer"
LOSSES = {
    "mlm_loss": "Masked-token loss, nats a token",
    "hidden_loss": "Hidden states' squared distance",
}
NAMES = {"front": "front", "even": "even models", "whole": "whole model"}  # of a search
FEW = 40  # points that are drawn as such


def pretraining_pictures(
    rows: Sequence[Row], metric: str, sparsity: Mapping[str, Any], directory: Path, plan: Plan
) -> None:
    """Draw loss and sparsity against step, the learning rate, and the sparsity of each tensor."""
    with new_directory(directory, is_new=False) as work:
        loss_picture(rows, metric, work / "loss.png")
        _rates_and_sparsity(plan, sparsity, work)


def loss_picture(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Draw one of `LOSSES`: of each batch, their mean over a twentieth of the run, and held out."""
    training, evaluations = by_kind(rows)
    figure, axes = _axes("Loss and sparsity", "Step", LOSSES[metric])
    steps, losses = series(training, metric)
    width, middles, means = smoothed(steps, losses)
    alpha = 0.35 if means else 1.0
    _line(axes, steps, losses, color=BLUE, linewidth=0.9, alpha=alpha, label="training, a batch")
    if means:
        axes.plot(middles, means, color=BLUE, label=f"mean of {width}")
    axes.plot(*series(evaluations, metric), "o-", color=GREEN, markersize=4, label="held out")
    if any(row.get("sparsity") for row in training):
        right = axes.twinx()
        steps, shares = series(training, "sparsity")
        percent = [100 * share for share in shares]
        right.plot(steps, percent, color=ORANGE, drawstyle="steps-post", label="sparsity")
        right.set_ylim(0, 100)
        right.set_ylabel("Sparsity, %", color=ORANGE)
        right.spines["top"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def finetuning_pictures(
    rows: Sequence[Row], sparsity: Mapping[str, Any], directory: Path, plan: Plan
) -> None:
    """Draw loss and metrics against step, the learning rate, and the sparsity of each tensor."""
    training, evaluations = by_kind(rows)
    figure, axes = _axes("Training loss and held-out results", "Step", "Training loss of a batch")
    _line(axes, *series(training, "loss"), color=BLUE, linewidth=0.9)
    if evaluations:
        right = axes.twinx()
        metric = next(key for key, value in evaluations[0].items() if isinstance(value, float))
        before = [row for row in evaluations if not row.get("final")]
        final = [row for row in evaluations if row.get("final")]
        right.plot(*series(before, metric), "o-", color=GREEN, markersize=4)
        right.plot(*series(final, metric), "*", color=GREEN, markersize=9)
        right.set_ylabel(f"Held-out {metric} (star: finished)", color=GREEN)
        right.spines["top"].set_visible(False)
    with new_directory(directory, is_new=False) as work:
        _save(figure, work / "loss.png")
        _rates_and_sparsity(plan, sparsity, work)


def _rates_and_sparsity(plan: Plan, sparsity: Mapping[str, Any], directory: Path) -> None:
    """Draw the learning rate of each step, and a bar for each pruned tensor, if there are any."""
    figure, axes = _axes("Learning rate of each step", "Step", "Learning rate")
    _line(axes, range(1, len(plan.learning_rate) + 1), plan.learning_rate, color=BLUE)
    axes.set_ylim(bottom=0)
    _save(figure, directory / "learning_rate.png")
    tensors = sparsity["tensors"]
    if not tensors:
        return
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.16 * len(tensors)), layout="constrained")
    axes.set_title("Sparsity of each pruned matrix", fontsize=11, loc="left")
    values = [100 * tensor["sparsity"] for tensor in tensors.values()]
    axes.barh([name.removesuffix(".weight") for name in tensors], values, color=BLUE, height=0.75)
    total = 100 * sparsity["total"]["sparsity"]
    axes.axvline(total, color=ORANGE, linewidth=1)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"Sparsity, % (line: all together, {total:.2f} %)")
    axes.tick_params(axis="y", labelsize=6)
    _tidy(axes)
    _save(figure, directory / "sparsity.png")


def sweep_picture(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Draw a metric against the learning rate, with its deviation over seeds."""
    figure, axes = _axes(f"Held-out {metric} by learning rate", "Learning rate", metric)
    rates, means = [row["learning_rate"] for row in rows], [row["mean"][metric] for row in rows]
    deviations = [row["std"][metric] or 0.0 for row in rows]
    axes.errorbar(rates, means, deviations, fmt="o-", color=BLUE, capsize=3)
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)
    _save(figure, path)


def quickstart_picture(rows: Sequence[Row], path: Path) -> None:
    """Draw one bar per model: its accuracy, and its encoder's loss before fine-tuning."""
    figure, (left, right) = plt.subplots(
        ncols=2, figsize=(9, 1.2 + 0.42 * len(rows)), sharey=True, layout="constrained"
    )
    figure.suptitle("What the quickstart trained", fontsize=11)
    names = [row["model"] for row in rows]
    colours = [ORANGE if "prune-once" in name else GREY for name in names]
    bars = left.barh(names, [row["accuracy"] for row in rows], color=colours)
    left.bar_label(bars, fmt="%.3f", padding=3)
    left.invert_yaxis()
    left.set_xlim(0, 1)
    left.set_xlabel("Accuracy on held-out chapters, share")
    losses = [row.get("mlm_loss") for row in rows]
    bars = right.barh(names, [loss or 0.0 for loss in losses], color=colours)
    right.bar_label(bars, [f"{loss:.2f}" if loss else "" for loss in losses], padding=3)
    right.margins(x=0.15)
    right.set_xlabel("MLM loss before fine-tuning, nats a token (lower is better)")
    for axes in (left, right):
        _tidy(axes)
    _save(figure, path)


def inspection_picture(name: str, result: Mapping[str, Any], path: Path) -> None:
    """Draw the sparsity of each kind of matrix in each layer, in percent."""
    rows = [{**row["kinds"], ALL: row["sparsity"]} for row in result["layers"]]
    encoder, whole, sizes = result["encoder"], result["whole"], result["sizes"]
    at_least = ""
    if sizes["limit"] is not None:
        limit = f"{sizes['limit'] / 1e6:,.1f} MB"
        at_least = f"; the zeros' places and the other values at least {limit}"
    below = (
        f"{encoder['sparsity']:.2%} of the {encoder['size'] / 1e6:,.1f} M weights in the layers' "
        f"matrices are zero, {whole['sparsity']:.2%} of all {whole['size'] / 1e6:,.1f} M.\n"
        f"As dense tensors {sizes['dense'] / 1e6:,.1f} MB, in files {sizes['file'] / 1e6:,.1f} MB"
        f"{at_least}."
    )
    figure = _heat_map(rows, result["layers"], f"{name}\nsparsity of each matrix, %", below)
    _save(figure, path)


def comparison_picture(result: Mapping[str, Any], path: Path) -> None:
    """Draw for two checkpoints, before and after, how much of each matrix has another mask."""
    rows = [row["kinds"] for row in result["layers"]]
    most = max(share for row in rows for share in row.values())
    title = f"from {result['a']} to {result['b']}\nweights whose mask changed, %"
    below = result["summary"].replace("; ", ";\n")
    _save(_heat_map(rows, result["layers"], title, below, limit=most or 1.0), path)


def latency_picture(
    curves: Mapping[str, Mapping[str, Mapping[str, float]]], title: str, path: Path
) -> None:
    """Draw milliseconds for each engine, by sparsity (0..1) and by tokens, whichever is there.

    `curves` are {"sparsity": {engine: {sparsity: ms}}, "tokens": {engine: {tokens: ms}}}.
    """
    figure, all_axes = plt.subplots(
        ncols=len(curves), figsize=(1 + 4.5 * len(curves), 4), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=11)
    for axes, (what, engines) in zip(all_axes.flat, curves.items(), strict=True):
        is_sparsity = what == "sparsity"
        for (engine, points), colour in zip(engines.items(), COLOURS, strict=False):
            values = [(100 if is_sparsity else 1) * float(value) for value in points]
            axes.plot(values, points.values(), "o-", color=colour, markersize=4, label=engine)
        if not is_sparsity:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yscale("log", subs=(2, 5))  # what is labelled between powers of ten
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("Zeros in the encoder's layers, %" if is_sparsity else "Tokens (log)")
        axes.set_ylabel("Milliseconds (log)")
        _tidy(axes)
        axes.grid(axis="y", color=GREY, alpha=0.2)
    handles, labels = all_axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def front_picture(
    result: Mapping[str, Any], tried: Tried, cost: str, path: Path, unit: float, label: str
) -> None:
    """Draw a search: its metric against a cost, on the examples that chose and on fresh ones, with
    all that was judged and with models whose layers are all alike.
    """
    figure, (left, right) = plt.subplots(ncols=2, figsize=(9, 4), sharey=True, layout="constrained")
    judged = [unit * costs[cost] for costs, _ in tried], [metric for _, metric in tried]
    left.scatter(*judged, color=GREY, s=9, alpha=0.5, label="judged")
    styles = {"front": ("o-", BLUE), "even": ("s--", ORANGE), "whole": ("*", GREEN)}
    for axes, key, which in ((left, "held_out", "held-out"), (right, "fresh", "fresh")):
        for name, (style, colour) in styles.items():
            found = [result[name]] if name == "whole" else result[name]
            points = sorted((unit * point["costs"][cost], point[key]) for point in found)
            x, y = [x for x, _ in points], [y for _, y in points]
            axes.plot(x, y, style, color=colour, markersize=5, label=NAMES[name])
        axes.set_title(f"By {which} examples", fontsize=11, loc="left")
        axes.set_xlabel(label)
        _tidy(axes)
    left.set_ylabel(result["metric"].replace("_", " "))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    _save(figure, path)


def _heat_map(
    rows: Sequence[Row], layers: Sequence[Row], title: str, below: str, limit: float = 1.0
) -> Figure:
    """One cell for each layer and kind of matrix, empty where there is none; texts around it."""
    width, height = max(6.5, 1.2 + 0.95 * len(rows[0])), 2.0 + 0.27 * len(rows)  # inches
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    longest = max(map(len, f"{title}\n{below}".splitlines()))
    size = min(11.0, 120 * width / longest)  # points; a letter is about 0.6 as wide as high
    figure.suptitle(title, fontsize=size, linespacing=1.4)
    figure.supxlabel(below, fontsize=min(9.0, size), linespacing=1.4)
    names = short_kinds(kind for row in rows for kind in row if kind != ALL)
    kinds = {**names, **({ALL: ALL} if ALL in rows[0] else {})}
    values = np.array([[row.get(kind, np.nan) for kind in kinds] for row in rows])
    axes.imshow(values, cmap="Blues", vmin=0, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value > 0.55 * limit else "black"  # readable on its cell
            text = f"{100 * value:.2f}"
            shown = axes.text(column, row, text, ha="center", va="center", color=colour, size=8)
            shown.set_in_layout(False)  # it lies in its cell; measuring all of them takes seconds
    axes.set_xticks(range(len(kinds)), list(kinds.values()))
    labels = layer_labels([(row["stack"], row["layer"]) for row in layers])
    axes.set_yticks(range(len(rows)), [f"layer {label}" for label in labels])
    axes.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
    axes.set_xticks(np.arange(len(kinds) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    if ALL in kinds:
        axes.axvline(len(kinds) - 1.5, color="white", linewidth=8)
    axes.spines[:].set_visible(False)
    return figure


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """Draw a line; few points are drawn as points too, and one alone is seen."""
    axes.plot(x, y, marker="o" if len(x) <= FEW else None, markersize=3.5, **style)


def _axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    axes.set_title(title, fontsize=11, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=x_label == "Step"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=GREY, alpha=0.2)


def _save(figure: Figure, path: Path) -> None:
    try:
        with new_file(path) as work:
            figure.savefig(work, dpi=120, format="png")
    finally:
        plt.close(figure)
