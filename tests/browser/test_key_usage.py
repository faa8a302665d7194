"""The view of usage: its rows, its groups, and who sees it."""

import contextlib

import pytest
from browsers import go, open_page
from playwright.async_api import expect

from kubeai.api.usage import KeyUsage, UsageCounts

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
]
KEY = "sk-kubeai-a_b-C0123456789"
ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture
def keyed(console):
    console.admins_key = KEY
    console.usage = {
        "alice": KeyUsage(
            "acme",
            {
                "chat": UsageCounts(1204, 3, 845_211, 610_004, 301_882, "2026-11-30"),
                "embed": UsageCounts(310, 0, 98_120, 0, 0, "2026-11-29"),
            },
        ),
        "bob": KeyUsage(ATTACK, {"chat": UsageCounts(2, 0, 20, 0, 5, "2026-11-28")}),
    }
    return console


@contextlib.asynccontextmanager
async def open_usage(browser, keyed):
    """The view, after logging in."""
    async with open_page(browser, f"{keyed.url}/ui/") as page:
        await page.get_by_label("API key").fill(KEY)
        await page.get_by_role("button", name="Log in").click()
        await page.get_by_role("link", name="Usage").click()
        await expect(page.get_by_role("heading", level=1, name="Usage")).to_be_focused()
        yield page


def rows(page):
    return page.get_by_role("region", name="Usage").locator("tbody tr")


async def test_the_rows_are_keys_and_models_with_their_tokens(browser, keyed):
    async with open_usage(browser, keyed) as page:
        await expect(rows(page)).to_have_count(3)
        first = ("alice", "acme", "chat", "1,204", "3", "845,211", "610,004", "301,882")
        await expect(rows(page).nth(0).locator("th, td")).to_have_text([*first, "2026-11-30"])
        await expect(rows(page).nth(2)).to_contain_text(ATTACK)
        await expect(
            page.get_by_text("1,516 requests · 943,351 prompt and 301,887")
        ).to_be_visible()


async def test_usage_is_added_up_by_tenant_and_the_choice_is_kept(browser, keyed):
    async with open_usage(browser, keyed) as page:
        await page.get_by_role("combobox", name="By").select_option("tenant")
        await expect(rows(page)).to_have_count(2)
        await expect(rows(page).nth(0)).to_contain_text("1,514")
        await expect(page.get_by_role("columnheader", name="Model")).to_have_count(0)
        await go(page, "models")
        await go(page, "usage")
        await expect(rows(page)).to_have_count(2)


async def test_an_error_is_shown_and_usage_that_is_not_stored_yet(browser, keyed):
    keyed.usage = {}
    async with open_usage(browser, keyed) as page:
        await expect(page.get_by_text("No usage is stored yet.")).to_be_visible()
        keyed.refusals["usage"] = 403, "configmaps is forbidden"
        await page.get_by_role("combobox", name="By").select_option("model")
        await expect(page.get_by_text("configmaps is forbidden")).to_be_visible()


async def test_a_page_that_is_opened_at_the_view_waits_for_the_state(browser, keyed):
    async with open_usage(browser, keyed) as page:
        await page.reload()
        await expect(rows(page)).to_have_count(3)


async def test_without_keys_there_is_no_usage(page, console):
    await expect(page.get_by_role("rowheader", name="chat")).to_be_visible()
    await expect(page.get_by_role("link", name="Usage")).to_have_count(0)
    await go(page, "usage")
    await expect(page.get_by_text("no keys are required")).to_be_visible()
