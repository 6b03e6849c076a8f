"""The page to try a text, in a real browser: it asks this server, and nobody else."""

from pathlib import Path
from typing import TYPE_CHECKING

import browsing
import pytest
from live import Live, serving
from words import Models, write_models

import opfa
from opfa.inference.predictor import Options

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = "<img src=x onerror='window.stolen = 1'></script><script>window.stolen = 1</script>"
SIZES = [(1280, "light"), (390, "dark")]
MODELS: Models = {
    "classes": ("SequenceClassification", {"id2label": {0: HOSTILE, 1: "good"}}),
    "number": ("SequenceClassification", {"num_labels": 1}),
    "answers": ("QuestionAnswering", {}),
    "tags": ("TokenClassification", {"id2label": {0: "O", 1: "B-X"}}),
    "choices": ("MultipleChoice", {}),
    "bare": ("", {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), MODELS)


class Opened(browsing.Opened):
    """The page of a server."""

    def __init__(self, browser: "Browser", live: Live, width: int, scheme: str) -> None:
        super().__init__(browser, live.url, width, scheme, offline=False)
        self.live = live

    def ask(self, *texts: str) -> str:
        """What is said of these texts, one for each field."""
        for field, text in zip(self.page.locator("textarea").all(), texts, strict=False):
            field.fill(text)
        self.page.locator("#send").click()
        self.page.wait_for_selector("#send:enabled")
        return self.page.locator("#answer").inner_text()

    def check(self, *allowed: str) -> None:
        """Nothing was loaded but the page and answers, nothing ran and nothing sticks out."""
        hosts = {url for url in self.requests if not url.startswith((self.live.url, "data:,"))}
        assert not hosts
        assert [text for text in self.problems if not any(word in text for word in allowed)] == []
        self.close()


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_page_says_what_the_model_says_and_runs_none_of_it(
    browser: "Browser", models: Path, width: int, scheme: str
) -> None:
    asked = f"{HOSTILE} film bad"
    (expected,) = opfa.predict(models / "classes", [asked])
    with serving(models / "classes") as live:
        opened = Opened(browser, live, width, scheme)
        assert opened.ask(asked).startswith(expected.prediction)
        for share in expected.probabilities.values():  # pyright: ignore[reportAttributeAccessIssue]
            assert f"{100 * share:.1f} %" in opened.page.locator("#answer").inner_text()
        assert HOSTILE in opened.page.locator("#command").inner_text().replace("'\\''", "'")
        opened.check()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "classes"])
def test_every_kind_of_task_can_be_tried_with_what_the_page_suggests(
    browser: "Browser", models: Path, name: str
) -> None:
    kind = "embedding" if name == "bare" else None
    with serving(models / name, Options(kind=kind)) as live:
        opened = Opened(browser, live, 390, "light")
        said = opened.ask()
        assert "ms, there and back" in said
        assert opened.page.locator("#answer .problem").count() == 0
        if name == "answers":
            text = opened.ask("who won ?", "😀 film . rome beat paris . in may")
            expected = opfa.predict(
                models / name, [("who won ?", "😀 film . rome beat paris . in may")]
            )[0].prediction
            assert text.startswith(expected)
            assert opened.page.locator("mark").inner_text() == expected
        if name == "tags":
            assert opened.page.locator(".words span").count() == 6
        opened.check()


def test_the_keyboard_is_enough_and_problems_are_told(browser: "Browser", models: Path) -> None:
    with serving(models / "number") as live:
        opened = Opened(browser, live, 1280, "dark")
        page = opened.page
        page.keyboard.press("Tab")  # to the content
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
        page.keyboard.press("Control+A")
        page.keyboard.type("good film")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#answer .said")
        assert "inputs, [0]: 'text' is empty" in opened.ask(" ")
        live.service.predictor.answers = None  # pyright: ignore[reportAttributeAccessIssue] - a fault
        assert "a fault of the server" in opened.ask("good")
        opened.check("422", "500")  # a browser's own words on the console
        opened = Opened(browser, live, 1280, "light")
    assert "The server can't be reached" in opened.ask("good")
    opened.check("ERR_CONNECTION_REFUSED")
