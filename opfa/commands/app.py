"""The program `opfa`: all commands, and how a failure becomes a message and an exit code.

Exit codes: 0 success, 2 a user's mistake (one message, no traceback), 1 a fault of ours or a lost
process (`inspect --against`: masks differ), 75 stopped on request and saved, 76 hung, 130
interrupted, 143 ended by SIGTERM. Heavy libraries are imported when a command runs.
"""

import logging
import os
import re
import signal
import sys
import traceback
from typing import Annotated

import typer
from typer import Option

from opfa.commands import (
    measure,
    models,
    predict,
    recipes,
    search,
    serve,
    smaller,
    train,
    trim,
)
from opfa.commands.streams import secure
from opfa.errors import STOPPED, OpfaError, RecipeError, Redacting, RunError, redacted
from opfa.report.bars import DISABLED
from opfa.storage.files import named
from opfa.training import launch

INTERRUPTED = 130
TERMINATED = 128 + signal.SIGTERM
LONG_WORD = re.compile(r"\S{400,}")  # a path of 5,000 letters hides the rest of a message
CONTINUED = "a run that had begun continues with the same command and --resume"
QUICKSTART = "the same command goes on from there"
VERBOSE, QUIET = "--verbose", "--quiet"  # anywhere, also after the command
NO_BARS = (DISABLED, "HF_HUB_DISABLE_PROGRESS_BARS")  # tqdm's variable, and huggingface_hub's own
app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Once prune for all: sparse pre-trained encoders, and fine-tuning that holds their zeros.",
)
for group in (recipes, train, predict, serve, models, smaller, search, trim, measure):
    app.add_typer(group.app)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from opfa import __version__

        print(f"opfa {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=_print_version, help="Show the version.")
    ] = False,
    verbose: Annotated[
        bool, Option(VERBOSE, help="Also each logged row, and the traceback of an error.")
    ] = False,
    quiet: Annotated[
        bool, Option(QUIET, help="Only results, warnings and errors; no progress.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command and leave with its exit code."""
    secure()
    arguments = sys.argv[1:]
    sys.argv[1:] = redacted(arguments)  # what wandb and other libraries keep of the command
    sys.stdout, sys.stderr = Redacting(sys.stdout), Redacting(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Lines()])
    logging.getLogger("opfa").setLevel(_level(arguments))
    if QUIET in arguments:
        os.environ.update(dict.fromkeys(NO_BARS, "1"))
    _leave(run(arguments))


class Lines(logging.Handler):
    """Writes to what standard error is at that time: above a progress bar while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        print(self.format(record), file=sys.stderr)


def _level(arguments: list[str]) -> int:
    """From which level on this program's own lines are shown."""
    if _rank(arguments):
        return logging.ERROR  # rank 0 alone reports what all ranks know
    if QUIET in arguments:
        return logging.WARNING
    return logging.DEBUG if VERBOSE in arguments else logging.INFO


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    if {VERBOSE, QUIET} <= set(arguments):
        return _refuse(f"{VERBOSE} and {QUIET}: give one of them")
    is_verbose, advice = VERBOSE in arguments, CONTINUED
    if "quickstart" in arguments:
        advice = QUICKSTART
    command = [argument for argument in arguments if argument not in (VERBOSE, QUIET)]
    try:
        status = app(command, prog_name="opfa", standalone_mode=False)
        sys.stdout.flush()
    except (OpfaError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        if is_verbose:
            print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        return _tell(error, _rank(arguments))
    except typer.TyperException as error:
        return _refuse(f"{error.format_message()} (opfa --help shows what there is)")
    except SystemExit as error:
        if error.code != TERMINATED:
            raise
        return _refuse(f"ended by SIGTERM; {advice}", TERMINATED)
    if status == INTERRUPTED:  # typer turns Ctrl-C into this
        return _refuse(f"interrupted; {advice}", status)
    return status if isinstance(status, int) else 0


def _tell(error: OpfaError | OSError, rank: int | None) -> int:
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{what}{named(error.errno or 0)}; nothing half-written is kept", rank=rank)
    if rank and (isinstance(error, RecipeError) or error.status == STOPPED):
        return error.status  # rank 0 says it
    return _refuse(str(error), error.status, rank)


def _rank(arguments: list[str]) -> int | None:
    """This process's rank in a launch of `opfa pretrain`; None where there is none."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if command != "pretrain":
        return None
    try:
        place = launch.place()
    except RunError:
        return None
    return place.rank if place.world_size > 1 else None


def _refuse(message: str, status: int = 2, rank: int | None = None) -> int:
    who = "opfa" if rank is None else f"opfa: rank {rank}"
    short = LONG_WORD.sub(lambda word: f"{word[0][:300]}...", redacted(message))
    print(f"{who}: {short}", file=sys.stderr)
    return status


def _leave(status: int) -> None:
    """Leave; once a process group was used, without the interpreter's own exit."""
    if "deepspeed" in sys.modules:
        from opfa.training.distributed import end_process

        end_process(status)
    sys.exit(status)
