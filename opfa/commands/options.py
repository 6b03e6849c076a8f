"""Arguments and options that several commands share, and how their outputs are checked."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from opfa.errors import RunError
from opfa.storage.files import check_file
from opfa.storage.shipped import find_recipe

RecipeFile = Annotated[
    Path,
    Argument(
        metavar="RECIPE",
        callback=find_recipe,
        help="A recipe: a TOML file, or a name of opfa recipes.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    Argument(metavar="[section.key=value]...", help="Replace single values of the recipe."),
]
TaskRecipe = Annotated[
    Path | None,
    Option(
        "--recipe",
        callback=lambda name: None if name is None else find_recipe(name),
        help="The recipe whose task is used, a file or name; default: the run's own.",
    ),
]
ModelName = Annotated[str, Argument(metavar="MODEL", help="A run, a directory or a Hub name.")]
AnyModel = Annotated[
    str, Argument(metavar="MODEL", help="A run, a directory, FILE.onnx or a Hub name.")
]
Output = Annotated[Path, Option("--output", help="Where the output goes; must be new.")]
NewRun = Annotated[
    Path, Option("--output", help="The run directory; must be new, unless --resume.")
]
Resume = Annotated[bool, Option("--resume", help="Continue from the newest resume point.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]
Private = Annotated[bool, Option("--private", help="Make a new repository private.")]
Endpoint = Annotated[
    str | None, Option("--endpoint", help="A mirror of the Hub, like HF_ENDPOINT.")
]


def check_files(options: dict[str, Path | None]) -> None:
    """Refuse options whose files can't be written, or are one."""
    given = {option: path for option, path in options.items() if path is not None}
    for option, path in given.items():
        try:
            check_file(path)
        except RunError as error:
            raise RunError(f"{option} {error}") from None
    if len({path.absolute() for path in given.values()}) < len(given):
        raise RunError(f"{' and '.join(given)}: are the same file; give two")


Texts = Annotated[
    list[str] | None,
    Option(help="A file of texts, or a glob pattern, as in corpus.documents; repeatable."),
]
Columns = Annotated[
    list[str] | None,
    Option(help="A column of texts, or of lists of them; repeatable. Default: text."),
]
HubTexts = Annotated[str | None, Option(help="A data set of the Hub.")]
HubConfig = Annotated[str | None, Option(help="The data set's configuration.")]
HubSplit = Annotated[str, Option(help="The data set's split.")]

TextColumn = Annotated[
    str | None,
    Option("--text", "--question", help="Column of the text, of the question or of the words."),
]
PairColumn = Annotated[
    str | None, Option("--pair", "--context", help="Column of the second text, or context.")
]
ChoiceColumns = Annotated[
    list[str] | None, Option(help="Column of one choice, or of a list of all; repeatable.")
]
TaskKind = Annotated[str | None, Option(help="Of task; default: the recipe's or the head's.")]
TokenizerName = Annotated[
    str | None, Option(help="A directory or Hub name; default: the model's own.")
]
SequenceTokens = Annotated[
    int | None, Option(min=8, help="Cut texts at so many tokens; default: the recipe's.")
]
