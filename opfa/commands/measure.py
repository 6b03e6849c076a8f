"""Commands that say what something costs: on paper, and measured on this machine."""

import contextlib
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from opfa.api import train as api
from opfa.commands.options import AsJson, Overrides, RecipeFile, check_files
from opfa.extras import require
from opfa.report.between import check_between, write_between
from opfa.storage.shipped import find_recipe
from opfa.upstream.recipe import PretrainRecipe

BENCH_MARK = "opfa bench train"  # `--write` replaces the text between marks of this name
app = typer.Typer()


class RoadName(StrEnum):
    """How requests come to a model that is measured."""

    SERVER = "server"
    HANDLER = "handler"


bench = typer.Typer(no_args_is_help=True, help="Measure this machine.")
app.add_typer(bench, name="bench")


@app.command(
    epilog="Example: opfa plan bert-base-teacher --gpus 8 --memory-gb 80 --bandwidth-gbps 400"
)
def plan(
    recipe: RecipeFile,
    gpus: Annotated[int, Option(min=1, help="GPUs in all.")],
    memory_gb: Annotated[float, Option(min=0.1, max=1e9, help="Memory of each GPU.")],
    bandwidth_gbps: Annotated[
        float,
        Option("--bandwidth-gbps", min=0.001, max=1e9, help="Gbit/s of each GPU to the others."),
    ],
    teraflops: Annotated[
        float, Option(min=0.001, max=1e9, help="What a GPU sustains, in 10^12/s.")
    ] = 150.0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Calculate what a launch needs (memory, bytes sent, efficiency) and which file to use.

    With launch.deepspeed=FILE only this DeepSpeed file is planned.
    """
    result = api.plan(
        recipe,
        overrides or (),
        gpus=gpus,
        memory_gb=memory_gb,
        bandwidth_gbps=bandwidth_gbps,
        teraflops=teraflops,
    )
    result.show(as_json=as_json)


@bench.command("masks", epilog="Example: opfa bench masks")
def bench_masks(as_json: AsJson = False) -> None:
    """Measure a mask update for 12 BERT-base layers, 85 M weights: time and memory."""
    from opfa.bench.steps import bench_masks as execute

    execute().show(as_json=as_json)


@bench.command(
    "train",
    epilog="Example: opfa bench train bert-base-teacher launch.micro_batch=8",
)
def bench_train(
    arguments: Annotated[
        list[str] | None,
        Argument(
            metavar="[RECIPE] [section.key=value]...",
            help="Without a recipe: BERT-base, 8 x 128 random tokens, 90 % sparse.",
        ),
    ] = None,
    rounds: Annotated[int, Option(min=1, help="How often all is measured.")] = 2,
    write: Annotated[
        Path | None, Option(help="Put the tables into this Markdown file, between its marks.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a pre-training step by part, and against the same step in plain transformers."""
    if write is not None:
        check_files({"--write": write})
        check_between(write, BENCH_MARK)
    from opfa.bench.train import bench_train as execute

    given = arguments or []
    has_recipe = bool(given) and "=" not in given[0]
    recipe = PretrainRecipe.read(find_recipe(given[0]), given[1:]) if has_recipe else None
    result = execute(recipe, given, rounds)
    if write is not None:
        write_between(write, BENCH_MARK, result.markdown())
    result.show(as_json=True) if as_json else print(result.markdown())


@bench.command("finetune", epilog="Example: opfa bench finetune minilm --sparsity 0.85")
def bench_finetune(
    shape: Annotated[
        Literal["bert-base", "minilm"], Argument(metavar="[SHAPE]", help="bert-base or minilm.")
    ] = "bert-base",
    sparsity: Annotated[
        float, Option(min=0.1, max=0.99, help="Zeros in the encoder's matrices.")
    ] = 0.9,
    batch: Annotated[int, Option(min=1, help="Sequences of a step.")] = 16,
    tokens: Annotated[int, Option(min=1, max=512, help="Tokens of a sequence.")] = 128,
    rounds: Annotated[int, Option(min=1, help="How often all is measured.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Measure a fine-tuning step in the sparse kernels by part, against torch's dense ones."""
    from opfa.bench.finetune import bench_finetune as execute

    sizes = {"batch": batch, "tokens": tokens}
    execute(shape, sparsity=sparsity, rounds=rounds, **sizes).show(as_json=as_json)


@bench.command("distillation", epilog="Example: opfa bench distillation")
def bench_distillation(as_json: AsJson = False) -> None:
    """Measure a step under a teacher with its logits kept, and computed anew."""
    from opfa.bench.steps import bench_distillation as execute

    execute().show(as_json=as_json)


@bench.command("files", epilog="Example: opfa bench files")
def bench_files(as_json: AsJson = False) -> None:
    """Measure a 90 % sparse BERT-base in each form of a release: bytes, and loading."""
    from opfa.bench.files import bench_files as execute

    execute().show(as_json=as_json)


@bench.command("shapes", epilog="Example: opfa bench shapes")
def bench_shapes(
    rounds: Annotated[int, Option(min=1, help="How often each is timed.")] = 25,
    as_json: AsJson = False,
) -> None:
    """Measure an encoder with fewer heads and neurons: speed by multiply-adds, and by engine."""
    from opfa.bench.shapes import bench_shapes as execute

    execute(rounds).show(as_json=as_json)


@bench.command(
    "inference", epilog="Example: opfa bench inference --work bench --picture latency.png"
)
def bench_inference(
    model: Annotated[
        str | None,
        Argument(metavar="[MODEL]", help="Default: BERT-base's shape with random weights."),
    ] = None,
    sparsity: Annotated[
        float, Option(min=0.0, max=0.99, help="Zeros in the random model's layers.")
    ] = 0.9,
    threads: Annotated[int, Option(min=1, help="Threads of each engine.")] = 2,
    rounds: Annotated[int, Option(min=1, help="How often each engine has its turn.")] = 25,
    peers: Annotated[
        list[str] | None,
        Option(
            "--peers",
            metavar="PYTHON",
            help="A Python that has onnxruntime, openvino or deepsparse; may be repeated.",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        Option(help="A directory that keeps models and results, to go on after a stop."),
    ] = None,
    picture: Annotated[
        Path | None, Option(help="Draw latency against zeros and tokens into this PNG file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the CPU runtime against torch, ONNX Runtime, OpenVINO and DeepSparse.

    An engine that isn't installed is left out; launch/bench_inference.sh installs them apart.
    """
    check_files({"--picture": picture})
    from opfa.bench.contestants import Plan
    from opfa.bench.inference import bench_inference as execute

    plan = Plan(sparsity=sparsity, threads=threads, rounds=rounds, peers=tuple(peers or ()))
    with contextlib.ExitStack() as kept:
        directory = work or Path(kept.enter_context(tempfile.TemporaryDirectory()))
        result = execute(model, plan, directory)
    if picture is not None:
        result.draw(picture)
    result.show(as_json=as_json)


@bench.command("serve", epilog="Example: opfa bench serve runs/sst2 sst2-small --price 0.20")
def bench_serve(
    models: Annotated[
        list[str], Argument(metavar="MODEL...", help="Runs, directories, ONNX files or Hub names.")
    ],
    clients: Annotated[
        list[int] | None,
        Option(min=1, max=1_000, help="Clients at once; repeatable. Default: 1, then 16."),
    ] = None,
    requests: Annotated[int, Option(min=2, help="Of each model in a round.")] = 1_000,
    words: Annotated[int, Option(min=1, max=10_000, help="Words of a text.")] = 24,
    rounds: Annotated[int, Option(min=1, help="How often each model has its turn.")] = 3,
    roads: Annotated[
        list[RoadName] | None,
        Option(
            "--road",
            help="How requests come: to `opfa serve`, or to the handler of `opfa pack`'s archive, "
            "without HTTP; repeatable. Default: server.",
        ),
    ] = None,
    price: Annotated[
        float | None, Option(help="Of an hour of this machine, for the cost of a million requests.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a request to each model takes, and what a million of them cost."""
    names = dict.fromkeys(roads or (RoadName.SERVER,))
    if RoadName.SERVER in names:
        require("opfa bench serve", "opfa[serve]", "fastapi", "uvicorn", "prometheus_client")
    if RoadName.HANDLER in names:
        require("opfa bench serve --road handler", "opfa[export]", "onnx", "onnxruntime")
    from opfa.bench.roads import ROADS
    from opfa.bench.serve import bench_serve as execute

    execute(
        models,
        clients=tuple(dict.fromkeys(clients or (1, 16))),
        requests=requests,
        words=words,
        rounds=rounds,
        price=price,
        roads=[ROADS[name] for name in names],
    ).show(as_json=as_json)
