"""The page of a model: masks that fit into a file, heads, and texts that are escaped."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opfa.commands import app as cli
from opfa.report import maps
from opfa.sparsity.anatomy import NumHeads

OUTPUT = "bert.encoder.layer.1.attention.output.dense.weight"


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    return np.random.default_rng(1).random((37, 50)) < 0.2


def unpacked(blob: bytes, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, bytes]:
    found = zlib.decompress(blob)
    rows, columns = np.split(np.frombuffer(found, "<u4", sum(shape)), shape[:1])
    return rows, columns, found[4 * sum(shape) :]


def test_a_mask_is_packed_without_loss(mask: np.ndarray) -> None:
    edge, blobs = maps.packed({"a": torch.from_numpy(mask)})
    rows, columns, cells = unpacked(blobs["a"], mask.shape)
    assert edge == 1
    assert (rows == mask.sum(1)).all() and (columns == mask.sum(0)).all()
    bits = np.unpackbits(np.frombuffer(cells, np.uint8), count=mask.size)
    assert (bits.reshape(mask.shape) == mask).all()


def test_a_mask_that_is_too_large_becomes_exact_counts_of_tiles(mask: np.ndarray) -> None:
    size = len(maps.packed({"a": torch.from_numpy(mask)})[1]["a"])
    edge, blobs = maps.packed({"a": torch.from_numpy(mask)}, size - 1)
    assert edge == 4
    rows, columns, cells = unpacked(blobs["a"], mask.shape)
    assert (rows == mask.sum(1)).all() and (columns == mask.sum(0)).all()
    counts = np.frombuffer(cells, "<u2").reshape(10, 13)
    expected = [
        [mask[r : r + 4, c : c + 4].sum() for c in range(0, 50, 4)] for r in range(0, 37, 4)
    ]
    assert (counts == expected).all()


def test_thumbnails_are_densities(mask: np.ndarray) -> None:
    small = torch.eye(2).bool()
    found = zlib.decompress(maps.thumbnails({"a": torch.from_numpy(mask), "b": small}))
    first, second = np.frombuffer(found, np.uint8).reshape(2, 32, 32)
    assert first[31, 31] == round(255 * mask[35:, 48:].mean())
    assert (second[:16, :16] == 255).all() and (second[:16, 16:] == 0).all()


def test_a_layer_that_lost_heads_shows_those_that_are_left() -> None:
    names = [f"encoder.layer.{n}.attention.self.value.weight" for n in range(2)]
    masks = {names[0]: torch.ones(8, 8).bool(), names[1]: torch.ones(4, 8).bool()}
    masks[names[1]][:2] = False
    whole, left = maps.heads(masks, NumHeads(4, {1: 2})).values()
    assert [head.is_gone for head in whole] == [False] * 4
    assert [head.is_gone for head in left] == [True, False]


def test_a_head_is_gone_when_nothing_gets_through_it() -> None:
    full = torch.ones(8, 8).bool()
    no_output, no_key, fused = full.clone(), full.clone(), torch.ones(24, 8).bool()
    no_output[:, 2:4] = False
    no_key[4:6] = False
    fused[16 + 6 :] = False  # the value of the last head
    layer = "encoder.layer.{}.attention."
    found = maps.heads(
        {
            layer.format(0) + "self.query.weight": full,
            layer.format(0) + "self.key.weight": no_key,
            layer.format(0) + "self.value.weight": full,
            layer.format(0) + "output.dense.weight": no_output,
            "layers.3.attn.Wqkv.weight": fused,
        },
        NumHeads(4),
    )
    modern, bert = found.values()
    assert [head.is_gone for head in bert] == [False, True, False, False]
    assert bert[2].shares == {"query": 1.0, "key": 0.0, "value": 1.0, "output": 1.0}
    assert bert[2].density == 0.75
    assert [head.is_gone for head in modern] == [False, False, False, True]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "<img src=x onerror=alert(1)>"
    directory.mkdir()
    weight = torch.eye(16).repeat(1, 2)
    save_file({OUTPUT: weight}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"num_attention_heads": 4}')
    return directory


def test_what_is_inserted_is_escaped_and_nothing_else_may_run(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli.run(["inspect", str(model), "--page", str(page)]) == 0
    text = page.read_text()
    assert "<img" not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    assert re.findall(r"<[^>]+ (?:src|href)=[^>]+>", text) == ['<a class="skip" href="#main">']
    assert "default-src 'none'" in text and "unsafe" not in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    (matrix,) = json.loads(data)["matrices"]
    assert (matrix["name"], matrix["shape"], matrix["zeros"]) == (OUTPUT, [16, 32], 480)


def test_the_page_of_a_run_links_the_page_of_its_training(model: Path, tmp_path: Path) -> None:
    run, page = tmp_path / "runs/50 %", tmp_path / "pages/page.html"
    (run / "report").mkdir(parents=True)
    (run / "model").symlink_to(model)
    (run / "recipe.toml").write_text("")
    page.parent.mkdir()

    def links(name: Path) -> list[str]:
        assert cli.run(["inspect", str(name), "--page", str(page)]) == 0
        return re.findall(r'<a href="([^"]+)">', page.read_text())

    assert links(run) == []  # there is no such page
    (run / "report/index.html").write_text("")
    assert links(run) == links(run / "model") == ["../runs/50%20%25/report/index.html"]
    assert f">{run}/report/index.html</a>" in page.read_text()


def test_a_dense_model_has_a_page_without_pictures(tmp_path: Path) -> None:
    save_file({OUTPUT: torch.ones(4, 4)}, tmp_path / "model.safetensors")
    assert cli.run(["inspect", str(tmp_path), "--page", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "No linear matrix has zeros" in text and "<canvas" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--page", "page.htm"), "must be a .html file in a directory that exists"),
        (("--page", "nowhere/page.html"), "must be a .html file in a directory that exists"),
        (("--page", "used.html"), "is a directory; give a file"),
        (("--page", "page.html", "--against", "other"), "leave --against out"),
        (("--page", "p.html", "--plot", "p.html"), "are the same file"),
    ],
)
def test_a_page_that_can_not_be_written_is_refused_before_anything_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("used.html").mkdir()
    assert cli.run(["inspect", "./nowhere", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["used.html"]


@pytest.mark.parametrize("damage", ["weights", "report"])
def test_a_page_of_a_damaged_run_is_one_message(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = tmp_path / "run/model"
    run.mkdir(parents=True)
    for path in model.iterdir():
        (run / path.name).write_bytes(
            path.read_bytes()[:-9] if damage == "weights" else path.read_bytes()
        )
    if damage == "report":
        (run / "sparsity.json").write_text('{"total": 1}')
    assert cli.run(["inspect", str(run.parent), "--page", str(tmp_path / "page.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()
