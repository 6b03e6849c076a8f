"""Pages in a real browser, without a network: by pointer, by keyboard and on a phone."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import browsing
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opfa.commands import app as cli
from opfa.report import maps
from opfa.report.curves import Plan
from opfa.report.model_page import write_model_page
from opfa.report.run_page import write_run_page
from opfa.storage import seal
from opfa.weights.inspection import inspect_masks

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

HOSTILE = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 1'>"
QUERY = "bert.encoder.layer.{}.attention.self.query.weight"
LOSSES = [4.0, 3.25, 2.5, 2.75, 2.0, 1.5]
RATES = [1e-4, 2e-4, 3e-4, 2e-4, 1e-4, 5e-5]


class Opened(browsing.Opened):
    """A page of a file, without a network."""

    def __init__(self, browser: "Browser", file: Path, width: int, scheme: str) -> None:
        super().__init__(browser, file.as_uri(), width, scheme)

    def check(self, file: Path) -> None:
        assert self.problems == [] and self.requests == [file.as_uri()]
        self.close()


@pytest.fixture(scope="module")
def masks() -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.random((48, 64)) < 0.3, generator.random((48, 64)) < 0.1]


@pytest.fixture(scope="module")
def model_page(masks: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    weights = {QUERY.format(i): torch.from_numpy(mask).float() for i, mask in enumerate(masks)}
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text('{"num_attention_heads": 4}')
    assert cli.run(["inspect", str(directory), "--page", str(directory / "page.html")]) == 0
    return directory / "page.html"


@pytest.fixture(scope="module")
def coarse_page(model_page: Path, masks: list[np.ndarray]) -> Path:
    """The same model, as if it were too large for single weights."""
    read = inspect_masks(str(model_page.parent))
    size = sum(map(len, maps.packed(read.masks)[1].values()))
    page = model_page.with_name("coarse.html")
    write_model_page(page, "large", read.found, read.masks, read.num_heads, budget=size - 1)
    return page


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    (run / "recipe.toml").write_text(f"name = {json.dumps(HOSTILE)}\n")
    seal.write_sealed(run / "environment.json", {"command": [HOSTILE], "launches": []})
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(LOSSES, 1)]
    rows += [{"step": 6, "eval": True, "accuracy": 0.75, HOSTILE: 0.5}]
    report = {"total": {"zeros": 0, "size": 0, "sparsity": 0.0}, "tensors": {}}
    write_run_page(run, rows, Plan(learning_rate=RATES), report)
    return run / "report/index.html"


def read(page: "Page") -> dict[str, str]:
    """What is said of the place under the pointer."""
    names, values = (page.locator(f"#readout {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def expected(mask: np.ndarray, row: int, column: int) -> dict[str, str]:
    def share(part: np.ndarray) -> str:
        hundredths = np.floor(1e4 * part.mean() + 0.5)  # as JavaScript rounds
        return f"{part.sum():,} of {part.size:,}, {hundredths / 100:.2f}\u00a0%"

    head, r, c = row // 12, row // 8 * 8, column // 8 * 8
    return {
        "row": f"{row} of 48",
        "column": f"{column} of 64",
        "weight": "live" if mask[row, column] else "zero",
        "live in row": share(mask[row]),
        "live in column": share(mask[:, column]),
        f"live in head {head}": share(mask[12 * head : 12 * head + 12]),
        "live in 8 × 8 around": share(mask[r : r + 8, c : c + 8]),
    }


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_pointer_and_the_keys_read_a_matrix(
    browser: "Browser",
    model_page: Path,
    masks: list[np.ndarray],
    width: int,
    scheme: str,
) -> None:
    opened = Opened(browser, model_page, width, scheme)
    page = opened.page
    page.wait_for_selector("[aria-pressed=true]")
    picture = page.locator("#picture")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    assert box is not None
    scale = (box["width"] - 16) / 64 if width == 390 else min((box["width"] - 16) / 64, 28.0)
    scale = min(scale, (min(720, 900 * 0.6) - 16) / 48)
    for row, column in ((0, 0), (17, 30), (47, 63)):
        page.mouse.move(box["x"] + 16 + (column + 0.5) * scale, box["y"] + 16 + (row + 0.5) * scale)
        assert read(page) == expected(masks[0], row, column)
    picture.focus()
    for key in ("ArrowLeft", "ArrowUp", "ArrowUp", "+", "+"):
        page.keyboard.press(key)
    assert read(page) == expected(masks[0], 45, 62)
    page.keyboard.press("n")
    page.wait_for_selector("[data-matrix='1'][aria-pressed=true]")
    page.keyboard.press("ArrowDown")  # the pointer comes
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert read(page) == expected(masks[1], 1, 1)
    page.locator("[data-matrix='1']").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-matrix='0'][aria-pressed=true]")
    opened.check(model_page)


def test_a_large_model_is_read_by_tiles(
    browser: "Browser", coarse_page: Path, masks: list[np.ndarray]
) -> None:
    opened = Opened(browser, coarse_page, 1280, "light")
    opened.page.wait_for_selector("[aria-pressed=true]")
    assert "the smallest tile has 4 × 4 weights" in opened.page.locator(".look").inner_text()
    opened.page.locator("#picture").focus()
    for key in ("ArrowDown", "End", "PageDown"):
        opened.page.keyboard.press(key)
    exact = expected(masks[0], 47, 63)
    assert exact.pop("weight") and read(opened.page) == exact
    opened.check(coarse_page)


def test_the_picture_has_the_weights_where_they_are(
    browser: "Browser", model_page: Path, masks: list[np.ndarray]
) -> None:
    opened = Opened(browser, model_page, 1280, "light")
    opened.page.wait_for_selector("[aria-pressed=true]")
    found = opened.page.evaluate(
        """() => { const { context, scale, width, height } = viewer;
        const { data } = context.getImageData(0, 0, width, height);
        const at = i => Math.floor(16 + (i + .5) * scale);
        return [...Array(48).keys()].map(r => [...Array(64).keys()].map(c =>
          data[4 * (at(r) * width + at(c))])); }"""
    )
    assert ((np.array(found) < 100) == masks[0]).all()
    opened.check(model_page)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_the_pointer_and_the_keys_read_curves(
    browser: "Browser", run_page: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, run_page, width, scheme)
    page = opened.page
    assert HOSTILE in page.locator("h1").inner_text()
    loss = page.get_by_role("group", name="Training loss")
    rate = page.get_by_role("group", name="Learning rate")
    box = loss.locator("> svg").bounding_box()
    assert box is not None
    between = (box["width"] - 62 - 12) / 5  # six steps
    for index in (0, 2, 5):
        page.mouse.move(box["x"] + 62 + index * between, box["y"] + 60)
        assert loss.locator(".where").inner_text() == f"step {index + 1}"
        assert float(loss.locator(".legend b").inner_text()) == LOSSES[index]
        assert float(rate.locator(".legend b").inner_text()) == RATES[index]
    page.mouse.move(1, 1)  # a late move of the pointer would be read again
    rate.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "e => e.innerText == 'step 2'", arg=rate.locator(".where").element_handle()
    )
    assert float(rate.locator(".legend b").inner_text()) == RATES[1]
    assert float(loss.locator(".legend b").inner_text()) == LOSSES[1]
    page.keyboard.press("Escape")
    assert rate.locator(".where").inner_text() == ""
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    opened.check(run_page)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_curves_are_zoomed_by_keys_buttons_wheel_and_dragging(
    browser: "Browser", run_page: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, run_page, width, scheme)
    page = opened.page
    loss = page.get_by_role("group", name="Training loss")
    rate = page.get_by_role("group", name="Learning rate")
    shown, where = page.locator("#shown"), loss.locator(".where")

    def labels(chart: "Locator") -> list[str]:
        """Of the x axis."""
        return chart.locator("> svg > text[text-anchor=middle]").all_text_contents()[:-1]

    every_label, every_line = labels(loss), loss.locator("> svg").inner_html()
    loss.focus()
    for key in ("Home", "ArrowRight", "+", "+", "+"):  # around step 2, down to two gaps
        page.keyboard.press(key)
    assert shown.inner_text() == "steps 2 to 3" and where.inner_text() == "step 2"
    assert set(labels(loss)) == set(labels(rate)) == {"2", "3"}
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):  # the picture follows
        page.keyboard.press(key)
    assert shown.inner_text() == "steps 3 to 5" and where.inner_text() == "step 5"
    assert float(loss.locator(".legend b").inner_text()) == LOSSES[4]
    box = loss.locator("> svg").bounding_box()
    assert box is not None
    left, across = box["x"] + 62, box["width"] - 62 - 12
    page.mouse.move(left, box["y"] + 60)
    assert where.inner_text() == "step 3" and rate.locator(".where").inner_text() == "step 3"
    page.mouse.down()
    page.mouse.move(left + across / 2, box["y"] + 60)
    page.mouse.up()
    assert shown.inner_text() == "steps 2 to 4"
    page.mouse.wheel(0, 2_000)  # away
    page.wait_for_function("document.getElementById('shown').innerText == ''")
    page.keyboard.press("Escape")
    page.mouse.move(1, 1)
    assert labels(loss) == every_label and loss.locator("> svg").inner_html() == every_line
    for name, expected in (("Zoom in", "steps 2 to 5"), ("Zoom out", ""), ("Zoom in", "steps 2")):
        page.get_by_role("button", name=name).click()
        assert shown.inner_text().startswith(expected)
    page.get_by_role("button", name="All steps").press("Enter")
    assert shown.inner_text() == "" and labels(loss) == every_label
    opened.check(run_page)
