"""What the documents say exists: commands, options, files, recipes; and no path of a machine."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from opfa.commands import app as cli
from opfa.downstream.recipe import FinetuneRecipe
from opfa.search.recipe import SearchRecipe
from opfa.storage.shipped import find_recipe
from opfa.upstream.recipe import PretrainRecipe

ROOT = Path(__file__).parent.parent
BENCH = "opfa/bench/README.md"
PAGES = [ROOT / "README.md", ROOT / "launch/README.md", ROOT / "model_cards/README.md"]
PAGES += [ROOT / "launch/sagemaker/README.md"]
PAGES += sorted([*(ROOT / "recipes").rglob("README.md"), *(ROOT / "opfa").rglob("README.md")])
RECIPES = {
    "prepare": PretrainRecipe,
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
    "search": SearchRecipe,
}


def commands() -> list[list[str]]:
    """Every `opfa …` line in a shell block of a page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["opfa"]:
                    found.append(words[1:])
    return found


WRITTEN = {words[2]: words for words in commands() if words[0] == "new" and len(words) > 2}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_documented_command_is_accepted(words: list[str]) -> None:
    command, rest = get_command(cli.app), words
    while isinstance(command, TyperGroup):
        command, *rest = command.commands[rest[0]], *rest[1:]
    command.make_context(words[0], list(rest))  # raises where an option or argument is unknown
    if words[0] in RECIPES:
        made = WRITTEN.get(words[1], [])  # by `opfa new NAME FILE section.key=value ...`
        name = made[1] if made else words[1]
        path = ROOT / name if name.endswith(".toml") else find_recipe(name)
        overrides = [word for word in [*made[3:], *words[2:]] if "=" in word]
        RECIPES[words[0]].read(path, overrides)


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_valid_shell_and_in_the_readme(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name in (ROOT / "launch/README.md").read_text()


def test_the_readme_names_every_command() -> None:
    """In its table, or by a link to the list that is generated."""
    text = (ROOT / "README.md").read_text()
    names = typer.main.get_command(cli.app).commands  # pyright: ignore[reportAttributeAccessIssue]
    is_linked = "(opfa/commands/README.md)" in text
    assert len(names) >= 16
    assert is_linked or all(f"`opfa {name}" in text for name in names)


def tables(page: str, name: str) -> list[dict[str, list[str]]]:
    """The tables between two marks of a page: each line's cells by its first one."""
    text = (ROOT / page).read_text().partition(f"<!-- {name} -->")[2].partition("<!-- /")[0]
    found: list[dict[str, list[str]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()[2:]]
        found.append({first: cells for first, *cells in rows})
    return found


def number(cell: str) -> float:
    return float(cell.replace(",", "").split()[0].rstrip("%"))


def test_sentences_about_training_speed_say_what_the_tables_say() -> None:
    steps, ratios, parts = tables(BENCH, "opfa bench train")
    text = " ".join((ROOT / BENCH).read_text().split())
    time, memory = (ratios[f"ours / plain, {what}"][0] for what in ("time", "peak memory"))
    said = f"a training step takes {time} of a plain loop's time and {memory} of its memory"
    assert said in text
    fastest = {name: number(cells[0]) for name, cells in steps.items()}
    peak = {name: number(cells[3]) for name, cells in steps.items()}
    for name, expected in (
        ("ours / plain, time", fastest["ours"] / fastest["plain"]),
        ("ours / plain, peak memory", peak["ours"] / peak["plain"]),
        ("ours / no teacher, time", fastest["ours"] / fastest["no teacher"]),
        ("no teacher / dense, time", fastest["no teacher"] / fastest["dense"]),
    ):
        assert number(ratios[name][0]) == pytest.approx(expected, abs=0.011), name
    whole = sum(number(seconds) for seconds, _ in parts.values())
    for name, (seconds, share) in parts.items():
        assert number(share) == pytest.approx(100 * number(seconds) / whole, abs=1), name


def test_the_readme_names_the_option_that_shows_tracebacks() -> None:
    assert "`--verbose`" in (ROOT / "opfa/commands/README.md").read_text()
