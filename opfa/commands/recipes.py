"""Commands about recipes themselves: which there are, and one to begin with."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from opfa.api.own import OWN, list_recipes, new_recipe
from opfa.commands.options import AsJson

app = typer.Typer()


@app.command("recipes", epilog="Example: opfa recipes")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with opfa; every command finds them by name."""
    list_recipes().show(as_json=as_json)


@app.command(
    "new", epilog="Example: opfa new my-csv mine.toml task.train=train.csv task.text=review"
)
def new(
    name: Annotated[
        str | None, Argument(metavar="NAME", help="my-csv, ..., or any name of opfa recipes.")
    ] = None,
    arguments: Annotated[
        list[str] | None,
        Argument(
            metavar="[FILE] [section.key=value]...",
            help="The new file, by default NAME.toml, and values to write into it.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a short recipe for your own data or encoder; without NAME, list what there is."""
    if name is None:
        return list_recipes(OWN).show(as_json=as_json)
    given = arguments or []
    has_file = bool(given) and "=" not in given[0]
    file = Path(given[0]) if has_file else None
    return new_recipe(name, file, given[1:] if has_file else given).show(as_json=as_json)
