"""Searches in a dense model: NSGA-II against random, points against even models, and the times.

python recipes/minilm/search.py DENSE FIT HELD VALIDATION WORK RESULTS.json [EVALUATIONS]

DENSE is a model that was fine-tuned for SST-2 on FIT, without the sentences of HELD (`split.py`).
The search judges by some of HELD and measures its front by the others. VALIDATION is the file on
which models that are taken are measured once. The same command goes on where it stopped.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import opfa
from opfa.search.recipe import SearchRecipe
from opfa.search.results import SearchResult

RECIPE = Path(__file__).with_name("minilm-search.toml")
SEEDS = (1, 2, 3)
SAMPLERS: dict[str, dict[str, Any]] = {  # the first one of each seed is what the others compare to
    "NSGA-II": {},
    "random": {"search.sampler": "random", "search.seeds": 0, "search.even": False},
    "random, from the same start": {"search.sampler": "random"},
}
ONCE = "random, from the same start"  # a control, of the first seed alone
TAKEN = 3


def samplers_table(results: Mapping[str, Any]) -> str:
    """One line for each seed: hypervolumes, and the seconds of NSGA-II."""
    head = ("seed", *SAMPLERS, "points", "minutes")
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for seed in SEEDS:
        rows = {row["sampler"]: row for row in results["searches"] if row["seed"] == seed}
        found = [rows.get(name) for name in SAMPLERS]
        volumes = [f"{row['hypervolume']:.4f}" if row else "" for row in found]
        first = rows["NSGA-II"]
        minutes = f"{first['seconds'] / 60:.1f}" if first["seconds"] else ""
        lines.append((str(seed), *volumes, str(first["points"]), minutes))
    return _lines(lines)


def points_table(results: Mapping[str, Any]) -> str:
    """One line for each point of the first seed's front, with both numbers and both times."""
    head = ("point", "held out", "fresh", "ms", "measured", "MACs", "layers", "heads", "neurons")
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    whole = results["whole"]
    for name, row in _named(results):
        shape = row["shape"]
        units = (sum(shape["layers"]), sum(shape["heads"]), f"{sum(shape['neurons']):,}")
        share = row["costs"]["macs"] / whole["costs"]["macs"]
        times = f"{row['costs']['milliseconds']:.2f}", f"{row['measured']:.2f}"
        scores = f"{row['held_out']:.4f}", f"{row['fresh']:.4f}"
        lines.append((name, *scores, *times, f"{share:.1%}", *map(str, units)))
    return _lines(lines)


def even_table(results: Mapping[str, Any]) -> str:
    """For each even model the cheapest point that is as good on the held-out sentences."""
    head = ("even model", "its ms", "its accuracy", "point", "ms", "accuracy", "times as fast")
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for even, point in pairs(results):
        shape = even["shape"]
        name = f"{shape['heads'][0]} heads, {shape['neurons'][0]:,} neurons a layer"
        scores = [f"{each['held_out']:.4f} ({each['fresh']:.4f})" for each in (even, point)]
        times = [each["measured"] for each in (even, point)]
        ratio = f"{times[0] / times[1]:.2f}"
        cells = (f"{times[0]:.2f}", scores[0], f"{point['number']:04}", f"{times[1]:.2f}")
        lines.append((name, *cells, scores[1], ratio))
    return _lines(lines)


def taken_table(results: Mapping[str, Any]) -> str:
    """What was trained on: points, and an even model."""
    head = ("model", "ms, measured", "fresh, before", "validation, trained on")
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for row in results["taken"]:
        scores = f"{row['fresh']:.4f}", f"{row['validation']:.4f}"
        lines.append((row["model"], f"{row['measured']:.2f}", *scores))
    return _lines(lines)


