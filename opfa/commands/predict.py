"""The command that answers: predictions for examples without labels."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

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
from opfa.errors import Redacting, RunError
from opfa.storage.files import check_new

app = typer.Typer()


@app.command(epilog="Example: opfa predict runs/sst2 reviews.csv --text review --output rated.csv")
def predict(
    model: AnyModel,
    file: Annotated[
        Path | None,
        Argument(
            metavar="[FILE]",
            help="JSON Lines, CSV, TSV, Parquet, or .txt with a text a line. Default: standard "
            "input.",
        ),
    ] = None,
    text: TextColumn = None,
    pair: PairColumn = None,
    choices: ChoiceColumns = None,
    output: Annotated[
        Path | None, Option(help="FILE.jsonl or FILE.csv, a new file; default: standard output.")
    ] = None,
    form: Annotated[
        Literal["jsonl", "csv"] | None,
        Option("--format", help="Of the output; default: by its ending."),
    ] = None,
    has_all: Annotated[
        bool, Option("--probabilities", help="Also write those of all classes, tags or choices.")
    ] = False,
    prefix: Annotated[str, Option(help="Put this before the names of the new columns.")] = "",
    input_form: Annotated[
        Literal["lines", "jsonl", "csv", "tsv"] | None,
        Option(
            "--input-format",
            help="Of FILE; default: by its ending, on standard input lines or JSON Lines.",
        ),
    ] = None,
    recipe: TaskRecipe = None,
    kind: TaskKind = None,
    tokenizer: TokenizerName = None,
    sequence_tokens: SequenceTokens = None,
    batch: Annotated[int, Option(min=1, help="Examples per pass.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Predict labels, numbers, answers, tags, choices or vectors for examples without labels.

    New columns come after the input's: prediction and score; of answers also start and end.
    """
    if output is None and as_json:
        raise RunError("--json is about --output FILE; standard output has the predictions already")
    if output is not None:
        check_new(output, "file")  # here too, before torch is imported
    from opfa.inference.predict import predict_file
    from opfa.inference.predictor import Options

    options = Options(
        kind=kind,
        text=text,
        text_pair=pair,
        choices=tuple(choices or ()),
        recipe=recipe,
        tokenizer=tokenizer,
        sequence_tokens=sequence_tokens,
        batch=batch,
    )
    is_stdin = file is None or file == Path("-")
    if is_stdin and sys.stdin.isatty():
        print("reading one text a line; Ctrl-D ends", file=sys.stderr)
    # What comes out is the user's own data, so nothing in it is redacted.
    stdout = sys.stdout.stream if isinstance(sys.stdout, Redacting) else sys.stdout
    result = predict_file(
        model,
        None if is_stdin else file,
        output or stdout,
        options=options,
        input_form=input_form,
        form=form,
        prefix=prefix,
        has_all=has_all,
    )
    if output is not None:
        result.show(as_json=as_json)
