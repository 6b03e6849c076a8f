"""Starts train.py as a SageMaker training job, by version 3 or 2 of Amazon's SDK; see README.md.

    python launch/sagemaker/submit.py sst2 training.epochs=3 --role ROLE --instance ml.g5.xlarge \
        --channel model=s3://bucket/model/ --checkpoints s3://bucket/sst2/ --spot --dry-run

The recipe is checked here, before anything is uploaded or costs money. `--dry-run` prints the job
and needs neither the SDK nor an account.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sdk
from container import CHANNELS, SHARED, command_for

from opfa.api.recipes import any_recipe_of
from opfa.errors import OpfaError, RunError
from opfa.extras import importing
from opfa.storage.shipped import find_recipe

WHAT = "Starts train.py as a SageMaker training job. README.md beside it says more."
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = (HERE / "train.py", HERE / "container.py")
SCRIPTS += (HERE.parent / "torchrun.sh", HERE.parent / "until_done.sh")
PACKAGE = ("pyproject.toml", "README.md", "LICENSE", "opfa", "recipes", "model_cards")
RECIPE = "recipe.toml"  # in the container, of a file that is no shipped recipe
REQUIREMENTS = ".[all]\n"  # opfa itself; transformers gets newer than the image's
IMAGES = {  # the newest that each SDK knows; all have torch 2.8 or later
    3: {"transformers": "5.3.0", "pytorch": "2.9.0", "python": "py312"},
    2: {"transformers": "4.56.2", "pytorch": "2.8.0", "python": "py312"},
}
MOST_NAMES, LONGEST_NAME, LONGEST_VALUE = 100, 256, 2500  # CreateTrainingJob's limits
NUMBER = r"([-+0-9.einfa]+)"
TRAINING = ("loss", "mlm_loss", "distill_loss", "learning_rate", "sparsity", "tokens_per_second")


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="submit.py", description=WHAT)
    add = found.add_argument
    add("recipe", help="a file, or a name of opfa recipes")
    add("overrides", nargs="*", metavar="section.key=value", help="single values of the recipe")
    add("--role", required=True, help="the ARN of the job's role")
    add("--instance", required=True, help="the type of instance, such as ml.g5.xlarge")
    add("--instances", type=int, default=1, help="how many; several for pre-training alone")
    add("--channel", action="append", default=[], metavar="NAME=PLACE", help="s3://..., a local "
        "directory, or fsx://ID/PATH and efs://ID/PATH; repeatable")  # fmt: skip
    add("--checkpoints", metavar="S3", help="where the run is kept over interruptions")
    add("--output", metavar="S3", help="where model.tar.gz goes; by default the SDK's bucket")
    add("--spot", action="store_true", help="spot instances; needs --checkpoints")
    add("--hours", type=float, default=24.0, help="the longest that it may train")
    add("--wait-hours", type=float, help="with --spot, waiting included; default: twice --hours")
    add("--image", help="a container of your own, such as one that has opfa in it")
    add("--environment", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    add("--subnet", action="append", default=[], help="of a VPC, for file systems; repeatable")
    add("--security-group", action="append", default=[], help="of a VPC; repeatable")
    add("--name", help="the job's name without its time; default: opfa-RECIPE")
    add("--sdk", type=int, choices=(2, 3), help="by default the one that is installed, or 3")
    add("--wait", action="store_true", help="show the log until the job ends")
    add("--dry-run", action="store_true", help="print the job, and start nothing")
    return found


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """The job as plain values; raises `OpfaError` for whatever can be known to fail."""
    major = given.sdk or _installed()
    channels = dict(_pairs("--channel", given.channel))
    command = command_for(given.recipe, given.overrides)
    _check_place(given, command, channels)
    # What channels give is known in the container alone.
    filled = [f"{CHANNELS[command][name]}=channel" for name in channels if name != SHARED]
    recipe = any_recipe_of(given.recipe, [*filled, *given.overrides])
    is_file = find_recipe(given.recipe).is_relative_to(ROOT / "recipes") is False
    name = RECIPE if is_file else given.recipe
    hyperparameters = {"recipe": name, **dict(_pairs("override", given.overrides))}
    seconds = round(given.hours * 3600)
    waiting = round((given.wait_hours or 2 * given.hours) * 3600)
    return {
        "sdk": major,
        "name": given.name or f"opfa-{re.sub('[^a-zA-Z0-9]+', '-', recipe.name).strip('-')}",
        "command": command,
        "role": given.role,
        "image": given.image or IMAGES[major],
        "instance": given.instance,
        "instances": given.instances,
        "hyperparameters": _checked(hyperparameters, major),
        "channels": channels,
        "checkpoints": given.checkpoints,
        "output": given.output,
        "spot": given.spot,
        "seconds": seconds,
        "wait_seconds": waiting if given.spot else None,
        "environment": dict(_pairs("--environment", given.environment)),
        "subnets": given.subnet,
        "security_groups": given.security_group,
        "metrics": metrics_of(recipe),
        "run": f"/opt/ml/{'input/data/run' if SHARED in channels else 'checkpoints'}/run",
    }


def _installed() -> int:
    try:
        return 2 if version("sagemaker").startswith("2.") else 3
    except PackageNotFoundError:
        return 3


def _pairs(what: str, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word in words:
        name, separator, value = word.partition("=")
        if not (separator and name.strip()):
            raise RunError(f"{what} {word}: reads NAME=VALUE")
        yield name.strip(), value.strip()


def _check_place(given: argparse.Namespace, command: str, channels: Mapping[str, str]) -> None:
    """Refuse what this kind of recipe can't have."""
    known = (*CHANNELS[command], SHARED)
    for name, place in channels.items():
        if name not in known:
            raise RunError(f"--channel {name}: unknown; opfa {command} has {', '.join(known)}")
        if not (place.startswith(("s3://", "fsx://", "efs://")) or Path(place).exists()):
            raise RunError(f"--channel {name}={place}: no such place")
    if given.instances > 1 and command == "finetune":
        raise RunError(f"--instances {given.instances}: fine-tuning is one process; give 1")
    if given.instances > 1 and not channels.get(SHARED, "").startswith(("fsx://", "efs://")):
        what = "all instances write resume points to one directory; give --channel run=fsx://..."
        raise RunError(f"--instances {given.instances}: {what}")
    if not given.image and not re.match(r"ml\.[gp]\d", given.instance):
        what = "Hugging Face's training images are for GPUs; give such an instance, or --image"
        raise RunError(f"--instance {given.instance}: {what}")
    if given.instances < 1 or not given.hours > 0:
        raise RunError("--instances, --hours: must be above 0")
    if given.spot and not given.checkpoints and SHARED not in channels:
        raise RunError("--spot: needs --checkpoints, or an interruption loses the run")


