"""Keyboard, screen readers, colours and motion."""

import re

import pytest
from browsers import go, open_page
from fakes.scripted_console import Chat, pod, record
from playwright.async_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
]
VIEWS = ("models", "models/chat", "models/chat/log", "models/chat/yaml", "requests", "playground")


def populate(console):
    console.put("chat", state="Starting", reason="PullingImage", message="1 of 3", held=2)
    console.put("embed", features=["TextEmbedding"], state="Scaled to zero")
    console.put("bad", state="Failed", reason="NoImage", message="no such image")
    console.put("worse", state="Degraded", reason="CrashLoopBackOff", message="exit 1")
    console.detail(
        "chat",
        pods=[pod("chat-0"), pod("chat-1", ready=False, reason="PullingImage")],
        conditions=[{"type": "Ready", "status": "False", "reason": "NoPod", "message": "",
                     "last_transition_s": 1.0}],
        timeline=[{"time_s": 1.0, "from": 0, "to": 1, "reason": "a request is held"}],
    )  # fmt: skip
    console.log("chat-0", "one", "two")
    console.served(record(1), record(2, status=503, end="broken"), record(3, end="left"))


async def focused(page):
    return await page.evaluate("""() => {
        const e = document.activeElement;
        return e.getAttribute("aria-label") || e.textContent.trim() || e.id;
    }""")


async def tab_to(page, name, limit=40):
    for _ in range(limit):
        await page.keyboard.press("Tab")
        if await focused(page) == name:
            return
    raise AssertionError(f"Tab does not reach {name!r}")


async def test_everything_can_be_done_with_the_keyboard(page, console):
    await expect(page.get_by_role("rowheader", name="chat")).to_be_visible()
    await page.keyboard.press("Tab")
    assert await focused(page) == "Skip to the content"
    await page.keyboard.press("Enter")
    assert await focused(page) == "Models"
    await tab_to(page, "Scale chat up to 2")
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("1 / 2")).to_be_visible()
    await tab_to(page, "Delete chat")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("dialog")).to_be_visible()
    assert await focused(page) == "Cancel"
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_have_count(0)
    assert await focused(page) == "Delete chat"
    await page.keyboard.press("Shift+Tab")
    assert await focused(page) == "Try chat in the Playground"
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1)).to_be_focused()
    await tab_to(page, "Message")
    await page.keyboard.type("Hello?")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("article", name="chat")).to_contain_text("Hello there.")
    await tab_to(page, "curl")
    await tab_to(page, "Copy")


async def test_the_focus_is_visible(page, console):
    await expect(page.get_by_role("rowheader", name="chat")).to_be_visible()
    for _ in range(14):
        await page.keyboard.press("Tab")
        style = await page.evaluate("""() => {
            const style = getComputedStyle(document.activeElement);
            return [style.outlineStyle, style.outlineWidth, document.activeElement.outerHTML];
        }""")
        assert style[0] == "solid", style
        assert style[1] == "2px", style


async def test_changes_of_the_connection_and_actions_are_announced_and_nothing_else(page, console):
    announcements = page.locator("#announcements")
    await expect(page.get_by_text("Live")).to_be_visible()
    console.put("chat", in_flight=5)
    await expect(page.get_by_role("row").filter(has_text="chat")).to_contain_text("5")
    await expect(announcements).to_be_empty()
    await page.get_by_role("button", name="Scale chat up to 2").click()
    await expect(announcements).to_have_text("chat: 2 replicas desired")
    await console.stop()
    await expect(announcements).to_contain_text("The connection to KubeAI is lost")
    await console.start()
    await expect(announcements).to_have_text("The connection to KubeAI is back.")


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing_in_any_view(browser, console, theme):
    axe = pytest.importorskip("axe_playwright_python.async_playwright").Axe()
    populate(console)
    console.chat = Chat.at_once(pieces=("Here:\n```py\nx = 1\n```\nDone.",))
    console.refusals["scale"] = (422, "no")
    url = f"{console.url}/ui/"
    async with open_page(browser, url, color_scheme=theme, reduced_motion="reduce",
                         bypass_csp=True) as page:  # fmt: skip
        for view in VIEWS:
            await go(page, view)
            await expect(page.get_by_role("heading", level=1)).to_have_count(1)
            await expect(page.locator("main")).not_to_be_empty()
            if view == "models/chat":
                await expect(page.get_by_text("chat-0", exact=True)).to_be_visible()
            await check(axe, page, view)
        await page.get_by_role("textbox", name="Message").fill("Code?")
        await page.get_by_role("textbox", name="Message").press("Enter")
        await expect(page.get_by_role("article", name="bad")).to_contain_text("2 output tokens")
        await check(axe, page, "an answer")
        await page.get_by_role("button", name="Embeddings").click()
        await check(axe, page, "embeddings")
        await page.get_by_role("button", name="Transcription").click()
        await check(axe, page, "transcription")
        await page.get_by_role("link", name="Models").click()
        await page.get_by_role("button", name="Delete chat").click()
        await check(axe, page, "the question before a deletion")
        await page.keyboard.press("Escape")
        await page.get_by_role("button", name="Scale embed up to 2").click()
        await expect(page.get_by_role("alert")).to_be_visible()
        await page.get_by_role("button", name="Apply a manifest").click()
        await page.get_by_role("button", name="Apply", exact=True).click()
        await check(axe, page, "the dialog to apply")
        await page.keyboard.press("Escape")
        await console.stop()
        await expect(page.locator("#connection")).to_have_text("Reconnecting")
        await check(axe, page, "a lost connection")


