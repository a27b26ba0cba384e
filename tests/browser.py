"""A real browser for the page's tests: headless Chromium, where this machine has one."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
PATIENCE = 60.0  # seconds: a first answer on two busy cores


def chromium() -> str:
    """The path of a Chromium; skips the test where there is none."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install it")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is in PATH, and CHROMIUM is not set")
    return found


class Page:
    """A page and what went wrong in it."""

    def __init__(self, context: Any) -> None:
        self.page = context.new_page()
        self.errors: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def live(self, name: str) -> int:
        """A figure that the live part keeps for whoever asks."""
        return int(self.page.get_attribute("#live", f"data-{name}") or 0)

    def used(self) -> int:
        """Pages in rows, as drawn."""
        return int(self.page.get_attribute(".map", "data-used") or 0)

    def picture(self) -> str:
        """The pixels of the first page map."""
        return str(self.page.eval_on_selector(".map canvas", "canvas => canvas.toDataURL()"))

    def say(self, text: str) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")

    def until(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, f"{what}; {self.errors}"
            self.page.wait_for_timeout(50)

    def answered(self, count: int) -> bool:
        """Whether so many answers are whole."""
        answers = self.page.locator(".answer")
        busy = self.page.locator(".answer.writing, .answer.waiting").count()
        return answers.count() == count and not busy


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium; ends with the block."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(started: Any, url: str, **context: Any) -> Iterator[Page]:
    """`url` in a window of its own."""
    window = started.new_context(**{"viewport": {"width": 1280, "height": 800}} | context)
    page = Page(window)
    page.page.goto(url)
    yield page
    window.close()
