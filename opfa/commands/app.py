"""Commands: read arguments, call one function.

Exit codes: 0 success, 2 a user's mistake (one message on stderr, no traceback), 1 a fault of ours
or a lost process (of `inspect --against`: masks differ), 75 told to stop and saved, 76 hung, 130
interrupted. Each command imports what it needs when it runs, so that `--help` and a refused recipe
don't wait for torch.
"""

import json
import logging
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from opfa.commands.streams import secure
from opfa.errors import STOPPED, ModelError, OpfaError, RecipeError, Redacting, RunError, redacted
from opfa.storage.files import check_directory, check_file, check_new, named
from opfa.training import launch
from opfa.training.run import check_output

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Once prune for all: sparse pre-trained encoders, and fine-tuning that holds their zeros.",
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from opfa import __version__

        print(f"opfa {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also show the traceback of an error.")
    ] = False,
) -> None:
    pass


bench = typer.Typer(no_args_is_help=True, help="Measure this machine.")
app.add_typer(bench, name="bench")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Replace single values of the recipe."),
]
NewRun = Annotated[
    Path, typer.Option("--output", help="The run directory; must be new, unless --resume.")
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A directory or Hub name.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest resume point.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint", help="A mirror of the Hub, like HF_ENDPOINT.")
]
INTERRUPTED = 130
LONG_WORD = re.compile(r"\S{400,}")  # a path of 5,000 letters hides what is said of it
TERMINATED = 128 + signal.SIGTERM  # in the middle of an output that isn't a run
CONTINUED = "a run that had begun continues with the same command and --resume"
BENCH_MARK = "opfa bench train"  # of what `opfa bench train --write` replaces


@app.command(epilog="Example: opfa prepare recipes/upstream/bert-base-90.toml --output prepared")
def prepare(
    recipe: RecipeFile,
    output: Annotated[Path, typer.Option("--output", help="Where the examples go; must be new.")],
    overrides: Overrides = None,
) -> None:
    """Turn documents into tokenized, sharded pre-training examples."""
    check_new(output)
    from opfa.upstream.recipe import PretrainRecipe

    checked = PretrainRecipe.read(recipe, overrides or ())
    from opfa.upstream.corpus import prepare as execute

    execute(checked.corpus, output)


@app.command(
    epilog="Example: opfa pretrain recipes/upstream/bert-base-90.toml --output runs/bert-base-90"
)
def pretrain(
    recipe: RecipeFile,
    output: NewRun,
    overrides: Overrides = None,
    resume: Resume = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only look whether recipe and RUN would be accepted.")
    ] = False,
    trust_data: Annotated[
        bool, typer.Option("--trust-data", help="Don't read all examples first to verify them.")
    ] = False,
) -> None:
    """Train a teacher, or prune a student under one."""
    from opfa.upstream.recipe import PretrainRecipe

    checked = PretrainRecipe.read(recipe, overrides or ())
    check_output(output, checked, resume)  # already here, before torch is imported
    if check:
        return
    from opfa.upstream.pretrain import pretrain as execute

    execute(checked, output, resume, trust_data=trust_data)


@app.command(epilog="Example: opfa finetune recipes/downstream/sst2.toml --output runs/sst2")
def finetune(
    recipe: RecipeFile,
    output: NewRun,
    overrides: Overrides = None,
    resume: Resume = False,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="Run with so many seeds, from the recipe's on."),
    ] = None,
) -> None:
    """Fine-tune a sparse model for a task with its zeros held."""
    from opfa.downstream.recipe import FinetuneRecipe

    launch.refuse_several("opfa finetune")
    checked = FinetuneRecipe.read(recipe, overrides or ())
    has_several = seeds is not None or checked.sweep is not None
    check_output(output, checked, resume, has_several=has_several)
    if has_several:
        from opfa.downstream.sweep import sweep as execute_all

        _print_json(execute_all(checked, output, num_seeds=seeds or 1, resume=resume))
        return
    from opfa.downstream.finetune import finetune as execute

    _print_json(execute(checked, output, resume))


