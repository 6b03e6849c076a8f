"""The command that searches for sub-networks."""

from typing import Annotated

import typer
from typer import Option

from opfa.api import search as api
from opfa.commands.options import AsJson, NewRun, Overrides, RecipeFile, Resume

app = typer.Typer()


@app.command(epilog="Example: opfa search sst2-search --output searches/sst2 --take 3")
def search(
    recipe: RecipeFile,
    output: NewRun,
    overrides: Overrides = None,
    take: Annotated[
        int, Option(min=0, help="How many points of the front are trained on, spread over it.")
    ] = 0,
    workers: Annotated[
        int | None, Option(min=1, help="Models that are judged at a time; default: one a core.")
    ] = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Search a fine-tuned model for smaller ones: a front of accuracy against time, MACs or bytes.

    A recipe of DIR/front makes that point's model.
    """
    found = api.search_models(
        recipe, output, overrides or (), take=take, workers=workers, resume=resume
    )
    found.show(as_json=as_json)
