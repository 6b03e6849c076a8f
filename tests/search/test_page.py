"""The page of a search: offline, by pointer and by keyboard, on a phone too; hostile names."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opfa.report.search_page import search_page
from opfa.report.tables import Table

if TYPE_CHECKING:
    from playwright.sync_api import Browser

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
HOSTILE = "</script><script>window.stolen = 1</script>"


def point(number: int, milliseconds: float, held_out: float, fresh: float) -> dict[str, Any]:
    share = milliseconds / 10
    return {
        "number": number,
        "shape": {"heads": [4, 0], "neurons": [number, 0], "layers": [True, number == 0]},
        "held_out": held_out,
        "fresh": fresh,
        "costs": {"milliseconds": milliseconds, "macs": 1e9 * share**2, "bytes": 1e8 * share},
        "measured": 1.01 * milliseconds,
    }


WHOLE = point(0, 10.0, 0.9, 0.88)
FRONT = [point(7, 8.0, 0.91, 0.87), point(12, 4.0, 0.8, 0.82), point(3, 2.0, 0.6, 0.55)]
RESULT = {
    "task": HOSTILE,
    "metric": "accuracy",
    "evaluations": 20,
    "hypervolume": 0.25,
    "whole": WHOLE,
    "front": FRONT,
    "even": [point(1, 5.0, 0.75, 0.74)],
}
TRIED = [(each["costs"], each["held_out"]) for each in FRONT]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    table = Table(("point", "held out"), [(HOSTILE, "0.91")], numbers_from=1)
    path.write_text(search_page("out", RESULT, TRIED, table, "milliseconds", HOSTILE))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_points_show_their_shape_by_pointer_and_by_keys(
    browser: "Browser", file: Path, width: int, scheme: str
) -> None:
    size: Any = {"width": width, "height": 900}
    look: Any = scheme
    context = browser.new_context(viewport=size, color_scheme=look, offline=True)
    page, problems, requests = context.new_page(), [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("#plot .chosen")

    def shown() -> dict[str, str]:
        names, values = (page.locator(f"#shape {tag}").all_inner_texts() for tag in ("dt", "dd"))
        return dict(zip(names, values, strict=True))

    page.locator("#plot").focus()
    page.keyboard.press("Home")  # the cheapest
    assert shown()["point"] == "0003"
    assert (shown()["accuracy, held out"], shown()["accuracy, fresh"]) == ("0.6", "0.55")
    page.keyboard.press("ArrowRight")
    assert shown()["milliseconds"] == "4 (40 %)"
    assert shown()["multiply-adds, millions"] == "160 (16 %)"
    assert "gone" in page.locator("#shape .layers").inner_text()
    dots = page.locator("#plot circle.dot.blue")
    box = dots.nth(dots.count() - 1).bounding_box()  # the dearest of the front
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert shown()["point"] == "0007"
    page.get_by_role("button", name="megabytes").click()
    page.get_by_role("button", name="held-out examples").click()
    assert page.locator("#plot circle.tried").count() == len(TRIED)
    assert problems == [] and requests == [file.as_uri()]
    assert page.evaluate("window.stolen") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()
