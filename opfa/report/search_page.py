"""report/index.html of a search: its front, each point with its shape, and all that was judged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opfa.report.page import render
from opfa.report.run_page import FILE
from opfa.report.tables import Table, figure
from opfa.storage.files import write_text

COSTS = {  # a label, and the unit of what the page draws
    "milliseconds": ("milliseconds", 1.0),
    "macs": ("multiply-adds, millions", 1e-6),
    "bytes": ("megabytes", 1e-6),
}
Tried = Sequence[tuple[Mapping[str, float], float]]  # costs and metric of each model


def write_search_page(
    output: Path, result: Mapping[str, Any], tried: Tried, table: Table, aim: str, recipe: str
) -> None:
    """Write the page of a search, which is `result` in its results.json. `aim` is drawn first."""
    write_text(
        output / FILE, search_page(output.absolute().name, result, tried, table, aim, recipe)
    )


def search_page(
    name: str, result: Mapping[str, Any], tried: Tried, table: Table, aim: str, recipe: str
) -> str:
    """That page."""
    front, whole, metric = result["front"], result["whole"], result["metric"].replace("_", " ")
    best, cheapest = front[0], min(front, key=lambda point: point["costs"][aim])
    values = {
        "name": result["task"],
        "directory": name,
        "metric": metric,
        "cards": [
            ("models judged", f"{result['evaluations']:,}", f"{len(front)} on the front"),
            ("hypervolume", f"{result['hypervolume']:.4f}", "more is better"),
            ("the whole model", figure(whole["fresh"], None), f"{metric} on fresh examples"),
            ("the best point", figure(best["fresh"], None), _saved(best, whole, aim)),
            ("the cheapest point", figure(cheapest["fresh"], None), _saved(cheapest, whole, aim)),
        ],
        "head": list(table.head),
        "rows": [list(row) for row in table.rows],
        "recipe": recipe,
    }
    order = sorted(COSTS, key=lambda cost: cost != aim)
    data = {
        "metric": metric,
        "costs": [{"key": key, "label": COSTS[key][0]} for key in order],
        "tried": [[*_scaled(costs, order), value] for costs, value in tried],
        "whole": _point(whole, order, "the whole model"),
        "front": [_point(point, order, f"{point['number']:04}") for point in front],
        "even": [_point(point, order, "even") for point in result["even"]],
    }
    return render("search", values, data, {})


def _saved(point: Mapping[str, Any], whole: Mapping[str, Any], aim: str) -> str:
    share = point["costs"][aim] / whole["costs"][aim]
    return f"with {share:.0%} of the {COSTS[aim][0].partition(',')[0]}"


def _scaled(costs: Mapping[str, float], order: Sequence[str]) -> list[float]:
    return [float(f"{costs[key] * COSTS[key][1]:.6g}") for key in order]


def _point(point: Mapping[str, Any], order: Sequence[str], name: str) -> dict[str, Any]:
    """What the script shows of a point."""
    shape = point["shape"]
    return {
        "name": name,
        "costs": _scaled(point["costs"], order),
        "measured": point["measured"],
        "held_out": point["held_out"],
        "fresh": point["fresh"],
        "heads": list(shape["heads"]),
        "neurons": list(shape["neurons"]),
        "layers": list(shape["layers"]),
        "inside": inside(shape["zeros"], shape["bits"]),
    }


def inside(zeros: Sequence[float], bits: int) -> str:
    """Zeros of attention + neurons, and 8 bits; empty where matrices are dense, in fp32."""
    shares = " + ".join(f"{share:.0%}" for share in zeros).replace("%", " %")
    found = [f"{shares} zeros"] if any(zeros) else []
    return ", ".join([*found, *(["8 bits"] if bits == 8 else [])])
