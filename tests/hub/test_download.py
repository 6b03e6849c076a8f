"""Downloads from a web server that misbehaves, from directories, through proxies: whole or not at
all.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import servers
from conftest import outside
from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import _http
from servers import Server, release, serving

from opfa.commands import app as cli
from opfa.errors import ModelError, OpfaError, RunError
from opfa.hub import index, manifest, transfer
from opfa.hub.download import download
from opfa.storage.seal import digest

WEIGHTS = random.Random(0).randbytes(300_000)
FILES = {"config.json": b'{"model_type": "bert"}', "model.safetensors": WEIGHTS}
PATH = "/m/model.safetensors"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing wait before it asks again."""
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)
    impatient(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    close_session()
    yield
    close_session()


@pytest.fixture
def server() -> Iterator[Server]:
    content = {f"/m/{name}": content for name, content in release(FILES).items()}
    with serving(content) as running:
        yield running


def files_in(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def command(server: Server, output: Path) -> list[str]:
    return [sys.executable, "-m", "opfa", "download", f"{server.url}/m", "--output", str(output)]


def patient(**settings: str) -> dict[str, str]:
    """The environment for a program of its own, without proxies."""
    kept = {k: v for k, v in outside().items() if k.lower() not in PROXIES}
    return {**kept, "HF_HUB_DOWNLOAD_TIMEOUT": "20", **settings}


def test_a_release_arrives_as_it_is(server: Server, tmp_path: Path) -> None:
    facts = download(f"{server.url}/m/", tmp_path / "deep/out")
    assert files_in(tmp_path / "deep/out") == release(FILES)
    assert (facts.files, facts.bytes) == (2, sum(map(len, FILES.values())))
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep/out"]
    manifest.check(tmp_path / "deep/out")


@pytest.mark.parametrize(
    "odd",
    [
        servers.cut(100_000), servers.reset(100_000), servers.stall(100_000), servers.cut(0),
        servers.status(429, Retry_After="0"), servers.status(503), servers.status(502),
        servers.status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), servers.without_length,
        servers.instead(WEIGHTS[:1000]), servers.instead(WEIGHTS[::-1]), servers.elsewhere,
    ],
)  # fmt: skip
def test_one_misbehaviour_costs_nothing(server: Server, tmp_path: Path, odd: servers.Odd) -> None:
    server.script[PATH] = [odd]
    download(f"{server.url}/m", tmp_path / "out")
    assert files_in(tmp_path / "out") == release(FILES)


def test_all_misbehaviours_after_another_end_complete(server: Server, tmp_path: Path) -> None:
    server.script["/m/release.json"] = [servers.status(503), servers.cut(20), servers.stall(5)]
    server.script["/m/config.json"] = [servers.cut(3), servers.status(429), servers.cut(2)]
    server.script[PATH] = [
        servers.status(503), servers.cut(100_000), servers.whole, servers.reset(10),
        servers.stall(9),
    ]  # fmt: skip
    download(f"{server.url}/m", tmp_path / "out")
    assert files_in(tmp_path / "out") == release(FILES)


def test_a_long_file_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(25 << 20)  # huggingface_hub writes 10 MB at a time
    server.content |= {f"/l/{k}": v for k, v in release({"model.safetensors": content}).items()}
    server.script["/l/model.safetensors"] = [servers.cut(12 << 20)]
    download(f"{server.url}/l", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == content
    assert server.ranges("/l/model.safetensors")[:2] == [None, f"bytes={10 << 20}-"]


@pytest.mark.parametrize("odd", [servers.cut(1000), servers.reset(1000), servers.status(503)])
def test_a_server_that_always_fails_is_given_up_and_nothing_is_left(
    server: Server, tmp_path: Path, odd: servers.Odd
) -> None:
    server.always[PATH] = odd
    with pytest.raises(RunError, match=r"m/model.safetensors: not available from its server: ."):
        download(f"{server.url}/m", tmp_path / "out")
    assert 5 < len(server.ranges(PATH)) < 50
    assert not list(tmp_path.iterdir())


def test_a_server_without_ranges_that_always_hangs_up_is_given_up(
    server: Server, tmp_path: Path
) -> None:
    def always(handler: servers.Handler, content: bytes) -> None:
        handler.start(200, len(content))
        handler.wfile.write(content[: 11 << 20])
        handler.close_connection = True

    content = bytes(12 << 20)
    server.content |= {f"/l/{k}": v for k, v in release({"model.safetensors": content}).items()}
    server.always["/l/model.safetensors"] = always
    with pytest.raises(RunError, match="breaks off again and again"):
        download(f"{server.url}/l", tmp_path / "out")
    assert len(server.ranges("/l/model.safetensors")) == transfer.ATTEMPTS + 1


def test_a_long_pause_is_reported_instead_of_waited_for(server: Server, tmp_path: Path) -> None:
    server.always[PATH] = servers.status(429, Retry_After="3600")
    with pytest.raises(RunError, match=r"HTTP 429, and the server asks to come back in 3600 s"):
        download(f"{server.url}/m", tmp_path / "out")


def test_what_a_killed_process_left_is_not_mixed_in(server: Server, tmp_path: Path) -> None:
    server.script[PATH] = [servers.stall(100_000)]
    output = tmp_path / "out"
    process = subprocess.Popen(command(server, output), env=patient(), stderr=subprocess.DEVNULL)
    partial = tmp_path / ".out.incomplete/files/config.json"
    while not (partial.exists() and server.ranges(PATH)):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not output.exists()
    partial.write_bytes(b"of another release")
    download(f"{server.url}/m", output)
    assert files_in(output) == release(FILES)
    assert list(tmp_path.iterdir()) == [output]


def test_of_two_processes_the_second_waits_and_finds_it_complete(
    server: Server, tmp_path: Path
) -> None:
    server.script[PATH] = [servers.stall(100_000)]
    processes = [
        subprocess.Popen(
            command(server, tmp_path / "out"), env=patient(), stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    while len(server.ranges("/m/release.json")) < 2 or not server.ranges(PATH):
        time.sleep(0.02)
    time.sleep(0.3)
    server.let_go.set()
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("another process downloads to here; waiting" in text for text in said) == 1
    assert sum("is complete already" in text for text in said) == 1
    assert server.ranges(PATH)[0] is None and len(server.ranges(PATH)) == 2
    assert files_in(tmp_path / "out") == release(FILES)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_output_that_is_complete_already_is_left_as_it_is(
    server: Server, tmp_path: Path
) -> None:
    first = download(f"{server.url}/m", tmp_path / "out")
    assert download(f"{server.url}/m", tmp_path / "out") == first
    assert len(server.ranges(PATH)) == 1


@pytest.mark.parametrize(
    "existing",
    [{}, {"notes.txt": b"mine"}, {**release(FILES), "extra.json": b"{}"},
     {**release(FILES), "config.json": b"{'model_type': 'bert'}"}, FILES],
)  # fmt: skip
def test_another_directory_is_never_touched(
    server: Server, tmp_path: Path, existing: dict[str, bytes]
) -> None:
    (tmp_path / "out").mkdir()
    for name, content in existing.items():
        (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(RunError, match="exists already, and is not this release"):
        download(f"{server.url}/m", tmp_path / "out")
    assert files_in(tmp_path / "out") == existing
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_answer_that_is_too_long_by_its_own_account_is_not_begun(
    server: Server, tmp_path: Path
) -> None:
    server.always[PATH] = servers.instead(WEIGHTS + b"x")
    with pytest.raises(ModelError, match="would send 300,001 bytes, but at most 300,000"):
        download(f"{server.url}/m", tmp_path / "out")
    assert len(server.ranges(PATH)) == 1


def test_an_endless_answer_is_cut_off(server: Server, tmp_path: Path) -> None:
    server.always[PATH] = servers.endless
    with pytest.raises(ModelError, match="sends more than the 300,000 bytes expected"):
        download(f"{server.url}/m", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())


def test_an_endless_manifest_is_cut_off(server: Server, tmp_path: Path) -> None:
    server.always["/m/release.json"] = servers.endless
    with pytest.raises(ModelError, match="sends more than the 1,048,576 bytes expected"):
        download(f"{server.url}/m", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_too_large_for_the_disk_is_not_begun(server: Server, tmp_path: Path) -> None:
    huge = json.loads(server.content["/m/release.json"])
    huge["files"]["model.safetensors"]["size"] = 1 << 49
    server.content["/m/release.json"] = json.dumps(huge).encode()
    with pytest.raises(RunError, match=r"562,949,953,\d+,?\d* bytes are needed"):
        download(f"{server.url}/m", tmp_path / "out")
    assert not server.ranges("/m/config.json")
    assert not list(tmp_path.iterdir())


def test_a_redirect_is_followed(server: Server, tmp_path: Path) -> None:
    server.content["/store"] = WEIGHTS
    server.always[PATH] = servers.status(302, Location="/store")
    server.script["/store"] = [servers.cut(100_000)]
    download(f"{server.url}/m", tmp_path / "out")
    assert files_in(tmp_path / "out") == release(FILES)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://example.com/x", "redirects to http://example.com/x, which is not https"),
        ("file:///etc/passwd", "redirects to file:.*, which is not https"),
        ("ftp://127.0.0.1/x", "which is not https"),
        (PATH, "maximum allowed redirects"),
    ],
)
def test_a_redirect_to_somewhere_unsafe_is_refused(
    server: Server, tmp_path: Path, target: str, message: str
) -> None:
    server.always[PATH] = servers.status(302, Location=target)
    with pytest.raises(RunError, match=message):
        download(f"{server.url}/m", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://example.com/m", "only https:// is accepted"),
        ("file:///tmp", "only https:// is accepted"),
        ("https://", "only https:// is accepted"),
        ("https://[::1/x", "not a URL"),
        ("https://example.com/m?x=1", "without '[?]' and '#'"),
        ("./nowhere", "no such directory"),
        ("a/b/c", "no such directory"),
        ("not a name", "not available from the Hub"),
    ],
)
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        download(name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_password_in_a_url_is_not_shown(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content.clear()
    url = server.url.replace("//", "//me:secret@")
    assert cli.run(["download", f"{url}/m", "--output", str(tmp_path / "out"), "--verbose"]) == 2
    said = capsys.readouterr().err
    assert "404" in said and "secret" not in said


def test_revision_and_endpoint_are_for_the_hub(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--revision and --endpoint are for names of the Hub"):
        download(f"{server.url}/m", tmp_path / "out", revision="main")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"auto_map": {"AutoModel": "modeling.Model"}}', "asks for code of its own .auto_map"),
        (b'{"custom_pipelines": {}}', "remote code is never run"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused(
    server: Server, tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    files = release({"model.safetensors": b"x", file: content})
    server.content |= {f"/c/{name}": content for name, content in files.items()}
    with pytest.raises(ModelError, match=message):
        download(f"{server.url}/c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def written(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def test_a_local_release_is_copied(tmp_path: Path) -> None:
    source = written(tmp_path / "source", release(FILES))
    download(str(source), tmp_path / "out")
    assert files_in(tmp_path / "out") == release(FILES)
    assert not os.path.samefile(source / "config.json", tmp_path / "out/config.json")


def test_a_damaged_local_release_is_refused(tmp_path: Path) -> None:
    files = {**release(FILES), "model.safetensors": WEIGHTS[::-1], "more.py": b"import os"}
    source = written(tmp_path / "source", files)
    with pytest.raises(ModelError, match=r"safetensors has another SHA-256.*more.py is not in"):
        download(str(source), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_a_url_goes_through_a_proxy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url)
    download("http://127.0.0.1:9/m", tmp_path / "out")  # nobody listens there
    assert files_in(tmp_path / "out") == release(FILES)


def test_https_goes_through_a_proxy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setenv("HTTPS_PROXY", server.url)
    monkeypatch.setattr(
        servers.Handler, "do_CONNECT", lambda self: asked.append(self.path), raising=False
    )
    with pytest.raises(OpfaError):
        download("https://models.invalid/m", tmp_path / "out")
    assert asked[0] == "models.invalid:443"


def test_a_proxy_that_is_none_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(RunError, match="this proxy can't be used"):
        download("http://127.0.0.1:9/m", tmp_path / "out")


def test_offline_a_url_is_not_asked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="offline mode is enabled.*HF_HUB_OFFLINE"):
        download(f"{server.url}/m", tmp_path / "out")
    assert not server.asked


def test_an_output_in_a_place_that_is_a_file_is_one_message(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="can't be made: .*file is a file"):
        download(f"{server.url}/m", tmp_path / "file/out")


def indexed(server: Server, place: Path, digest: str | None) -> None:
    row = dict.fromkeys(("sparsity", "bytes", "results", "licence"))
    row |= {"name": "known", "source": f"{server.url}/m", "manifest_sha256": digest}
    place.write_text(json.dumps([{**row, "task": "t", "base_model": "b"}]))


def test_a_known_name_is_got_from_its_source_with_this_manifest_only(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "INDEX", tmp_path / "index.json")
    (tmp_path / "manifest").write_bytes(server.content["/m/release.json"])
    indexed(server, tmp_path / "index.json", digest(tmp_path / "manifest"))
    assert download("known", tmp_path / "out").files == 2
    indexed(server, tmp_path / "index.json", "0" * 64)
    with pytest.raises(ModelError, match=r"is not the one that opfa knows"):
        download("known", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_index_is_valid_and_its_names_are_distinct() -> None:
    models = index.released()
    assert len({model.name for model in models}) == len(models) > 0
    measured = [model for model in models if model.manifest_sha256 is None and model.results]
    assert not measured  # whoever has no manifest was not measured by this project


def test_the_commands_print_figures_and_json(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["download", f"{server.url}/m", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "complete; each file checked against its manifest" in shown
    assert "300,022" in shown and f"opfa inspect {tmp_path}/out" in shown
    arguments = ["download", f"{server.url}/m", "--output", str(tmp_path / "out"), "--json"]
    assert cli.run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 300_022
    assert cli.run(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == [model.name for model in index.released()]
    assert cli.run(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [model.name for model in index.released()]  # whole, to be copied
    assert "    masked language modelling, 85% zeros" in lines
    assert cli.run(["download", "./nowhere", "--output", str(tmp_path / "x")]) == 2
    assert "no such directory" in capsys.readouterr().err
