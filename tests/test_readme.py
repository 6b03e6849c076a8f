"""The READMEs: short, plain, and every number, link and name in them leads to its source."""

import ast
import json
import re
from pathlib import Path

import pytest

from opfa.quickstart.quickstart import Summary
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


def test_the_accuracy_table_is_that_of_the_results() -> None:
    found = json.loads((ROOT / "recipes/minilm/results/table.json").read_text())
    lines = between("README.md", "accuracy").splitlines()[2:]
    assert len(lines) == 6
    for line in lines:
        method, zeros, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        place = (method, int(zeros.rstrip(" %")))
        rows = {r["task"]: r for r in found["rows"] if (r["method"], r["percent"]) == place}
        for task, digits, cell in zip(("sst2", "mnli", "squad"), (4, 4, 2), cells, strict=True):
            row = rows[task]
            assert cell == f"{row['mean']:.{digits}f} ({row['recovery']:.1%})"


def test_sentences_about_released_models_say_what_their_runs_found() -> None:
    results = ROOT / "recipes/minilm/results"
    vectors, speed, tasks, gpu = (
        json.loads((results / f"{name}.json").read_text())
        for name in ("embed", "embed_speed", "gpu_tasks", "gpu_minutes")
    )
    text, dense = text_of("README.md"), vectors[0]
    (ours,) = (row for row in vectors if row["model"].startswith("minilm-embed-sparse-90"))
    kept = ours["metrics"]["spearman"] / dense["metrics"]["spearman"]
    sizes = ours["bytes"] / 1e6, dense["bytes"] / 1e6
    assert f"keeps {100 * kept:.1f} % of all-MiniLM-L6-v2's Spearman on STS-B" in text
    assert "Its file has {:.1f} MB, the dense one {:.1f}.".format(*sizes) in text
    times = [speed["milliseconds"][name] for name in ("ours, fp32", "ONNX Runtime, fp32")]
    assert "takes {:.1f} ms; ONNX Runtime takes {:.1f}".format(*times) in text
    shares = {
        row["label"].partition(",")[0]: row["metrics"][row["metric"]]
        / gpu[row["dense"]]["evaluation"][row["metric"]]
        for row in tasks
        if "teacher" in row["label"] and "model.init=minilm-sparse-90" in row["words"]
    }
    kept = "under a dense teacher it keeps {:.1%} on MNLI and {:.1%} on SQuAD"
    kept = kept.format(shares["MNLI"], shares["SQuAD"]).replace("%", " %")
    assert f"*minilm-sparse-90* read 59 million: {kept}" in text
    ways = json.loads((results / "frontier.json").read_text())["rows"]
    taken = {row["model"]: row["milliseconds"] for row in ways}
    times = taken["sparse 90 %"], taken["dense"]
    said = "takes {:.1f} ms for 128 tokens on one core, the dense model {:.1f}.".format(*times)
    assert f"On SST-2 it {said}" in text
    rates = [word for word in tasks[0]["words"] if word.startswith("training.learning_rate=")]
    assert f"for MiniLM `{rates[0]}`" in text


def test_sentences_about_the_accuracy_table_say_what_the_results_say() -> None:
    found = json.loads((ROOT / "recipes/minilm/results/table.json").read_text())
    rows = {(r["task"], r["method"], r["percent"]): r for r in found["rows"]}
    text = text_of("README.md")
    sst2, mnli, squad = (rows[t, "prune-once", 90]["recovery"] for t in ("sst2", "mnli", "squad"))
    kept = f"keeps {100 * sst2:.1f} % of its accuracy on SST-2, and {100 * squad:.0f} to"
    assert f"{kept} {100 * mnli:.0f} % of its result on the harder tasks" in text
    longer = rows["mnli", "prune-once-fp32", 90]["mean"]
    assert f"without 8 bits these steps give {longer:.4f} on MNLI" in text
    majority = [found["tasks"][task]["majority"] for task in ("sst2", "mnli")]
    assert "answer scores {:.4f} on SST-2 and {:.4f} on MNLI".format(*majority) in text
    assert rows["mnli", "gradual", 90]["mean"] < majority[1]
    seeds = {task: len(rows[task, "prune-once", 90]["seeds"]) for task in found["tasks"]}
    assert seeds == {"sst2": 3, "rte": 3, "mnli": 1, "squad": 1}
    recipe = PretrainRecipe.read(ROOT / "recipes/minilm/minilm-sparse-90.toml")
    steps, batch = recipe.training.steps, recipe.training.batch
    tokens = steps * batch * recipe.corpus.sequence_tokens
    assert f"takes {steps:,} steps, which are {tokens / 1e6:.1f} million tokens" in text
