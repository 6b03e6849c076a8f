"""The page of a search: offline, by pointer and by keyboard, on a phone too; hostile names."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browsing import Opened

from opfa.report.search_page import search_page
from opfa.report.tables import Table

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = "</script><script>window.stolen = 1</script>"


def point(number: int, milliseconds: float, held_out: float, fresh: float) -> dict[str, Any]:
    share = milliseconds / 10
    return {
        "number": number,
        "shape": {
            "heads": [4, 0],
            "neurons": [number, 0],
            "layers": [True, number == 0],
            "zeros": [0.5, 0.7],
            "bits": 8,
        },
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


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_points_show_their_shape_by_pointer_and_by_keys(
    browser: "Browser", file: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, file.as_uri(), width, scheme)
    page = opened.page
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
    assert shown()["inside"] == "50 % + 70 % zeros, 8 bits"
    assert "gone" in page.locator("#shape .layers").inner_text()
    dots = page.locator("#plot circle.dot.blue")
    box = dots.nth(dots.count() - 1).bounding_box()  # the dearest of the front
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert shown()["point"] == "0007"
    page.get_by_role("button", name="megabytes").click()
    page.get_by_role("button", name="held-out examples").click()
    assert page.locator("#plot circle.tried").count() == len(TRIED)
    assert opened.problems == [] and opened.requests == [file.as_uri()]
    opened.close()
