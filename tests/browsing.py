"""A page in a real browser (see `browser`), and all that it asked for or complained about."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


class Opened:
    """A page that was opened."""

    def __init__(
        self, browser: "Browser", url: str, width: int, scheme: str, *, offline: bool = True
    ) -> None:
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme, offline=offline)  # pyright: ignore[reportArgumentType]
        self.page: Page = context.new_page()
        self.problems, self.requests = list[str](), list[str]()
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def close(self) -> None:
        """Nothing ran and nothing sticks out."""
        assert self.page.evaluate("window.stolen") is None
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        self.page.context.close()
