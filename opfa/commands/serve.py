"""The command that answers over HTTP."""

from typing import Annotated

import typer
from typer import Argument, Option

from opfa.api.serve import HOST, PORT
from opfa.api.serve import serve as execute
from opfa.commands.options import AsJson, TaskRecipe

app = typer.Typer()


@app.command(epilog="Example: opfa serve runs/sst2 --port 8000")
def serve(
    model: Annotated[
        str, Argument(metavar="MODEL", help="A run, a directory, FILE.onnx or a Hub name.")
    ],
    host: Annotated[str, Option(help="Where to listen; 0.0.0.0: for others too.")] = HOST,
    port: Annotated[int, Option(help="0: one that is free.")] = PORT,
    batch: Annotated[int, Option(help="Examples that are computed at once.")] = 32,
    wait_ms: Annotated[float, Option(help="How long a batch waits for more, milliseconds.")] = 2.0,
    queue: Annotated[int, Option(help="Examples that may wait; beyond them: status 503.")] = 1_024,
    body_mb: Annotated[float, Option(help="Largest body, in 10^6 bytes.")] = 1.0,
    read_seconds: Annotated[float, Option(help="For the headers, and then for the body.")] = 10.0,
    answer_seconds: Annotated[float, Option(help="For the answer.")] = 30.0,
    text: Annotated[
        str | None,
        Option("--text", "--question", help="Column of the text, of the question or of the words."),
    ] = None,
    pair: Annotated[
        str | None, Option("--pair", "--context", help="Column of the second text, or context.")
    ] = None,
    choices: Annotated[
        list[str] | None,
        Option(help="Column of one choice, or of a list of all; repeatable."),
    ] = None,
    recipe: TaskRecipe = None,
    kind: Annotated[
        str | None, Option(help="Of task; default: the recipe's or the head's.")
    ] = None,
    tokenizer: Annotated[
        str | None, Option(help="A directory or Hub name; default: the model's own.")
    ] = None,
    sequence_tokens: Annotated[
        int | None, Option(min=8, help="Cut texts at so many tokens; default: the recipe's.")
    ] = None,
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