def _checked(hyperparameters: Mapping[str, str], major: int) -> dict[str, str]:
    """As the service and the SDK's containers can carry them. Those of version 3 are variables of
    a shell between single quotes, whose names can have no dots.
    """
    if len(hyperparameters) > MOST_NAMES:
        raise RunError(f"{len(hyperparameters)} hyperparameters: SageMaker takes {MOST_NAMES}")
    for name, value in hyperparameters.items():
        if len(name) > LONGEST_NAME or len(value) > LONGEST_VALUE:
            what = f"SageMaker takes {LONGEST_VALUE:,} characters; put it into a recipe file"
            raise RunError(f"{name[:80]}: has {len(value):,} characters; {what}")
        if major == 3 and ("'" in name + value or not re.fullmatch(r"[\w.-]+", name)):
            what = "version 3's containers can't carry a single quote; write it with double ones"
            raise RunError(f"{name[:80]} = {value[:80]}: {what}, or in a recipe file")
    return {
        name.replace(".", "__") if major == 3 else name: v for name, v in hyperparameters.items()
    }


def metrics_of(recipe: Any) -> dict[str, str]:  # Any: either recipe
    """Names and regular expressions by which SageMaker finds metrics in the log."""
    found = {f"train:{n}": rf"step \d+/\d+:.*?\b{n}={NUMBER}" for n in TRAINING}
    task = recipe.model_dump().get("task")
    names = ("loss", "mlm_loss") if task is None else task["metrics"]
    return found | {f"validation:{n}": rf", validation:.*?\b{re.escape(n)}={NUMBER}" for n in names}


def stage(recipe: str, directory: Path) -> None:
    """Fill a directory with what the container gets: train.py, opfa, and the recipe if it is a
    file of yours.
    """
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.png", "*.safetensors")
    for script in SCRIPTS:
        shutil.copy(script, directory / script.name)
    for name in PACKAGE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=ignore)
        else:
            shutil.copy(source, directory / name)
    (directory / "requirements.txt").write_text(REQUIREMENTS)
    file = find_recipe(recipe)
    if not file.is_relative_to(ROOT / "recipes"):
        shutil.copy(file, directory / RECIPE)


def start(job: Mapping[str, Any], recipe: str, *, wait: bool, session: Any = None) -> None:
    """Upload and start a job; `RunError` where the SDK is missing."""
    package = "sagemaker" if job["sdk"] == 3 else "sagemaker<3"
    with tempfile.TemporaryDirectory() as aside, importing("submit.py", package):
        stage(recipe, Path(aside))
        if job["sdk"] == 3:
            trainer, channels = sdk.by_version_3(job, Path(aside), session)
            trainer.train(input_data_config=channels, wait=wait)
        else:
            estimator, channels = sdk.by_version_2(job, Path(aside), session)
            estimator.fit(channels, wait=wait)


def main(words: Sequence[str] | None = None) -> None:
    """Check, then print or start a job."""
    given = parser().parse_intermixed_args(words)
    try:
        job = plan(given)
        if given.dry_run:
            print(json.dumps(job, indent=2))
        else:
            start(job, given.recipe, wait=given.wait)
    except OpfaError as error:
        print(f"submit.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
