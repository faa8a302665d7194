"""Chromium, driven by Playwright, for tests and screenshots."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from playwright.async_api import Browser, ConsoleMessage, Page, Request, async_playwright

# What Chromium logs about a response with an error status or a lost connection, which tests cause.
EXPECTED = "Failed to load resource"
ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", "--font-render-hinting=none"]


def chromium() -> str:
    """The path of the browser, from $CHROMIUM or PATH."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise FileNotFoundError("chromium is not on PATH: apt-get install chromium")
    return path


@contextlib.asynccontextmanager
async def running_browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        try:
            yield browser
        finally:
            await browser.close()


@dataclasses.dataclass
class Watched:
    """A page, and what went wrong on it."""

    page: Page
    problems: list[str] = dataclasses.field(default_factory=list)
    urls: list[str] = dataclasses.field(default_factory=list)

    def check(self, origin: str) -> None:
        """No script failed, nothing violated the CSP, and no request left the origin."""
        foreign = [url for url in self.urls if not url.startswith((f"{origin}/", "data:", "blob:"))]
        assert not self.problems, self.problems
        assert not foreign, foreign


async def go(page: Page, view: str) -> None:
    """Open a view of the console, such as "models/chat"."""
    await page.evaluate("view => { location.hash = `#/${view}` }", view)


@contextlib.asynccontextmanager
async def open_page(browser: Browser, url: str, **options: Any) -> AsyncIterator[Page]:
    """A page at ``url`` in a fresh profile; at the end, checks it as `Watched.check` describes."""
    context = await browser.new_context(
        viewport={"width": 1440, "height": 900}, locale="en-GB", timezone_id="UTC", **options
    )
    await context.grant_permissions(["clipboard-read", "clipboard-write"])
    watched = Watched(await context.new_page())
    page = watched.page
    page.set_default_timeout(15_000)

    def logged(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and EXPECTED not in message.text:
            watched.problems.append(f"{message.type}: {message.text}")

    def requested(request: Request) -> None:
        watched.urls.append(request.url)

    page.on("console", logged)
    page.on("pageerror", lambda error: watched.problems.append(f"uncaught: {error}"))
    page.on("dialog", lambda dialog: watched.problems.append(f"dialog: {dialog.message}"))
    page.on("request", requested)
    try:
        await page.goto(url)
        yield page
        parts = urlsplit(url)
        watched.check(f"{parts.scheme}://{parts.netloc}")
    finally:
        await context.close()