async def check(axe, page, view):
    found = await axe.run(page)
    assert found.response["passes"], "axe did not run"
    assert found.violations_count == 0, f"{view}: {found.generate_report()}"


async def test_the_theme_is_the_systems_until_it_is_chosen(browser, console):
    async with open_page(browser, f"{console.url}/ui/", color_scheme="dark") as page:
        html, toggle = page.locator("html"), page.get_by_role("button", name="Dark theme")
        await expect(html).to_have_attribute("data-theme", "dark")
        await expect(toggle).to_have_attribute("aria-pressed", "true")
        background = "getComputedStyle(document.body).backgroundColor"
        dark = await page.evaluate(background)
        await page.emulate_media(color_scheme="light")
        await expect(html).to_have_attribute("data-theme", "light")
        assert await page.evaluate(background) != dark
        await toggle.click()
        await expect(html).to_have_attribute("data-theme", "dark")
        await page.reload()
        await expect(html).to_have_attribute("data-theme", "dark")
        assert await page.evaluate(background) == dark


async def test_nothing_moves_for_those_who_prefer_it(browser, console):
    populate(console)
    moving = "() => document.getAnimations().length"
    async with open_page(browser, f"{console.url}/ui/") as page:
        await expect(page.get_by_text("PullingImage: 1 of 3")).to_be_visible()
        assert await page.evaluate(moving) > 0
        await page.emulate_media(reduced_motion="reduce")
        assert await page.evaluate(moving) == 0


async def test_each_view_has_a_title_a_heading_and_the_current_link(page, console):
    titles = {"requests": "Requests", "playground": "Playground", "models/chat": "chat"}
    for path, title in titles.items():
        await go(page, path)
        await expect(page).to_have_title(f"{title} · KubeAI")
        await expect(page.get_by_role("heading", level=1, name=title)).to_be_focused()
        link = re.compile(path.split("/")[0], re.IGNORECASE)
        current = page.get_by_role("navigation", name="Views").get_by_role("link", name=link)
        await expect(current).to_have_attribute("aria-current", "page")


async def test_the_playgrounds_settings_fit_their_column(page):
    await go(page, "playground")
    tasks = page.get_by_role("group", name="Task").get_by_role("button")
    await expect(tasks).to_have_text(["Chat", "Embeddings", "Reranking", "Transcription"])
    for width in (1440, 1000, 400):
        await page.set_viewport_size({"width": width, "height": 900})
        wide = await page.locator(".settings").evaluate("e => e.scrollWidth - e.clientWidth")
        assert wide <= 0, f"{wide} px too wide in a window of {width} px"


async def test_a_narrow_window_scrolls_tables_but_not_the_page(browser, console):
    populate(console)
    async with open_page(browser, f"{console.url}/ui/") as page:
        await page.set_viewport_size({"width": 400, "height": 800})
        for view in VIEWS:
            await go(page, view)
            await expect(page.get_by_role("heading", level=1)).to_have_count(1)
            if view == "models/chat":
                await expect(page.get_by_text("chat-0", exact=True)).to_be_visible()
            wide = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{view} is {wide} px too wide"
