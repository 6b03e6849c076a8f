"""A finished run: `done.json`, and whether its files are still those that it lists.

Older versions' runs list no files; they have SHA-256 of the model's weights alone.
"""

from pathlib import Path
from typing import Any

from opfa.errors import ModelError, RunError
from opfa.storage import seal

FILE = "done.json"
MODEL = "model/"
RECORDS = ("recipe.toml", "environment.json", "metrics.jsonl", "results.json")


def write(run: Path, facts: dict[str, Any]) -> None:
    """Mark a run as complete."""
    model = seal.files_of(run / "model")
    files = {f"{MODEL}{name}": digest for name, digest in model.items()} | _records(run)
    seal.write_sealed(run / FILE, {**facts, seal.FILES: files})


def read(run: Path) -> dict[str, Any]:
    """What a finished run says of itself. Raises `RunError` if files that describe it changed."""
    path = run / FILE
    done = seal.read_json(path)
    for key, kind in (("step", int), ("model_sha256", str)):
        if not isinstance(done.get(key), kind):
            raise RunError(f"{path}: is damaged: has no {key!r}")
    known = {name: digest for name, digest in files(done).items() if name in RECORDS}
    now = {name: digest for name, digest in _records(run).items() if name in known}
    if found := seal.differences(known, now):
        raise RunError(f"{run}: not as the run left it: {found} (SHA-256 in {FILE})")
    return done


def check(run: Path) -> dict[str, Any]:
    """`read`, and `ModelError` where the model is there and not what the run wrote."""
    done = read(run)
    model = run / "model"
    if model.is_dir() and (changed := changed_model(model)):
        what = f"its files are not those that the run wrote and evaluated: {changed}"
        raise ModelError(f"{model}: {what} (SHA-256 in {run / FILE})")
    return done


def files(done: dict[str, Any]) -> dict[str, str]:
    """The files that a `done.json` lists; none in an older version's."""
    return done.get(seal.FILES, {})


def model_files(done: dict[str, Any]) -> dict[str, str]:
    """Those of the model, by their names in its directory."""
    listed = files(done)
    return {name.removeprefix(MODEL): listed[name] for name in listed if name.startswith(MODEL)}


def changed_model(directory: Path) -> str:
    """How RUN/model differs from what its run wrote; empty where it doesn't or no run says."""
    path = directory.absolute().parent / FILE
    if directory.absolute().name != "model" or not path.is_file():
        return ""
    known = model_files(seal.read_json(path))
    return seal.differences(known, seal.model_files(directory, known)) if known else ""


def _records(run: Path) -> dict[str, str]:
    paths = (run / name for name in RECORDS)
    return {path.name: seal.digest(path) for path in paths if path.is_file()}