@app.command(epilog="Example: opfa evaluate runs/sst2/model --recipe runs/sst2/recipe.toml")
def evaluate(
    model: ModelName,
    recipe: Annotated[Path, typer.Option("--recipe", help="The recipe whose task is evaluated.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result here.")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", help="Also write every answer here, as JSON Lines."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Measure a fine-tuned model on its task's validation splits."""
    _check_files({"--output": output, "--predictions": predictions})
    from opfa.downstream.recipe import FinetuneRecipe

    checked = FinetuneRecipe.read(recipe, overrides or ())
    from opfa.downstream.evaluate import evaluate_model

    result = evaluate_model(model, checked, predictions)
    if output is not None:
        from opfa.storage.files import write_json

        write_json(output, result)
    _print_json(result)


@app.command(
    epilog="Example: opfa calibrate runs/sst2/model --recipe runs/sst2/recipe.toml --output sst2-8"
)
def calibrate(
    model: ModelName,
    recipe: Annotated[Path, typer.Option("--recipe", help="The recipe whose task is used.")],
    output: Annotated[Path, typer.Option("--output", help="The new model; must be new.")],
    examples: Annotated[
        int, typer.Option("--examples", min=1, help="Training examples that it sees.")
    ] = 512,
    overrides: Overrides = None,
) -> None:
    """Quantize a fine-tuned model to 8 bits without training."""
    check_new(output)
    from opfa.downstream.recipe import FinetuneRecipe

    checked = FinetuneRecipe.read(recipe, overrides or ())
    from opfa.downstream.calibrate import calibrate as execute

    _print_json(execute(model, checked, output, num_examples=examples))


@app.command(epilog="Example: opfa export runs/sst2-qat/model --output sst2/model.onnx")
def export(
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", help="FILE.onnx; must be new.")],
    is_int8: Annotated[
        bool | None,
        typer.Option("--int8/--fp32", help="Default: 8 bits if the model has its ranges."),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option("--verify", help="A file, or a Hub split: compare with torch on it first."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="The recipe whose task is compared.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Also write what was found here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a fine-tuned model as ONNX, in fp32 or 8 bits."""
    if (verify is None) != (recipe is None):
        raise RunError("--verify and --recipe need each other: data, and what their columns mean")
    check_new(output, "file")
    _check_files({"--report": report})
    task = None
    if verify is not None and recipe is not None:
        from opfa.downstream.recipe import FinetuneRecipe

        task = FinetuneRecipe.read(recipe).task.model_copy(update={"validation": verify})
    from opfa.runtimes.export import export as execute

    result = execute(model, output, is_int8=is_int8, task=task, report=report)
    if as_json:
        _print_json(result)
    else:
        _print_export(output, result)


@app.command(
    epilog="Example: opfa release runs/sst2-qat --output bert-base-90-sst2 --format compact-int8"
)
def release(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    output: Annotated[Path, typer.Option("--output", help="The release; must be new.")],
    form: Annotated[
        Literal["dense", "compact", "compact-int8"],
        typer.Option("--format", help="Plain safetensors, or positions and values."),
    ] = "dense",
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option("--dtype", help="Default: fp32; of matrices that compact-int8 leaves: fp16."),
    ] = None,
    embeddings: Annotated[
        Literal["int8", "same"] | None,
        typer.Option("--embeddings", help="Of compact-int8; default: int8."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="For the card; default: the directory's.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="For the card, as the Hub calls it: apache-2.0.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="For the card: the Hub name it began with.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="LABEL=RUN: its results too, in the card; repeatable."),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", help="Then upload to this Hub name.")
    ] = None,
    private: Private = False,
    endpoint: Endpoint = None,
    overrides: Overrides = None,
) -> None:
    """Make a finished run a release: verified weights, card and manifest; and upload it if asked.

    Weights that are rounded are measured again: task.validation=DATA says on what, if not on the
    recipe's.
    """
    if push is None and (private or endpoint):
        raise RunError("--private and --endpoint are for --push")
    check_new(output)
    runs = {}
    for pair in compare or ():
        label, _, path = pair.partition("=")
        if not label.strip() or not path:
            raise RunError(f"--compare {pair!r}: give LABEL=RUN")
        runs[label] = Path(path)
    from opfa.release import release as releasing

    result = releasing.release(
        run,
        output,
        name=name or push,
        form=form,
        dtype=dtype,
        embeddings=None if embeddings is None else embeddings == "int8",
        licence=licence,
        base_model=base_model,
        compare=runs,
        overrides=overrides or (),
    )
    if push is not None:
        result["address"] = releasing.push(output, push, endpoint=endpoint, private=private)
    _print_json(result)


@app.command(epilog="Example: opfa push bert-base-90-sst2 my-team/bert-base-90-sst2")
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A release.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name on the Hub.")],
    private: Private = False,
    endpoint: Endpoint = None,
) -> None:
    """Verify a release and upload it as one commit, which replaces every older file."""
    from opfa.release.release import push as execute

    print(execute(directory, name, endpoint=endpoint, private=private))


@app.command(epilog="Example: opfa unpack bert-base-90-sst2 --output bert-base-90-sst2-plain")
def unpack(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A compact model.")],
    output: Annotated[Path, typer.Option("--output", help="The plain one; must be new.")],
) -> None:
    """Write the plain form of a compact model, which transformers reads without opfa."""
    check_new(output)
    from opfa.release.release import unpack as execute

    execute(directory, output)


@app.command(epilog="Example: opfa inspect Intel/bert-base-uncased-sparse-90-unstructured-pruneofa")
def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A directory, a run, a weight file or a Hub name."),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="OTHER",
            help="What changed from OTHER to MODEL; the exit code is 1 if masks did.",
        ),
    ] = None,
    has_tensors: Annotated[
        bool, typer.Option("--tensors", help="Every tensor instead of layers.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="FILE.png: draw it too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how sparse a checkpoint is, where and in which pattern; or compare it with another."""
    _check_files({"--plot": plot})
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise RunError(f"--plot {plot}: must be a .png file in a directory that exists")
    from opfa.report import tables
    from opfa.weights import inspection

    found = inspection.inspect(model) if against is None else inspection.compare(against, model)
    if plot is not None:
        if not found["layers"]:
            raise ModelError(f"{model}: has no numbered layers with matrices, so nothing to draw")
        from opfa.report.pictures import comparison_picture, inspection_picture

        if against is None:
            inspection_picture(model, found, plot)
        else:
            comparison_picture(found, plot)
    if as_json:
        _print_json(found)
    elif against is None:
        tables.print_sparsity(model, found, has_tensors=has_tensors)
    else:
        tables.print_comparison(found, has_tensors=has_tensors)
    if against is not None and not found["same_masks"]:
        raise typer.Exit(1)


@app.command(
    epilog="Example: opfa download Intel/bert-base-uncased-sparse-90-unstructured-pruneofa "
    "--output bert-base-90"
)
def download(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A Hub name, an https URL or a directory.")
    ],
    output: Annotated[Path, typer.Option("--output", help="The model's directory; must be new.")],
    revision: Annotated[
        str | None, typer.Option("--revision", help="Of the Hub: a branch, tag or commit.")
    ] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Get a released model and verify every file."""
    from opfa.hub.download import download as execute

    result = execute(name, output, revision=revision, endpoint=endpoint)
    if as_json:
        _print_json(result)
    else:
        held_to = "its manifest" if result["manifest_sha256"] else "the Hub's listing"
        files = f"{result['files']:,} files, {result['bytes']:,} bytes"
        print(f"{output}: complete; {files}, each as {held_to} says")


@app.command("list", epilog="Example: opfa list")
def list_models(as_json: AsJson = False) -> None:
    """Show released models that `opfa download` knows."""
    from opfa.hub.index import released

    models = [model.model_dump() for model in released()]
    if as_json:
        _print_json(models)
    else:
        _print_models(models)


@app.command(epilog="Example: opfa quickstart --output quickstart-out")
def quickstart(
    output: Annotated[Path, typer.Option("--output", help="Where everything goes; must be new.")],
) -> None:
    """The whole method on a small model and four novelists, in minutes on a laptop."""
    check_directory(output)
    from opfa.quickstart.quickstart import quickstart as execute

    execute(output)


@bench.command("masks", epilog="Example: opfa bench masks")
def bench_masks(as_json: AsJson = False) -> None:
    """Time and memory of a mask update for 12 BERT-base layers, 85 M weights."""
    from opfa.bench.steps import bench_masks as execute

    result = execute()
    if as_json:
        _print_json(result)
    else:
        table = Table("scope", "seconds (median)", "extra memory, GB", "zeros exact")
        for row in result["scopes"]:
            extra = f"{row['extra_bytes'] / 1e9:.2f}"
            table.add_row(row["scope"], f"{row['seconds']:.2f}", extra, str(row["is_exact"]))
        Console().print(table)


@bench.command(
    "train",
    epilog="Example: opfa bench train recipes/upstream/bert-base-90.toml launch.micro_batch=8",
)
def bench_train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [section.key=value]...",
            help="Without a recipe: BERT-base, 8 x 128 random tokens, 90 % sparse.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often all is measured.")] = 2,
    write: Annotated[
        Path | None,
        typer.Option("--write", help="Put the tables into this Markdown file, between its marks."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A pre-training step by part, and against the same step written plainly with transformers."""
    from opfa.bench.markdown import check_between, training_markdown, write_between

    if write is not None:
        _check_files({"--write": write})
        check_between(write, BENCH_MARK)
    from opfa.bench.train import bench_train as execute
    from opfa.upstream.recipe import PretrainRecipe

    given = arguments or []
    has_recipe = bool(given) and "=" not in given[0]
    recipe = PretrainRecipe.read(given[0], given[1:]) if has_recipe else None
    result = execute(recipe, given, rounds)
    if write is not None:
        write_between(write, BENCH_MARK, training_markdown(result))
    if as_json:
        _print_json(result)
    else:
        print(training_markdown(result))


@bench.command("distillation", epilog="Example: opfa bench distillation")
def bench_distillation(as_json: AsJson = False) -> None:
    """Time of a step under a teacher whose logits are kept, and computed anew."""
    from opfa.bench.steps import bench_distillation as execute

    result = execute()
    if as_json:
        _print_json(result)
    else:
        table = Table("teacher's shape", "seconds, kept", "seconds, anew", "ratio")
        for row in result["rows"]:
            cells = (f"{row['kept']:.2f}", f"{row['anew']:.2f}", f"{row['ratio']:.2f}")
            table.add_row(row["teacher"], *cells)
        Console().print(table)


@bench.command("files", epilog="Example: opfa bench files")
def bench_files(as_json: AsJson = False) -> None:
    """Bytes of a 90 % sparse BERT-base in each form of a release, and what loading it costs."""
    from opfa.bench.files import bench_files as execute
    from opfa.report.tables import print_files

    result = execute()
    if as_json:
        _print_json(result)
    else:
        print_files(result)


@app.command(
    epilog="Example: opfa plan recipes/upstream/bert-base-90.toml --gpus 8 --memory-gb 80 "
    "--bandwidth-gbps 400"
)
def plan(
    recipe: RecipeFile,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs in all.")],
    memory_gb: Annotated[float, typer.Option("--memory-gb", min=0.1, max=1e9, help="Of each GPU.")],
    bandwidth_gbps: Annotated[
        float,
        typer.Option(
            "--bandwidth-gbps", min=0.001, max=1e9, help="Gbit/s of each GPU to the others."
        ),
    ],
    teraflops: Annotated[
        float,
        typer.Option("--teraflops", min=0.001, max=1e9, help="What a GPU sustains, in 10^12/s."),
    ] = 150.0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """What a launch will need on paper: memory, bytes on the wire, efficiency; and what to use."""
    from opfa.upstream.recipe import PretrainRecipe

    checked = PretrainRecipe.read(recipe, overrides or ())
    from opfa.upstream.plan import plan as execute

    result = execute(
        checked,
        gpus=gpus,
        memory_gb=memory_gb,
        bandwidth_gbps=bandwidth_gbps,
        teraflops=teraflops,
    )
    if as_json:
        _print_json(result)
    else:
        _print_plan(result)


def _print_plan(result: dict[str, Any]) -> None:
    columns = ("DeepSpeed file", "batch", "GB each", "GB/step sent", "of it masks", "efficiency")
    table = Table(*columns, title=f"{result['gpus']} GPU(s), global batch {result['batch']}")
    for row in result["configurations"]:
        if row["micro_batch"] is None:
            table.add_row(row["configuration"], "too large", f"{row['total_memory_gb']:.1f}")
            continue
        table.add_row(
            row["configuration"],
            f"{row['micro_batch']} x {row['accumulation']}",
            f"{row['total_memory_gb']:.1f}",
            f"{row['wire_gb_per_step']:.2f}",
            f"{row['mask_updates_share_of_wire']:.2%}",
            f"{row['efficiency']:.0%}",
        )
    Console().print(table)
    best = result["recommended"]
    if best is None:
        print("no configuration fits; give more GPUs or more memory")
        return
    micro_batch = next(
        row["micro_batch"] for row in result["configurations"] if row["configuration"] == best
    )
    print(f"use: launch.deepspeed=launch/{best}.json launch.micro_batch={micro_batch}")
    days = result["days"]
    long = f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours"
    print(f"about {long}, if nothing of the wire overlaps with computing")


def _print_models(models: list[dict[str, Any]]) -> None:
    table = Table()
    table.add_column("name", overflow="fold")
    for column in ("task", "sparsity", "bytes", "results"):
        table.add_column(column)
    for model in models:
        sparsity = "" if model["sparsity"] is None else f"{model['sparsity']:.0%}"
        size = "" if model["bytes"] is None else f"{model['bytes']:,}"
        results = {k: v for k, v in (model["results"] or {}).items() if v is not None}
        shown = ", ".join(f"{metric} {value:.4g}" for metric, value in results.items())
        table.add_row(model["name"], model["task"], sparsity, size, shown)
    Console().print(table)
    print("empty: not measured by this project")


def _check_files(options: dict[str, Path | None]) -> None:
    """Refuse options whose files can't be written, or are one."""
    given = {option: path for option, path in options.items() if path is not None}
    for option, path in given.items():
        try:
            check_file(path)
        except RunError as error:
            raise RunError(f"{option} {error}") from None
    if len({path.absolute() for path in given.values()}) < len(given):
        raise RunError(f"{' and '.join(given)}: are the same file; give two")


def _print_export(output: Path, result: dict[str, Any]) -> None:
    table = Table("", "model", "ONNX", title=f"{output} ({result['precision']})")
    for key in ("bytes", "zeros"):
        table.add_row(key, *(f"{result[key][side]:,}" for side in ("model", "onnx")))
    table.add_row("fingerprint", *(result["fingerprint"][s][:12] for s in ("model", "onnx")))
    parity = result.get("parity")
    if parity:
        for name, value in parity["metrics"]["torch"].items():
            table.add_row(name, f"{value:.4f}", f"{parity['metrics']['onnx'][name]:.4f}")
    Console().print(table)
    if result["zeros"]["rounded"]:
        print(f"live weights that 8 bits round to zero: {result['zeros']['rounded']:,}")
    if parity:
        equal = parity["equal_predictions"]
        shown = "" if equal is None else f", {equal:.2%} of the predictions equal"
        print(f"{parity['examples']:,} examples: logits differ by up to ", end="")
        print(f"{parity['max_difference']:.1e}{shown}")
        if parity.get("repeated_predictions") is not None:
            again = f"{parity['repeated_predictions']:.2%}"
            print(f"torch with itself, its layers disturbed in the last digit: {again} equal")


def _print_json(value: Any) -> None:  # Any: what JSON can hold
    print(json.dumps(value, indent=2))  # the stream hides secrets


def main() -> None:
    """Run a command and leave with its exit code."""
    secure()
    arguments = sys.argv[1:]
    sys.argv[1:] = redacted(arguments)  # what wandb and other libraries keep of the command
    sys.stdout, sys.stderr = Redacting(sys.stdout), Redacting(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # what all ranks know, one of them says
    logging.getLogger("opfa").setLevel(logging.ERROR if _rank(arguments) else logging.INFO)
    _leave(run(arguments))


def run(arguments: list[str]) -> int:
    """Run a command; its exit code."""
    is_verbose = "--verbose" in arguments  # anywhere, also after the command
    try:
        status = app([a for a in arguments if a != "--verbose"], standalone_mode=False)
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
        return _refuse(f"told to end by SIGTERM; {CONTINUED}", TERMINATED)
    if status == INTERRUPTED:  # typer turns Ctrl-C into this
        return _refuse(f"interrupted; {CONTINUED}", status)
    return status if isinstance(status, int) else 0


def _tell(error: OpfaError | OSError, rank: int | None) -> int:
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        message = f"{what}{named(error.errno or 0)}; nothing half-written is kept"
        return _refuse(message, rank=rank)
    is_told_by_rank_0 = isinstance(error, RecipeError) or error.status == STOPPED
    if is_told_by_rank_0 and rank:
        return error.status
    return _refuse(str(error), error.status, rank)


def _rank(arguments: list[str]) -> int | None:
    """This process's rank in a launch of `opfa pretrain`; None of any other command, or where
    nothing was launched.
    """
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
