"""The documentation's site in Chromium, wide and narrow, as `make docs` has built it.

SITE_SCREENSHOTS names a folder for pictures of the pages.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from repository import REPOSITORY

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(180),
]
SITE = REPOSITORY / "build/site"
VERSION = "dev"
PAGES = [
    "",
    "start/",
    "start/local/",
    "how-to/keys/",
    "how-to/console/",
    "explain/architecture/",
    "explain/routing/",
    "reference/model/",
    "reference/http-api/",
    "contribute/documentation/",
]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SERIOUS = {"serious", "critical"}


class Handler(SimpleHTTPRequestHandler):
    """Serves a site as mike publishes it: below its version, with a list of versions."""

    def do_GET(self) -> None:
        """Serve the list of versions, or a file of the site."""
        if urlsplit(self.path).path == "/versions.json":
            versions = [
                {"version": VERSION, "title": VERSION, "aliases": ["latest"]},
                {"version": "0.9", "title": "0.9", "aliases": []},
            ]
            body = json.dumps(versions).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)
        else:
            self.path = self.path.removeprefix(f"/{VERSION}")
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of the site."""
    if not (SITE / "index.html").exists():
        pytest.skip("run `make docs` first")
    handler = functools.partial(Handler, directory=str(SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/{VERSION}/"
        server.shutdown()


@pytest_asyncio.fixture(loop_scope="session")
async def visit(browser, site):
    """Open a page; afterwards, check that nothing failed and no request went to another host."""
    async with contextlib.AsyncExitStack() as stack:
        problems: list[str] = []

        def responded(response):
            if response.status >= 400:
                problems.append(f"{response.status} {response.url}")

        def logged(message):
            if message.type == "error":
                problems.append(f"error: {message.text}")

        async def visit(name: str, viewport=WIDE):
            page = await browser.new_page(viewport=viewport, color_scheme="light")
            stack.push_async_callback(page.close)
            page.set_default_timeout(30_000)
            page.on("console", logged)
            page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
            page.on("response", responded)
            page.on("request", lambda request: _check_host(request.url, site, problems))
            await page.goto(site + name, wait_until="networkidle")
            return page

        yield visit
        assert problems == []


def _check_host(url: str, site: str, problems: list[str]) -> None:
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") and parts.netloc != urlsplit(site).netloc:
        problems.append(f"another host: {url}")


async def screenshot(page, name: str) -> None:
    if folder := os.environ.get("SITE_SCREENSHOTS"):
        await page.screenshot(path=f"{folder}/{name.strip('/').replace('/', '-')}.png")


@pytest.mark.parametrize("name", PAGES)
async def test_a_page_works_wide_and_narrow_light_and_dark(visit, name):
    """No error (checked by `visit`), no sideways scrolling, no serious barrier."""
    page = await visit(name)
    assert await page.locator("h1").count() == 1
    await check_width(page, f"{name or 'home'}-wide")
    await check_barriers(page)
    await page.set_viewport_size(NARROW)
    await check_width(page, f"{name or 'home'}-narrow")
    await page.set_viewport_size(WIDE)
    await page.get_by_title("Switch to dark mode").click()
    await screenshot(page, f"{name or 'home'}-dark")
    await check_barriers(page)


async def check_width(page, name: str) -> None:
    await screenshot(page, name)
    root = "document.documentElement"
    content, width = await page.evaluate(f"[{root}.scrollWidth, {root}.clientWidth]")
    assert content <= width, f"{name} scrolls sideways"


async def check_barriers(page) -> None:
    """Axe's findings, once nothing fades: it takes the colours of the moment for the contrast."""
    await page.mouse.move(0, 0)  # hides the tooltip of what was clicked
    still = "*, ::before, ::after { transition: none !important; animation: none !important }"
    await page.add_style_tag(content=still)
    await page.wait_for_function("document.getAnimations().length === 0")
    found = await Axe().run(page, options={"resultTypes": ["violations"]})
    serious = [
        f"{one['id']}: {node['html'][:160]}: {node['failureSummary']}"
        for one in found.response["violations"]
        if one["impact"] in SERIOUS
        for node in one["nodes"]
    ]
    assert not serious, "\n".join(serious[:20])


async def test_search_finds_a_page(visit):
    page = await visit("")
    # Typed, because the search listens for keys.
    await page.locator(".md-search__input").press_sequentially("scaleDownDelaySeconds")
    # Not the first result: while the search works, others may come before it.
    await page.locator(".md-search-result__link[href*='/reference/model/']").first.click()
    await page.wait_for_url("**/reference/model/**")


async def test_the_navigation_leads_to_a_page_on_a_narrow_screen(visit):
    page = await visit("", NARROW)
    menu = page.locator("label[for=__drawer].md-header__button")
    await menu.click()
    await page.locator(".md-nav__link", has_text="Reference").first.click()
    await page.wait_for_url("**/reference/")  # the section's own page
    await menu.click()
    await page.get_by_role("link", name="HTTP API", exact=True).first.click()
    await page.wait_for_url("**/reference/http-api/")
    await page.locator("h1", has_text="HTTP API").wait_for()


async def test_the_palette_can_be_changed_and_is_kept(visit):
    page = await visit("start/")
    body = page.locator("body")
    assert await body.get_attribute("data-md-color-scheme") == "default"
    await page.get_by_title("Switch to dark mode").click()
    assert await body.get_attribute("data-md-color-scheme") == "slate"
    await page.reload(wait_until="networkidle")
    assert await body.get_attribute("data-md-color-scheme") == "slate"


async def test_diagrams_are_drawn_by_the_sites_own_mermaid(visit):
    page = await visit("")
    diagram = page.locator("div.mermaid")
    await diagram.wait_for()
    box = await diagram.bounding_box()
    assert box["height"] > 50
    # The theme puts the drawing into a closed shadow root, where only its size can be seen.
    assert await page.locator("pre.mermaid").count() == 0


async def test_versions_can_be_chosen(visit):
    page = await visit("")
    await page.locator(".md-version__current").wait_for()
    assert await page.locator(".md-version__link").count() == 2


async def test_reasons_for_not_running_are_below_their_blocks(visit):
    page = await visit("start/local/")
    captions = await page.locator(".not-run").all_text_contents()
    assert any(text.startswith("Not run in CI: ") for text in captions)
    html = await page.content()
    assert "<!-- run" not in html
