"""The command that answers over HTTP."""

from typing import Annotated

import typer
from typer import Option

from opfa.api.serve import DEFAULT
from opfa.api.serve import serve as execute
from opfa.commands.options import (
    AnyModel,
    AsJson,
    ChoiceColumns,
    PairColumn,
    SequenceTokens,
    TaskKind,
    TaskRecipe,
    TextColumn,
    TokenizerName,
)

app = typer.Typer()


@app.command(epilog="Example: opfa serve runs/sst2 --port 8000")
def serve(
    model: AnyModel,
    host: Annotated[str, Option(help="Where to listen; 0.0.0.0: for others too.")] = DEFAULT.host,
    port: Annotated[int, Option(help="0: one that is free.")] = DEFAULT.port,
    batch: Annotated[int, Option(help="Examples that are computed at once.")] = DEFAULT.batch,
    wait_ms: Annotated[
        float, Option(help="How long a batch waits for more, milliseconds.")
    ] = DEFAULT.wait_ms,
    queue: Annotated[
        int, Option(help="Examples that may wait; beyond them: status 503.")
    ] = DEFAULT.queue,
    body_mb: Annotated[float, Option(help="Largest body, in 10^6 bytes.")] = DEFAULT.body_mb,
    read_seconds: Annotated[
        float, Option(help="For the headers, and then for the body.")
    ] = DEFAULT.read_seconds,
    answer_seconds: Annotated[float, Option(help="For the answer.")] = DEFAULT.answer_seconds,
    text: TextColumn = None,
    pair: PairColumn = None,
    choices: ChoiceColumns = None,
    recipe: TaskRecipe = None,
    kind: TaskKind = None,
    tokenizer: TokenizerName = None,
    sequence_tokens: SequenceTokens = None,
    as_json: AsJson = False,
) -> None:
    """Answer over HTTP what predict answers, until SIGTERM or Ctrl-C; with a page to try it.

    It has no login. Only this machine reaches it, unless --host says otherwise.
    """
    execute(
        model,
        host=host,
        port=port,
        batch=batch,
        wait_ms=wait_ms,
        queue=queue,
        body_mb=body_mb,
        read_seconds=read_seconds,
        answer_seconds=answer_seconds,
        kind=kind,
        text=text,
        text_pair=pair,
        choices=tuple(choices or ()),
        recipe=recipe,
        tokenizer=tokenizer,
        sequence_tokens=sequence_tokens,
    ).show(as_json=as_json)
