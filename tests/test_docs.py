"""What the documents say exists: commands, options, files, recipes; and no path of a machine."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from opfa import cli
from opfa.downstream.recipe import FinetuneRecipe
from opfa.upstream.recipe import PretrainRecipe

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / name
    for name in ("README.md", "launch/README.md", "recipes/README.md", "model_cards/README.md")
]
RECIPES = {"prepare": PretrainRecipe, "pretrain": PretrainRecipe, "finetune": FinetuneRecipe}


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


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_documented_command_is_accepted(words: list[str]) -> None:
    assert cli.run([words[0], "--help"]) == 0
    if words[0] in RECIPES:
        overrides = [word for word in words[2:] if "=" in word]
        RECIPES[words[0]].read(ROOT / words[1], overrides)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_valid_shell_and_in_the_readme(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name in (ROOT / "launch/README.md").read_text()


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    names = [
        command.name or command.callback.__name__
        for command in cli.app.registered_commands
        if command.callback
    ]
    assert names == [
        "prepare",
        "pretrain",
        "finetune",
        "evaluate",
        "calibrate",
        "export",
        "release",
        "push",
        "unpack",
        "inspect",
        "download",
        "list",
        "quickstart",
        "plan",
    ]
    assert all(f"`opfa {name}" in text for name in names)


def test_quickstart_table_in_the_readme_has_all_rows() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- quickstart -->")[1].split("<!-- /quickstart -->")[0]
    for row in (
        "majority class",
        "dense",
        "90 % one-shot",
        "90 % prune-once",
        "90 % prune-once, 8 bits",
    ):
        assert f"| {row} |" in table