def _lines(lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(results: Mapping[str, Any]) -> str:
    """All of them, as they stand in README.md."""
    found = (samplers_table, points_table, even_table, taken_table)
    return "\n\n".join(table(results) for table in found)


def _named(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "whole", results["whole"]
    yield from ((f"{row['number']:04}", row) for row in results["front"])


def pairs(
    results: Mapping[str, Any],
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each even model with the cheapest point that is as good on the held-out sentences."""
    for even in results["even"]:
        good = [point for point in results["front"] if point["held_out"] >= even["held_out"]]
        if good:
            yield even, min(good, key=lambda point: point["costs"]["milliseconds"])


def largest_error(results: Mapping[str, Any]) -> float:
    """How far a predicted time is from the measured one, at most, as a share."""
    rows = [row for _, row in _named(results)] + list(results["even"])
    return max(abs(row["costs"]["milliseconds"] / row["measured"] - 1) for row in rows)


def main(
    dense: str,
    fit: str,
    held: str,
    validation: str,
    work: str,
    results: str,
    evaluations: str = "200",
) -> None:
    """Search by each sampler and seed, take points, and write what was found."""
    file, changes = Path(results), {"model.init": dense, "distillation.teacher": dense}
    changes |= {"task.train": fit, "task.validation": validation, "search.data": held}
    searches: list[dict[str, Any]] = []
    for name, more in SAMPLERS.items():
        for seed in SEEDS[:1] if name == ONCE else SEEDS:
            every = {**changes, **more, "seed": seed, "search.evaluations": int(evaluations)}
            words = [f"{key}={json.dumps(value)}" for key, value in every.items()]
            first = Path(work, f"NSGA-II-{seed}")
            output = Path(work, f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
            found, seconds = _searched(SearchRecipe.read(RECIPE, words), output, first)
            row = {"seed": seed, "sampler": name, "hypervolume": found.hypervolume}
            searches.append({**row, "points": len(found.front), "seconds": seconds})
            file.write_text(json.dumps({"searches": searches}, indent=2) + "\n")
    output = Path(work, f"NSGA-II-{SEEDS[0]}")
    found = opfa.search_models(output / "recipe.toml", output, resume=True, take=TAKEN)
    rows = found.model_dump(mode="json")
    kept = {name: rows[name] for name in ("whole", "front", "even")}
    taken = [*_taken(found), _even(found, Path(work, "even"))]
    file.write_text(json.dumps({"searches": searches, **kept, "taken": taken}, indent=2) + "\n")
    shutil.copy(output / "report/front.png", file.with_name("search.png"))
    print(tables(json.loads(file.read_text())))


def _searched(recipe: SearchRecipe, output: Path, first: Path) -> tuple[SearchResult, float | None]:
    """A search whose costs are those of the first one with its seed; and how long it took, unless
    it was interrupted.
    """
    clock, is_whole = output / "seconds.json", not output.exists()
    if output != first and not output.exists():
        output.mkdir(parents=True)
        shutil.copytree(first / "prepared", output / "prepared")
        shutil.copy(first / "environment.json", output / "environment.json")
        (output / "recipe.toml").write_text(recipe.to_toml())
    start = time.perf_counter()
    found = opfa.search_models(recipe, output, resume=(output / "recipe.toml").exists())
    if not clock.exists():
        seconds = time.perf_counter() - start if is_whole else None
        clock.write_text(json.dumps(seconds))
    return found, json.loads(clock.read_text())


def _taken(found: SearchResult) -> Iterator[dict[str, Any]]:
    points = {point.number: point for point in found.front}
    for each in found.taken:
        point, value = points[each.number], each.metrics[found.metric]
        row = {"model": f"point {each.number:04}", "validation": value}
        yield {**row, "measured": point.measured, "fresh": point.fresh}


def _even(found: SearchResult, output: Path) -> dict[str, Any]:
    """The even model that is as fast as the middle one of those that were taken, trained on too."""
    points = {point.number: point for point in found.front}
    middle = points[sorted(each.number for each in found.taken)[len(found.taken) // 2]]
    even = min(found.even, key=lambda each: abs(each.measured - middle.measured))
    recipe = SearchRecipe.read(found.directory / "recipe.toml")
    overrides = {"search.point": even.shape.model_dump(mode="json")}
    made = opfa.search_models(recipe, output, overrides, resume=(output / "recipe.toml").exists())
    shape, value = even.shape, made.taken[0].metrics[found.metric]
    name = f"even: {shape.heads[0]} heads, {shape.neurons[0]:,} neurons a layer"
    return {"model": name, "validation": value, "measured": even.measured, "fresh": even.fresh}


if __name__ == "__main__":
    main(*sys.argv[1:])
