"""The command that cuts a vocabulary to what texts use."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from opfa.api.trim import trim as execute
from opfa.commands.options import (
    AsJson,
    Columns,
    HubConfig,
    HubSplit,
    HubTexts,
    ModelName,
    Output,
    Texts,
)
from opfa.errors import RunError

app = typer.Typer()


@app.command(epilog="Example: opfa trim runs/sst2 --text train.jsonl --output sst2-trimmed")
def trim(
    model: ModelName,
    output: Output,
    text: Texts = None,
    column: Columns = None,
    hub: HubTexts = None,
    hub_config: HubConfig = None,
    hub_split: HubSplit = "train",
    min_count: Annotated[
        int, Option(min=1, help="Cut what stands fewer times; above 1 some texts change.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Cut a vocabulary to the tokens that texts use: smaller embeddings, the same outputs."""
    if not text and hub is None:
        raise RunError("--text: give files of texts, or a data set with --hub")
    execute(
        model,
        [Path(each) for each in text or ()],
        output,
        columns=column or ("text",),
        min_count=min_count,
        hub=hub,
        hub_config=hub_config,
        hub_split=hub_split,
    ).show(as_json=as_json)
