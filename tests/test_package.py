"""What a clone and a wheel hold: rooms, recipes, the index of models; and nothing else on top."""

import subprocess
import sys
import tomllib
from pathlib import Path, PurePath
from zipfile import ZipFile

import pytest
from conftest import SLOW

from opfa.storage import shipped as place
from opfa.storage.shipped import shipped

ROOT = Path(__file__).parents[1]
TOP = {"pyproject.toml", "opfa", "recipes", "launch", "tests", "model_cards", "README.md"}
TOP |= {"LICENSE", "CHANGELOG.md"}
CHECK = """
import opfa
from opfa.downstream.recipe import FinetuneRecipe
from opfa.hub.index import released
from opfa.storage.shipped import find_recipe, shipped
assert FinetuneRecipe.read(shipped("recipes/quickstart/finetune.toml")) and released()
assert FinetuneRecipe.read(find_recipe("sst2"))
assert shipped("recipes/schema/finetune.json").is_file()
print(opfa.__file__)
"""

USE = """
import sys
from functools import partial

OPTIONAL = {"datasets", "deepspeed", "matplotlib", "nupunkt", "onnx", "onnxruntime", "onnxscript"}
OPTIONAL |= {"pandas", "peft", "sentence_transformers", "wandb"}

class Without:  # finds what an environment without extras has
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        is_missing = name.partition(".")[0] in OPTIONAL
        return None if is_missing else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        found = getattr(self.finder, name)
        return partial(self.installed, found) if name == "find_distributions" else found
    def installed(self, find, *context):
        return (each for each in find(*context) if each.name.lower() not in OPTIONAL)

sys.meta_path[:] = map(Without, sys.meta_path)
from opfa.commands.app import run

model, data = sys.argv[1:]
own = [f"task.train={data}/train.jsonl", "task.text=text", "task.label=label"]
assert run(["new", "my-csv", "mine.toml", *own, f"model.init={model}"]) == 0
finetune = ["finetune", "mine.toml", "--output", "mine", "task.sequence_tokens=24"]
assert run(["check", "sst2"]) == 0
assert run([*finetune, "training.epochs=1"]) == 0
assert run(["evaluate", "mine"]) == 0
assert run(["predict", "mine", f"{data}/validation.jsonl", "--output", "said.csv"]) == 0
assert run(["inspect", "mine", "--page", "zeros.html"]) == 0
assert not OPTIONAL & {name.partition(".")[0] for name in sys.modules}
finetune[3] = "other"
for command in (
    ["inspect", "mine", "--plot", "a.png"],
    [*finetune, "logging.wandb=offline"],
    ["finetune", "sst2", "--output", "other", "task.hub=a/b"],
    ["export", "mine", "--output", "a.onnx"],
    ["quickstart", "--output", "quick"],
    ["bench", "train"],
):
    assert run(command) == 2, command
"""
SAID = """\
--plot a.png needs matplotlib: pip install "opfa[plots]"
logging.wandb = 'offline' needs wandb: pip install "opfa[wandb]"
task.hub = 'a/b' needs datasets: pip install "opfa[datasets]"
an ONNX file needs onnx: pip install "opfa[export]"
opfa quickstart needs deepspeed: pip install "opfa[pretrain]"
pre-training needs datasets: pip install "opfa[pretrain]"
"""


def tracked() -> list[PurePath]:
    """All files of the repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    return [PurePath(name) for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def test_nothing_else_stands_at_the_top() -> None:
    names = {path.parts[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} <= TOP


def test_no_file_is_a_link() -> None:
    assert not [path for path in tracked() if (ROOT / path).is_symlink()]


def test_the_list_of_packages_has_every_room() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {path.parent.relative_to(ROOT) for path in (ROOT / "opfa").rglob("__init__.py")}
    mapped = set(settings["package-dir"])
    assert set(settings["packages"]) == {".".join(room.parts) for room in rooms} | mapped


def test_shipped_files_are_found_in_a_clone_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shipped("recipes/quickstart").samefile(ROOT / "recipes/quickstart")
    monkeypatch.setattr(place, "PACKAGE", tmp_path / "site/opfa")
    for folder in ("site/recipes", "site/opfa/recipes"):  # a stranger's, then ours
        (tmp_path / folder).mkdir(parents=True)
    assert shipped("recipes") == tmp_path / "site/opfa/recipes"


def test_every_slow_test_is_there() -> None:
    for file, _, test in (name.partition("::") for name in SLOW):
        assert f"def {test}" in (ROOT / "tests" / file).read_text()


@pytest.mark.slow
def test_a_wheel_has_all_files_and_works_without_extras(
    sparse: Path, examples: Path, tmp_path: Path
) -> None:
    for path in tracked():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_bytes((ROOT / path).read_bytes())
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    source = tmp_path / "source"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    found = {path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*.*")}
    results = Path("opfa/bench/results")  # evidence of a README, which a wheel has not
    expected = {p for p in tracked() if p.parts[0] == "opfa" and p.name != "README.md"}
    expected = {p for p in expected if p.parent != results and p.name != "FORMAT.md"}
    recipes = {Path("opfa", path) for path in tracked() if path.match("recipes/*/*.toml")}
    assert {Path(path) for path in expected} | recipes <= found
    program = [sys.executable, "-P", "-c", CHECK]
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    used = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert used.stdout.strip() == str(tmp_path / "site/opfa/__init__.py")
    (tmp_path / "empty").mkdir()
    program = [sys.executable, "-P", "-c", USE, str(sparse), str(examples)]
    where = {"cwd": tmp_path / "empty", "env": environment | {"HOME": str(tmp_path)}}
    used = subprocess.run(program, **where, capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr
    refused = [line for line in used.stderr.splitlines() if line.startswith("opfa: ")]
    assert refused == [f"opfa: {line}" for line in SAID.splitlines()]
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {
        "mine",
        "mine.toml",
        "said.csv",
        "zeros.html",
    }
