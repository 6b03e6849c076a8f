"""More than 200 corrupted releases, each served by a real web server: one clear error, nothing
written outside the target, nothing usable left, and no memory used up.
"""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from huggingface_hub import close_session
from servers import Odd, Server, release, serving
from test_download import impatient

from opfa.commands import app as cli

FILES = {"config.json": b'{"model_type": "bert"}', "model.safetensors": bytes(range(256)) * 40}
GOOD = release(FILES)
MANIFEST = GOOD["release.json"]
WEIGHTS = FILES["model.safetensors"]
ENTRY = {"size": 10_240, "sha256": json.loads(MANIFEST)["files"]["model.safetensors"]["sha256"]}
Case = tuple[dict[str, bytes], dict[str, Odd]]  # what is served, and what answers otherwise
NAMES = [
    "../x.json", "../../x.json", "a/../../x.json", "a/..", "..", ".", "", "/", "/x.json",
    "//x.json", "/etc/x.json", "~/x.json", "~root/x.json", "./x.json", "a//x.json", "a/./x.json",
    "a/", "a/x.json/", "a\\x.json", "..\\x.json", "C:\\x.json", "C:x.json", "\\\\host\\x.json",
    "%2e%2e/x.json", "..%2fx.json", "x.json\0", "\0", "x\0.json", "x.json\n", "\nx.json",
    "x\t.json", "x .json", " x.json", "x.json ", "x?.json", "x#.json", "x*.json", "x:y.json",
    "x|y.json", "<x>.json", "x\"y.json", "x'y.json", "$HOME/x.json", "`id`.json", "$(id).json",
    "x;y.json", "x&y.json", "é.json", "\u202ex.json", "\uff0e\uff0e/x.json", "\u2024\u2024/x.json",
    "x\u2215y.json", "\ud800.json", ".x.json", ".ssh/x.json", "a/.git/x.json", ".lock", ".json",
    "x.py", "modeling_bert.py", "x.pyc", "x.so", "x.pkl", "x.pt", "x.pth", "x.ckpt", "x.npy",
    "pytorch_model.bin", "x.h5", "x.msgpack", "x.onnx", "x.sh", "x.exe", "x.zip", "x.tar.gz",
    "x.html", "x", "json", "x.json.py", "x.JSON", "License", "license", "LICENSE.exe",
    "release.json", "RELEASE.json", "Release.json", "x" * 251 + ".json", "a/" * 130 + "x.json",
    "x" * 100_000,
]  # fmt: skip
SIZES: list[Any] = [
    -1, -(1 << 63), 1 << 51, 1 << 63, 1 << 64, 10**30, 1.5, 1e300, 10_240.0, True, None, "10240",
    "", [], {}, [10_240], 0, 1, 10_239, 10_241, 20_480, 1 << 49,
]  # fmt: skip
DIGESTS: list[Any] = [
    None, "", 0, [], {}, "0", "0" * 63, "0" * 65, "g" * 64, ENTRY["sha256"].upper(),
    ENTRY["sha256"] + "\n", " " + ENTRY["sha256"], "0x" + ENTRY["sha256"][2:],
    "sha256:" + ENTRY["sha256"], "٠" * 64, "0" * 64, ENTRY["sha256"][::-1], "f" * 100_000,
]  # fmt: skip
TEXTS = [
    b"", b" ", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"null", b"true", b"0", b'""', b"[]", b"{}",
    b"{]", b"<html><body>Sign in</body></html>", b"version https://git-lfs.github.com/spec/v1\n",
    b"[" * 500_000, b'{"a":' * 100_000, b"9" * 500_000, b'{"format": NaN}', MANIFEST + b"}",
    MANIFEST + MANIFEST, MANIFEST.decode().encode("utf-16"), b"\x1f\x8b" + MANIFEST,
    b" " * (1 << 20) + MANIFEST, b'"' + b"x" * ((1 << 20) - 2) + b'"', b"x" * (3 << 20),
]  # fmt: skip


def served(files: dict[str, bytes] = GOOD, /, **odd: Odd) -> Case:
    return files, {name.replace("_", "."): answer for name, answer in odd.items()}


def listing(**changes: Any) -> Case:
    return served({**GOOD, "release.json": json.dumps(json.loads(MANIFEST) | changes).encode()})


