"""Secrets: passwords, tokens and keys are in nothing that is written or shown, and what only looks
like one is left as it is.
"""

import io
import json
import logging
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import finetune_recipe
from hypothesis import example, given, settings
from hypothesis import strategies as some

from opfa.commands import app as cli
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import Redacting, brief, first_line, redacted
from opfa.storage.files import write_text
from opfa.training.run import Run

SECRETS = {
    "https://user:hunter2@host/x": "https://***@host/x",
    "https://user:p@ss/w:rd@host/x": "https://***@host/x",
    "https://user:p%40ss@host/x?token=abc&x=1": "https://***@host/x?token=***&x=1",
    "https://user:1234567@host:8080/": "https://***@host:8080/",
    "https://user:a b@host/x": "https://***@host/x",
    "https://user:a?b#c@host": "https://***@host",
    "https://sometoken@host/x": "https://***@host/x",
    "s3://KEY:SEC/RET+x@bucket/p": "s3://***@bucket/p",
    r"https:\/\/user:pw@host\/x": r"https:\/\/***@host\/x",
    "in 'https://user:pw@host/x': 404": "in 'https://***@host/x': 404",
    "?next=https%3A%2F%2Fuser%3Apw%40host%2Fx": "?next=https%3A%2F%2F***%40host%2Fx",
    "task.hub=https://user:pw@host\nand more": "task.hub=https://***@host\nand more",
    "?X-Amz-Signature=abc&X-Amz-Credential=AK/us&x=1": (
        "?X-Amz-Signature=***&X-Amz-Credential=***&x=1"
    ),
    "https://host/x?se=1&sig=ab%2Fc&sp=r": "https://host/x?se=1&sig=***&sp=r",
    "api_key=abc": "api_key=***",
    "x.API-KEY=abc": "x.API-KEY=***",
    "HF_TOKEN=abc WANDB_API_KEY=abc": "HF_TOKEN=*** WANDB_API_KEY=***",
    "AWS_SECRET_ACCESS_KEY=abc/def+x": "AWS_SECRET_ACCESS_KEY=***",
    "password = hunter2": "password = ***",
    'password="a b c" rest': 'password="***" rest',
    r'{"password": "a\"b", "x": 1}': '{"password": "***", "x": 1}',
    r"{\"password\": \"abc\", \"x\": 1}": r"{\"password\": \"***\", \"x\": 1}",
    "{'token': 'abc', 'tokens': 'all'}": "{'token': '***', 'tokens': 'all'}",
    "Authorization: Bearer abcdef.ghi": "Authorization: Bearer ***",
    "model.init=hf_abcdefghijklmnopqrstuvwx": "model.init=hf_***",
    "ghp_abcdefghijklmnopqrstuvwx": "ghp_***",
    "AKIAABCDEFGHIJKLMNOP": "AKIA***",
}
NONE = [
    *("https://host:8080/x@main/file", "https://host/x@main/file", "https://[::1]:8080/a@b"),
    *("hf://datasets/x@main/file", "file:///home/u@x/f", "/data//x@main/file", "user@example.org"),
    *("http://localhost:8080: refused by a@b", "see https://example.org: ask a@b"),
    *(
        "sequence_tokens=128",
        "tokenizer=x",
        "pad_token=[PAD]",
        "mask_token: [MASK]",
        "x.tokens=all",
    ),
    *("--embeddings same", "bos_token_id=3", "special_tokens_map.json", "models/hf_checkpoints/x"),
    *(
        "task.password: unknown key; did you mean",
        "Unexpected token: foo",
        "token: 3",
        "task.token=",
    ),
    *(
        "num_tokens = 3",
        "task.text=password",
        "task.label=token",
        "next=https%3A%2F%2Fh%2Fx%40main",
    ),
    *('task.text=secret \'task.classes=["key", "token"]\'', "sk-learn-and-other-libraries-in-use"),
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_hidden(text: str) -> None:
    assert redacted(text) == SECRETS[text]
    assert redacted(SECRETS[text]) == SECRETS[text]


@pytest.mark.parametrize("text", NONE)
def test_what_only_looks_like_a_secret_is_shown(text: str) -> None:
    assert redacted(text) == text


PARTS = (
    "https://",
    "user",
    ":",
    "pw",
    "@",
    "/",
    "token=",
    "&",
    '"',
    "'",
    "\\",
    " ",
    "password",
    "***",
)


@settings(max_examples=300, deadline=None)
@example('token="token=\\"')
@given(some.lists(some.sampled_from(PARTS), max_size=12).map("".join))
def test_what_is_redacted_stays_as_it_is_when_it_is_redacted_again(text: str) -> None:
    assert redacted(redacted(text)) == redacted(text)


def test_values_of_json_keep_their_shape() -> None:
    value = {"password": "x", "a": ["https://u:p@h", 3, None], "pad_token": "[PAD]", "token": 5}
    hidden = {"password": "***", "a": ["https://***@h", 3, None], "pad_token": "[PAD]", "token": 5}
    assert redacted(value) == hidden


def test_what_the_environment_keeps_secret_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("https_proxy", "http://me:pass:w@rd@proxy:3128")
    monkeypatch.setenv("SHORT_TOKEN", "test")
    monkeypatch.setenv("FILE_TOKEN", "/var/run/token")
    text = "a 0123456789abcdef of me:pass:w@rd, pass:w@rd, test at /var/run/token"
    assert redacted(text) == "a *** of ***, ***, test at /var/run/token"


def test_a_message_is_redacted_before_it_is_cut() -> None:
    text = "https://user:" + "p" * 300 + "@host/x"
    assert brief(text, 20) == "https://***@host/x"
    assert first_line(OSError("x" * 480 + text)) == "x" * 480 + "https://***@host/x"[:20]


# runs

LOGIN = "https://me:hunter2@host/x?token=s3cr3t-token"
KEY = "0123456789abcdef0123456789abcdef01234567"
NAME = f"name={LOGIN} {KEY}"
HIDDEN = ("hunter2", "s3cr3t", KEY, "pr0xypass")


def assert_hidden(text: str | bytes) -> None:
    text = text if isinstance(text, bytes) else text.encode()
    assert not [secret for secret in HIDDEN if secret.encode() in text]


@pytest.fixture(scope="module")
def labelled(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples whose classes look like secrets."""
    directory = tmp_path_factory.mktemp("labelled")
    for name in ("train", "validation"):
        text = (examples / f"{name}.jsonl").read_text()
        (directory / f"{name}.jsonl").write_text(text.replace('"cat"', '"token=cat"'))
    return directory


@pytest.fixture(scope="module")
def secretive(sparse: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose recipe has secrets, and what it said."""
    directory = tmp_path_factory.mktemp("secretive")
    recipe = finetune_recipe(sparse, labelled, training={"epochs": 0.2})
    write_text(directory / "recipe.toml", recipe.to_toml())
    command = ["finetune", "recipe.toml", "--output", "run", NAME]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["opfa", *command])
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("HTTPS_PROXY", "http://me:pr0xypass@proxy:1")
        shown = Redacting(said)  # as main() has it
        handler = logging.StreamHandler(shown)
        logging.getLogger("opfa").addHandler(handler)
        patch.chdir(directory)
        patch.setattr("sys.stdout", shown)
        assert cli.run(command) == 0
    logging.getLogger("opfa").removeHandler(handler)
    (directory / "said").write_text(said.getvalue())
    return directory


def test_no_secret_is_in_any_file_of_a_run_nor_in_what_it_says(secretive: Path) -> None:
    files = [path for path in secretive.rglob("*") if path.is_file()]
    assert {"environment.json", "results.json", "recipe.toml", "said"} <= {p.name for p in files}
    for path in files:
        assert_hidden(path.read_bytes())
    for name in ("recipe.toml", "environment.json", "results.json"):
        assert "https://***@host" in (secretive / "run" / name).read_text()
    assert "https://***@host" in (secretive / "said").read_text()


def test_wandb_is_told_no_secret(
    secretive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr("wandb.init", lambda **given: told.update(given))
    values = tomllib.loads((secretive / "recipe.toml").read_text())
    recipe = FinetuneRecipe.check({**values, "name": LOGIN})
    Run(tmp_path / "run", recipe, steps=1).start_wandb("offline", f"x?token={KEY}", LOGIN)
    assert told["group"] == "https://***@host/x?token=***"
    assert_hidden(str(told))


def test_what_libraries_see_and_print_is_redacted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        seen.extend([arguments, sys.argv[1:]])
        print(LOGIN)
        print(LOGIN, file=sys.stderr)
        return 0

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr("sys.argv", ["opfa", "list", LOGIN])
    monkeypatch.setattr("sys.stdout", sys.stdout)
    monkeypatch.setattr("sys.stderr", sys.stderr)
    monkeypatch.setattr(cli, "_leave", lambda _: None)
    monkeypatch.setattr(cli, "secure", lambda: None)  # it would take pytest's streams apart
    cli.main()
    assert seen == [["list", LOGIN], ["list", "https://***@host/x?token=***"]]
    said = capsys.readouterr()
    assert_hidden(said.out + said.err)
    assert "https://***@host" in said.out
    assert "https://***@host" in said.err


def test_classes_and_predictions_are_never_altered(
    secretive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, answers = secretive / "run", tmp_path / "answers.jsonl"
    recipe = str(run / "recipe.toml")
    command = ["evaluate", str(run / "model"), "--recipe", recipe, "--predictions", str(answers)]
    assert cli.run(command) == 0
    assert '"token=cat"' in answers.read_text()
    form = ("--format", "compact")
    assert cli.run(["release", str(run), "--output", str(tmp_path / "out"), *form]) == 0
    assert "token=cat" in json.loads((tmp_path / "out/config.json").read_text())["label2id"]
    assert_hidden(capsys.readouterr().out)
    for path in (tmp_path / "out").iterdir():
        assert_hidden(path.read_bytes())


def test_a_run_resumes_with_its_recipe_and_with_the_redacted_one(
    secretive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--output", str(secretive / "run"), "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", KEY)
        assert cli.run(["finetune", str(secretive / "recipe.toml"), NAME, *command]) == 0
    assert cli.run(["finetune", str(secretive / "run/recipe.toml"), *command]) == 0
    other = ["finetune", str(secretive / "run/recipe.toml"), "name=https://u:hunter2@other"]
    assert cli.run([*other, *command]) == 2
    said = capsys.readouterr().err
    assert "name was 'https://***@host" in said
    assert "is 'https://***@other'" in said


def test_a_traceback_and_a_message_are_redacted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["inspect", LOGIN],
        ["download", LOGIN, "--output", str(tmp_path / "out")],
        ["finetune", str(tmp_path / LOGIN), "--output", str(tmp_path / "run")],
        ["list", "--endpoint", LOGIN],
        ["evaluate", LOGIN, "--recipe", LOGIN],
    ):
        assert cli.run([*command, "--verbose"]) == 2
        assert_hidden(capsys.readouterr().err)


def test_the_digest_of_a_recipe_is_that_of_its_redacted_text(sparse: Path, examples: Path) -> None:
    with_secret = finetune_recipe(sparse, examples, name="https://u:p@h/x")
    with_another = finetune_recipe(sparse, examples, name="https://u:q@h/x")
    assert with_secret.sha256() == with_another.sha256()
    assert with_secret.name == "https://u:p@h/x"
    path = examples / "redacted.toml"
    path.write_text(with_secret.to_toml())
    assert FinetuneRecipe.read(path).sha256() == with_secret.sha256()
