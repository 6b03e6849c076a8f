"""The READMEs: short, plain, and every number, link and name in them leads to its source."""

import ast
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from opfa.quickstart.quickstart import Summary
from opfa.report.between import write_between
from opfa.upstream.recipe import PretrainRecipe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "launch/README.md", ROOT / "model_cards/README.md"]
PAGES += [ROOT / "launch/sagemaker/README.md"]
PAGES += sorted([*(ROOT / "recipes").rglob("README.md"), *(ROOT / "opfa").rglob("README.md")])
PAGES += [ROOT / ".github/CONTRIBUTING.md"]
QUICKSTART = json.loads((ROOT / "recipes/quickstart/results.json").read_text())
MOST_WORDS = 35


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: str) -> str:
    """A page with one blank between words."""
    return " ".join((ROOT / page).read_text().split())


def between(page: str, mark: str) -> str:
    """What stands between two marks of a page."""
    text = (ROOT / page).read_text()
    return text.partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- /{mark} -->")[0]


def sentences(text: str) -> list[str]:
    """The sentences outside of code, tables, headings and comments. A list item begins one."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"^ *(\||#).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"`[^`]*`", "code", text)
    blocks = re.split(r"\n\s*\n|\n(?= *(?:[-*]|\d+\.) )", text)
    ends = r"(?<!e\.g)(?<!i\.e)(?<!al)[.!?][)*\"]*\s+"
    found = (re.split(ends, " ".join(block.split())) for block in blocks)
    return [part for parts in found for part in parts if part]


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on a forge."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_has_at_most_150_lines() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_sentences_are_found_outside_of_tables_and_code() -> None:
    text = "# Title\n\n| a | b |\n\n"
    text += "One two. Three `x.y z` (e.g. v2.0 four)! `opfa` five.\n- **Six.** a\n- b"
    expected = ["One two", "Three code (e.g. v2.0 four)", "code five.", "- **Six", "a", "- b"]
    assert sentences(text) == expected


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_sentence_has_more_than_35_words(page: Path) -> None:
    found = sentences(page.read_text())
    words = {part: len(re.findall(r"[^\s*–-]\S*", part)) for part in found}
    assert not {part: num_words for part, num_words in words.items() if num_words > MOST_WORDS}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_each_promise_names_a_test_that_exists() -> None:
    promises = re.findall(r"^\| \*\*.*\| `(\S+)::(\w+)` \|$", README.read_text(), re.MULTILINE)
    assert len(promises) == 7
    for file, name in promises:
        nodes = ast.walk(ast.parse((ROOT / file).read_text()))
        assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_the_map_of_the_code_has_every_room() -> None:
    rooms = {path.parent.name for path in (ROOT / "opfa").glob("*/__init__.py")}
    lines = (ROOT / "opfa/README.md").read_text().splitlines()
    cells = [line.split(" | ")[1] for line in lines if line.startswith("| ") and " | " in line]
    named = {word for cell in cells for word in re.findall(r"^\[?(\w+)\b", cell)}
    assert rooms <= named


def test_the_quickstart_table_is_that_of_its_results() -> None:
    table = Summary.model_validate(QUICKSTART).table().markdown()
    assert between("README.md", "quickstart").strip() == table.strip()
    assert f"took {QUICKSTART['seconds']:,.0f} s on one thread" in text_of("README.md")
    assert QUICKSTART["zeros_held"]
    assert not re.search(r'"(/|\w+/)', json.dumps(QUICKSTART))  # no paths


def test_sentences_about_the_quickstart_say_what_its_results_say() -> None:
    rows = {row["model"]: row for row in QUICKSTART["rows"]}
    text = text_of("opfa/quickstart/README.md")
    ours, one_shot = (rows[f"90 % {name}"]["accuracy"] for name in ("prune-once", "one-shot"))
    lead = round(ours, 3) - round(one_shot, 3)
    assert f"prune-once is {100 * lead:.1f} points ahead of its one-shot twin" in text
    error = 100 * (ours * (1 - ours) / 1_981) ** 0.5
    passages = "1,981 passages of 24 words from held-out chapters, so it has a standard error of"
    assert f"{passages} {error:.1f} points" in text
    size = rows["dense"]["nonzero"]
    for name, row in rows.items():
        if name.startswith("90 %"):
            assert row["sparsity"] == 0.9 and row["nonzero"] == size / 10
    zeros = size * 9 // 10
    page = text_of("opfa/inference/README.md")
    assert f"zeros (the model's: {zeros:,})" in page
    assert f"{zeros + 29:,}, 29 of them rounded" in page


def test_the_accuracy_table_is_that_of_the_released_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OPFA_REWRITE=1 writes it."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes/minilm"))
    script, kept = importlib.import_module("tasks"), 2 + 4  # name, zeros, tasks
    found = json.loads((ROOT / "recipes/minilm/results/tasks.json").read_text())
    cells = [line.split(" | ") for line in script.table(found).splitlines()]
    rows = [row[:kept] for row in cells if "no teacher" not in row[0]]
    table = "\n".join(f"{' | '.join(row)} |" for row in rows)
    if os.environ.get("OPFA_REWRITE"):
        write_between(README, "accuracy", table)
    assert between("README.md", "accuracy").strip() == table


def test_sentences_about_released_models_say_what_their_runs_found() -> None:
    results = ROOT / "recipes/minilm/results"
    vectors, speed, tasks, gpu, frontier = (
        json.loads((results / f"{name}.json").read_text())
        for name in ("embed", "embed_speed", "tasks", "gpu_minutes", "frontier")
    )
    text, dense = text_of("README.md"), vectors[0]
    (ours,) = (row for row in vectors if row["model"].startswith("minilm-embed-sparse-90"))
    spearman = ours["metrics"]["spearman"] / dense["metrics"]["spearman"]
    recall = ours["retrieval"]["recall@10"] / dense["retrieval"]["recall@10"]
    said = f"keeps {spearman:.1%} of all-MiniLM-L6-v2's Spearman on STS-B and {recall:.1%}"
    assert f"{said.replace('%', ' %')} of its recall@10" in text
    times = (speed["milliseconds"]["128"][name] for name in ("ours, int8", "ONNX Runtime, fp32"))
    assert "128 tokens take {:.1f} ms in int8; ONNX Runtime takes {:.1f}".format(*times) in text
    ways = {row["model"]: row for row in frontier["rows"]}
    sparse, int8, whole = (ways[n] for n in ("sparse 90 %", "sparse 90 %, 8 bits", "dense"))
    said = f"takes {sparse['milliseconds']:.1f} ms, in 8 bits {int8['milliseconds']:.1f} and"
    said += f" with {int8['bytes'] / 1e6:.1f} MB; the dense one takes"
    said += f" {whole['milliseconds']:.1f}, with {whole['bytes'] / 1e6:.1f} MB"
    assert said in text
    for method, verb in (("sparse", "keeps {} to {} %"), ("gradual", "same teacher, {} to {} %")):
        shares = [best(gpu, method, task) / best(gpu, "dense", task) for task in METRICS]
        ends = (f"{100 * share:.1f}" for share in (min(shares), max(shares)))
        assert verb.format(*ends) in text
    assert gpu["sparse-90"]["words"].count("training.steps=3600") == 1  # of 128 x 128 tokens
    assert round(3600 * 128 * 128 / 1e6) == 59 and "read 59 million tokens" in text
    held = {row["model"]: row["held_out"] for row in tasks["rows"] if "held_out" in row}
    kept = [f"{100 * held[f'minilm-sparse-{n}'] / held['dense']:.1f} %" for n in (85, 90)]
    said = "On SST-2's training sentences held out, 85 and 90 % zeros keep {} and {}"
    assert said.format(*kept) in text
    (row,) = (r for r in tasks["rows"] if (r["model"], r["task"]) == ("minilm-sparse-90", "mnli"))
    (rate,) = (word for word in row["words"] if word.startswith("training.learning_rate="))
    assert float(rate.partition("=")[2]) == 4.5e-4
    assert "for MiniLM `training.learning_rate=4.5e-4`" in text


METRICS = {"sst2": "accuracy", "mnli": "accuracy", "squad": "squad_f1", "stsb": "spearman"}


def best(gpu: dict[str, Any], method: str, task: str) -> float:
    """Of the rates that were compared on examples held out."""
    runs = (run for name, run in gpu.items() if name.startswith(f"rates/{method}-{task}-"))
    return max(run["evaluation"][METRICS[task]] for run in runs)


def test_what_is_said_of_pruning_ones_own_is_in_the_recipe() -> None:
    text = text_of("README.md")
    recipe = PretrainRecipe.read(ROOT / "recipes/minilm/minilm-sparse-90.toml")
    steps, batch = recipe.training.steps, recipe.training.batch
    tokens = steps * batch * recipe.corpus.sequence_tokens
    assert f"takes {steps:,} steps, which are {tokens / 1e6:.1f} million tokens" in text