def manifests() -> Iterator[tuple[str, Case]]:
    for i, text in enumerate(TEXTS):
        yield f"text-{i}", served({**GOOD, "release.json": text})
    for i, name in enumerate(NAMES):
        yield f"name-{i}", listing(files={name: ENTRY})
    for i, size in enumerate(SIZES):
        yield f"size-{i}", listing(files={"model.safetensors": {**ENTRY, "size": size}})
    for i, digest in enumerate(DIGESTS):
        yield f"digest-{i}", listing(files={"model.safetensors": {**ENTRY, "sha256": digest}})
    for end in range(5, len(MANIFEST) - 1, 12):
        yield f"ends-{end}", served({**GOOD, "release.json": MANIFEST[:end]})
    for i, value in enumerate(["opfa-release/2", "", None, 1, ["opfa-release/1"]]):
        yield f"format-{i}", listing(format=value)
    for i, value in enumerate(["", None, 1, "..", "../up", "a name", "x" * 201, "a\n"]):
        yield f"called-{i}", listing(name=value)
    for i, value in enumerate([None, [], {}, 1, "x", {"config.json": None}, {"config.json": [2]}]):
        yield f"files-{i}", listing(files=value)
    for i, value in enumerate([None, [], 1, "x"]):
        yield f"facts-{i}", listing(facts=value)
    many = {f"{i}.json": ENTRY for i in range(1001)}
    for i, files in enumerate(
        [many, {"a.json": ENTRY, "A.json": ENTRY}, {"a.json": ENTRY, "a.json/b.json": ENTRY}]
    ):
        yield f"together-{i}", listing(files=files)
    yield "unknown key", listing(signature="x")
    yield "unknown key of a file", listing(files={"model.safetensors": {**ENTRY, "mode": 493}})
    yield "a missing file", listing(files={"other.json": ENTRY})


def contents() -> Iterator[tuple[str, Case]]:
    for at in range(0, len(WEIGHTS), 512):
        flipped = bytearray(WEIGHTS)
        flipped[at] ^= 1
        yield f"flipped-{at}", served({**GOOD, "model.safetensors": bytes(flipped)})
    for length in range(0, len(WEIGHTS), 1024):
        yield f"short-{length}", served({**GOOD, "model.safetensors": WEIGHTS[:length]})
    for more in (1, 100, 1 << 20):
        yield f"long-{more}", served({**GOOD, "model.safetensors": WEIGHTS + bytes(more)})
    swapped = {"model.safetensors": FILES["config.json"], "config.json": WEIGHTS}
    yield "swapped", served({**GOOD, **swapped})
    for i, text in enumerate(
        [b"{", b"", b'{"auto_map": {}}', b'{"custom_pipelines": {}}', b"\xff"]
    ):
        yield f"config-{i}", served(release({**FILES, "config.json": text}))


def answers() -> Iterator[tuple[str, Case]]:
    for file in ("release_json", "model_safetensors"):
        for code in (204, 301, 302, 304, 400, 401, 403, 404, 410, 500, 503):
            yield f"{file}-{code}", served(**{file: servers.status(code)})
        for target in (
            "http://example.com/",
            "ftp://127.0.0.1/",
            "file:///etc/passwd",
            "http://[",
            "",
        ):
            odd = servers.status(302, Location=target)
            yield f"{file} to {target!r}", served(**{file: odd})
        for name, odd in (
            ("endless", servers.endless),
            ("hangs up", servers.cut(0)),
            ("resets", servers.reset(5)),
            ("without length", servers.without_length),
            ("compressed", servers.instead(b"\x1f\x8b" * 9, Content_Encoding="gzip")),
            ("a part", servers.status(206, Content_Range="bytes 5-9/x")),
            ("nothing as a part", servers.status(206)),
        ):
            yield f"{file} {name}", served(**{file: odd})
    for stated in (
        "bytes 0-1/99999999999999999999999",
        "bytes a-b/c",
        "bytes 999999-9999999/10240",
    ):
        odd = servers.status(206, Content_Range=stated)
        yield f"range {stated}", served(model_safetensors=odd)


CASES = dict([*manifests(), *contents(), *answers()])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    content = {f"/{i}/{k}": v for i, case in enumerate(CASES.values()) for k, v in case[0].items()}
    with serving(content) as running:
        for i, (_, odd) in enumerate(CASES.values()):
            running.always |= {f"/{i}/{file}": answer for file, answer in odd.items()}
        yield running


def test_there_are_more_than_200() -> None:
    assert len(CASES) > 200


@pytest.mark.parametrize("name", CASES)
def test_a_corrupted_release_is_one_clear_error(
    name: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    impatient(monkeypatch)
    for variable in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    close_session()
    target = tmp_path / "here/target"
    target.parent.mkdir()
    monkeypatch.chdir(target.parent)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    url = f"{server.url}/{list(CASES).index(name)}"
    assert cli.run(["download", url, "--output", str(target)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("opfa: ") and "Traceback" not in said
    assert 20 < len(said) < 1500
    assert not target.exists()
    assert list(tmp_path.iterdir()) == [target.parent]
    assert not list(target.parent.iterdir())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 << 10  # KiB
