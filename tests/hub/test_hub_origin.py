"""Downloads from a Hub, imitated on loopback: through its cache, checked against the manifest or
the Hub's own listing.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import servers
from huggingface_hub import close_session, constants, try_to_load_from_cache
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from servers import COMMIT, Handler, Server, hub, release, serving
from test_download import FILES, PROXIES, WEIGHTS, files_in, impatient, patient

from opfa.errors import ModelError, OpfaError, RunError
from opfa.hub.download import download
from opfa.hub.transfer import Meter

NAME = "org/tiny"
WEIGHTS_PATH = f"/{NAME}/resolve/{COMMIT}/model.safetensors"
MANIFEST_PATH = f"/{NAME}/resolve/main/release.json"
PLAIN = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"import os",
    ".gitattributes": b"*",
    "README.md": b"# tiny",
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in (*PROXIES, *map(str.upper, PROXIES), "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    impatient(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    close_session()
    yield
    close_session()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(hub(NAME, release(FILES), large=("model.safetensors",))) as running:
        yield running


@pytest.fixture
def bare() -> Iterator[Server]:
    """A Hub whose repository has no release manifest."""
    with serving(hub(NAME, PLAIN, large=("model.safetensors",))) as running:
        yield running


def offline(tmp_path: Path, output: str) -> subprocess.CompletedProcess[str]:
    """The command in a program of its own that may not ask any Hub."""
    settings = patient(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, "-m", "opfa", "download", NAME, "--output", str(tmp_path / output)]
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)


def test_a_release_arrives_and_the_cache_has_it(server: Server, tmp_path: Path) -> None:
    facts = download(NAME, tmp_path / "out", endpoint=server.url)
    manifest = server.content[MANIFEST_PATH]
    assert files_in(tmp_path / "out") == release(FILES)
    assert facts.manifest_sha256 == hashlib.sha256(manifest).hexdigest()
    cached = try_to_load_from_cache(NAME, "model.safetensors", revision="main")
    assert isinstance(cached, str) and Path(cached).read_bytes() == WEIGHTS
    assert not (tmp_path / "out/model.safetensors").is_symlink()
    assert (tmp_path / "out/model.safetensors").stat().st_nlink == 1


def test_the_mirror_is_found_by_hf_endpoint(server: Server, tmp_path: Path) -> None:
    settings = patient(HF_ENDPOINT=server.url, HF_HUB_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, "-m", "opfa", "download", NAME, "--output", str(tmp_path / "out")]
    subprocess.run(command, env=settings, check=True)
    assert files_in(tmp_path / "out") == release(FILES)


def test_a_hub_is_asked_through_a_proxy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url)
    download(NAME, tmp_path / "out", endpoint="http://hub.invalid")
    assert files_in(tmp_path / "out") == release(FILES)


def test_a_second_download_asks_for_no_weights(server: Server, tmp_path: Path) -> None:
    download(NAME, tmp_path / "out", endpoint=server.url)
    download(NAME, tmp_path / "again", endpoint=server.url)
    assert len(server.ranges(WEIGHTS_PATH)) == 1


def test_offline_it_comes_from_the_cache(server: Server, tmp_path: Path) -> None:
    download(NAME, tmp_path / "out", endpoint=server.url)
    done = offline(tmp_path, "again")
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "again") == release(FILES)


def test_offline_without_a_cache_is_one_message(tmp_path: Path) -> None:
    done = offline(tmp_path, "out")
    assert done.returncode == 2
    assert "org/tiny: not available from the Hub" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def blob_of(file: str) -> Path:
    cached = try_to_load_from_cache(NAME, file, revision="main")
    assert isinstance(cached, str)
    return Path(cached).resolve()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "release.json"])
def test_a_damaged_cache_is_mended(server: Server, tmp_path: Path, file: str) -> None:
    download(NAME, tmp_path / "out", endpoint=server.url)
    blob_of(file).write_bytes(blob_of(file).read_bytes()[::-1])
    download(NAME, tmp_path / "again", endpoint=server.url)
    assert files_in(tmp_path / "again") == release(FILES)


def test_offline_a_damaged_cache_is_told(server: Server, tmp_path: Path) -> None:
    download(NAME, tmp_path / "out", endpoint=server.url)
    blob_of("model.safetensors").write_bytes(WEIGHTS[::-1])
    done = offline(tmp_path, "again")
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE forbids" in done.stderr
    assert not (tmp_path / "again").exists()


def test_a_hub_that_sends_something_else_is_refused(server: Server, tmp_path: Path) -> None:
    server.content[WEIGHTS_PATH] = WEIGHTS[::-1]
    with pytest.raises(ModelError, match=r"model.safetensors has another SHA-256"):
        download(NAME, tmp_path / "out", endpoint=server.url)
    assert len(server.ranges(WEIGHTS_PATH)) == 2
    assert not (tmp_path / "out").exists()


def test_a_hub_that_offers_more_than_the_manifest_says_is_refused(
    server: Server, tmp_path: Path
) -> None:
    server.content[WEIGHTS_PATH] = WEIGHTS * 2
    with pytest.raises(ModelError, match="would send 600,000 bytes, but at most 300,000"):
        download(NAME, tmp_path / "out", endpoint=server.url)
    held = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(held) < 1 << 17


@pytest.mark.parametrize("path", [WEIGHTS_PATH, MANIFEST_PATH])
def test_an_endless_answer_is_cut_off(server: Server, tmp_path: Path, path: str) -> None:
    server.always[path] = servers.endless
    with pytest.raises(ModelError, match="sends more than the"):
        download(NAME, tmp_path / "out", endpoint=server.url)
    held = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(held) < 1 << 20


@pytest.mark.parametrize("odd", [servers.cut(100_000), servers.reset(100_000), servers.status(503)])
def test_one_misbehaviour_costs_nothing(server: Server, tmp_path: Path, odd: servers.Odd) -> None:
    server.script[WEIGHTS_PATH] = [odd]
    download(NAME, tmp_path / "out", endpoint=server.url)
    assert files_in(tmp_path / "out") == release(FILES)


def test_a_hub_that_always_fails_is_given_up(server: Server, tmp_path: Path) -> None:
    server.always[WEIGHTS_PATH] = servers.status(503)
    with pytest.raises(RunError, match="503 Service Unavailable"):
        download(NAME, tmp_path / "out", endpoint=server.url)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"ETag": '"../../../evil"', "X-Repo-Commit": COMMIT}, "'../../../evil' as ETag"),
        ({"ETag": '"abc"', "X-Repo-Commit": "../../evil"}, "'../../evil' as commit"),
    ],
)
def test_a_header_that_would_lead_out_of_the_cache_is_refused(
    server: Server,
    tmp_path: Path,
    header: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def send(self: Handler, content: bytes) -> None:
        self.start(200, len(content), **header)
        if self.command == "GET":
            self.wfile.write(content)

    monkeypatch.setattr(Handler, "send", send)
    with pytest.raises(ModelError, match=message):
        download(NAME, tmp_path / "out", endpoint=server.url)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


def test_a_file_that_the_repository_lacks_is_named(server: Server, tmp_path: Path) -> None:
    del server.content[WEIGHTS_PATH]
    with pytest.raises(ModelError, match=r"lists model.safetensors, which the repository doesn't"):
        download(NAME, tmp_path / "out", endpoint=server.url)


def test_an_unknown_repository_is_one_message(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="org/other: not available from the Hub"):
        download("org/other", tmp_path / "out", endpoint=server.url)


def test_an_endpoint_that_is_no_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not the URL of a Hub"):
        download(NAME, tmp_path / "out", endpoint="hub.example.com")


def test_without_a_manifest_data_are_taken_and_held_to_the_listing(
    bare: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    facts = download(NAME, tmp_path / "out", endpoint=bare.url)
    taken = ("config.json", "model.safetensors", "README.md")
    assert files_in(tmp_path / "out") == {name: PLAIN[name] for name in taken}
    assert facts.manifest_sha256 is None
    assert "has no release.json; checked against the Hub's own listing" in caplog.text


def test_weights_as_a_pickle_are_taken_only_where_there_are_no_others(
    bare: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    files = {name: content for name, content in PLAIN.items() if name != "model.safetensors"}
    bare.content = hub(NAME, files)
    download(NAME, tmp_path / "out", endpoint=bare.url)
    assert set(files_in(tmp_path / "out")) == {"config.json", "pytorch_model.bin", "README.md"}
    assert "has no safetensors; takes pytorch_model.bin" in caplog.text


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_what_differs_from_the_listing_is_refused(bare: Server, tmp_path: Path, file: str) -> None:
    path = f"/{NAME}/resolve/{COMMIT}/{file}"
    bare.content[path] = bare.content[path][::-1]
    with pytest.raises(ModelError, match=f"{file} has another"):
        download(NAME, tmp_path / "out", endpoint=bare.url)
    assert not (tmp_path / "out").exists()


def test_without_a_manifest_it_also_works_offline(bare: Server, tmp_path: Path) -> None:
    download(NAME, tmp_path / "out", endpoint=bare.url)
    done = offline(tmp_path, "again")
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "again") == files_in(tmp_path / "out")
    blob_of("config.json").write_bytes(b'{"model_type": "trap"}')
    assert offline(tmp_path, "third").returncode == 2


def test_a_hub_that_redirects_to_plain_http_is_refused(server: Server, tmp_path: Path) -> None:
    server.always[WEIGHTS_PATH] = servers.status(302, Location="http://example.com/x")
    with pytest.raises(RunError, match="redirects to http://example.com/x, which is not https"):
        download(NAME, tmp_path / "out", endpoint=server.url)


@pytest.mark.parametrize("done", [(60, 100), (60, 101)])
def test_the_meter_serves_as_a_bar_for_the_xet_storage_too(done: tuple[int, int]) -> None:
    meter = Meter.of("a file", 100)
    is_too_much = done[-1] > 100
    expected = pytest.raises(ModelError) if is_too_much else contextlib.nullcontext()
    with (
        XetDownloadProgressReporter(
            reconstruction_desc="", total=100, log_level=20, tqdm_class=meter
        ) as reporter,
        expected,
    ):
        for num_bytes in done:
            report = SimpleNamespace(
                total_bytes=100,
                total_bytes_completed=num_bytes,
                total_bytes_completion_rate=1.0,
                total_transfer_bytes_completed=num_bytes * 2,  # the wire may carry more
                total_transfer_bytes_completion_rate=None,
            )
            reporter.update_progress(report)


LISTING = f"/api/models/{NAME}/revision/main"
ROW = {"rfilename": "config.json", "size": 1, "blobId": "0" * 40}


@pytest.mark.parametrize(
    "listing",
    [
        b"", b"<html>", b"[]", b"null", b"{}", b'{"id": 3}',
        {"siblings": None}, {"siblings": []}, {"siblings": 3}, {"siblings": [{}]},
        {"siblings": [{**ROW, "rfilename": "../evil.json"}]},
        {"siblings": [{**ROW, "rfilename": "/tmp/evil.json"}]},
        {"siblings": [{**ROW, "rfilename": "a\\..\\evil.json"}]},
        {"siblings": [{**ROW, "rfilename": 7}]},
        {"siblings": [{**ROW, "size": None}]}, {"siblings": [{**ROW, "size": "9"}]},
        {"siblings": [{**ROW, "size": -1}]}, {"siblings": [{**ROW, "blobId": None}]},
        {"siblings": [{**ROW, "blobId": "../evil"}]}, {"siblings": [{**ROW, "lfs": {"size": 1}}]},
        {"siblings": [{**ROW, "rfilename": f"{i}.json"} for i in range(1001)]},
        {"siblings": [ROW], "sha": "../../evil"}, {"siblings": [ROW], "sha": None},
        {"siblings": [{**ROW, "size": 1 << 60}]},
    ],
)  # fmt: skip
def test_a_listing_that_is_none_is_one_message(
    bare: Server, tmp_path: Path, listing: bytes | dict[str, object]
) -> None:
    if isinstance(listing, dict):
        listing = json.dumps({"id": NAME, "sha": COMMIT, **listing}).encode()
    bare.content[LISTING] = listing
    with pytest.raises(OpfaError) as error:
        download(NAME, tmp_path / "out", endpoint=bare.url)
    assert ("leads out" in str(error.value)) == (b"evil.json" in listing)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
