"""What SageMaker says of a training container, and what there is to do in it."""

import json
import os
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opfa.api.recipes import any_recipe_of, words_of
from opfa.errors import OpfaError, RunError
from opfa.recipe import command_of, read_values
from opfa.storage.shipped import find_recipe

CHANNELS = {  # by recipe, which key of it a channel is for
    "pretrain": {"data": "data", "model": "model.init", "teacher": "distillation.teacher"},
    "finetune": {
        "train": "task.train",
        "validation": "task.validation",
        "model": "model.init",
        "teacher": "distillation.teacher",
    },
}
SHARED = "run"  # the channel of a file system that all hosts write to
PORT = "29500"  # where hosts meet
NOT_OURS = ("code", "sm_drivers")  # channels of the SDK


@dataclass(frozen=True, kw_only=True)
class Job:
    """What SageMaker says of this container, by its variables."""

    hyperparameters: Mapping[str, Any]
    channels: Mapping[str, Path]
    model: Path
    output: Path
    hosts: Sequence[str]
    host: str
    network: str
    port: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Job":
        """Read the variables; `RunError` where this is no training container."""
        names = ("SM_HPS", "SM_MODEL_DIR", "SM_OUTPUT_DIR", "SM_HOSTS", "SM_CURRENT_HOST")
        if missing := [name for name in names if name not in environment]:
            what = "is not set, so this is no SageMaker training container; see submit.py"
            raise RunError(f"{missing[0]}: {what}")
        given = json.loads(environment["SM_HPS"])
        channels = json.loads(environment.get("SM_CHANNELS") or "[]")
        return cls(
            # The SDK and automatic tuning add some of their own.
            hyperparameters={
                name.replace("__", "."): value  # as submit.py writes them, for a shell
                for name, value in given.items()
                if not name.startswith(("sagemaker_", "_tuning_"))
            },
            channels={
                name: Path(environment[f"SM_CHANNEL_{name.upper()}"])
                for name in channels
                if name not in NOT_OURS
            },
            model=Path(environment["SM_MODEL_DIR"]),
            output=Path(environment["SM_OUTPUT_DIR"]),
            hosts=sorted(json.loads(environment["SM_HOSTS"])),
            host=environment["SM_CURRENT_HOST"],
            network=environment.get("SM_NETWORK_INTERFACE_NAME", ""),
            port=environment.get("SM_MASTER_PORT", PORT),
        )

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.channels.get(SHARED, self.model.parent / "checkpoints") / "run"

    @property
    def is_first(self) -> bool:
        """Whether this process finishes the job: the first of the first host."""
        return self.host == self.hosts[0] and os.environ.get("LOCAL_RANK", "0") == "0"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What there is to do: a command of opfa, its recipe, and what it overrides."""

    command: str
    recipe: Path
    words: Sequence[str]

    @classmethod
    def of(cls, job: Job) -> "Task":
        """What a job says; raises `OpfaError` with all that is wrong with it."""
        given = dict(job.hyperparameters)
        name = given.pop("recipe", None)
        if not isinstance(name, str):
            raise RunError("hyperparameter recipe: is missing; a file or a name of opfa recipes")
        command = command_for(name, _words(given))
        if len(job.hosts) > 1 and command == "finetune":
            what = "fine-tuning is one process; give it one instance"
            raise RunError(f"{name}: is for {len(job.hosts)} hosts, and {what}")
        if len(job.hosts) > 1 and SHARED not in job.channels:
            what = "all of them write resume points to one directory"
            advice = f"give a channel {SHARED!r} of a file system (FSx, EFS)"
            raise RunError(f"{name}: is for {len(job.hosts)} hosts, and {what}; {advice}")
        for channel, path in job.channels.items():
            if channel != SHARED:
                key = _key(command, channel)
                given[key] = _inside(channel, path, key, given.get(key), job.model.parent)
        try:
            any_recipe_of(name, _words(given))
        except OpfaError as error:
            raise RunError(f"hyperparameters: {error}") from None
        return cls(command=command, recipe=find_recipe(name), words=_words(given))


def command_for(recipe: str, words: Sequence[str]) -> str:
    """Which command of opfa a recipe is for, by its sections; the rest of it isn't checked."""
    found = command_of(read_values(find_recipe(recipe), words))
    if found is None:
        any_recipe_of(recipe, words)  # says so
    return found or "finetune"


def _words(given: Mapping[str, Any]) -> list[str]:
    """As on a command line: a text as it stands, so that "1e-4" is the number."""
    return [
        f"{key}={value}" if isinstance(value, str) else words_of({key: value})[0]
        for key, value in given.items()
    ]


def _key(command: str, channel: str) -> str:
    known = CHANNELS[command]
    if channel not in known:
        names = ", ".join((*known, SHARED))
        raise RunError(f"channel {channel!r}: unknown; a job of opfa {command} can have {names}")
    return known[channel]


def _inside(channel: str, path: Path, key: str, given: object, root: Path) -> str:
    """The file or directory of a channel that a key of the recipe means."""
    if not path.is_dir():
        raise RunError(f"channel {channel!r}: {path} is no directory")
    if given is not None:
        found = path / str(given)
        if not found.exists():
            raise RunError(f"{key} = {given}: is not in the channel {channel!r} ({_listed(path)})")
        return str(found)
    if key in ("data", "model.init", "distillation.teacher"):
        archives = list(path.glob("*.tar.gz"))
        if len(archives) == 1 and len(list(path.iterdir())) == 1:
            return str(_unpacked(archives[0], root / "unpacked" / channel))
        return str(path)
    files = [each for each in path.iterdir() if each.is_file()]
    if len(files) != 1:
        what = f"holds {len(files)} files; {key}=NAME says which ({_listed(path)})"
        raise RunError(f"channel {channel!r}: {what}")
    return str(files[0])


def _listed(path: Path) -> str:
    names = sorted(each.name for each in path.iterdir())
    return ", ".join(names[:10]) + (", ..." if names[10:] else "") if names else "it is empty"


def _unpacked(archive: Path, directory: Path) -> Path:
    """A model.tar.gz, such as an earlier job's, in the same place each time; only plain files."""
    shutil.rmtree(directory, ignore_errors=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(directory, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise RunError(f"{archive}: can't be unpacked: {error}") from error
    return directory
