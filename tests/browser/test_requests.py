"""The last requests: what a row shows, the filter and the pause."""

import pytest
from fakes.scripted_console import record
from playwright.async_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
]


async def open_requests(page):
    await page.get_by_role("link", name="Requests").click()
    await expect(page.get_by_role("heading", level=1, name="Requests")).to_be_focused()


def rows(page):
    return page.get_by_role("region", name="Requests").locator("tbody tr")


async def test_a_row_shows_endpoint_times_tokens_and_why(page, console):
    console.served(
        record(
            1,
            endpoint="model-chat-x7",
            waited_s=2.5,
            ttft_s=2.75,
            duration_s=4.0,
            prompt_tokens=4321,
            cached_tokens=4096,
            output_tokens=77,
            retries=2,
            why="It has 4,096 tokens of the prompt cached.",
        ),
        record(2, model="gone", endpoint=None, status=404, ttft_s=None, why="", pick=None,
               prompt_tokens=None, cached_tokens=None, output_tokens=None),
        record(3, end="left"),
        record(4, end="broken"),
    )  # fmt: skip
    await open_requests(page)
    await expect(rows(page)).to_have_count(4)
    last = rows(page).nth(3)
    for text in ("model-chat-x7", "200", "2.50 s", "2.75 s", "4.00 s", "4,321", "4,096", "77", "2"):
        await expect(last).to_contain_text(text)
    await expect(last).to_contain_text("It has 4,096 tokens of the prompt cached.")
    await expect(rows(page).nth(2)).to_contain_text("404")
    await expect(rows(page).nth(1)).to_contain_text("client left")
    await expect(rows(page).nth(0)).to_contain_text("cut off")


async def test_new_requests_come_on_top_and_200_are_kept(page, console):
    console.served(*(record(number) for number in range(200)))
    await open_requests(page)
    await expect(rows(page)).to_have_count(200)
    console.served(record(900, output_tokens=901), record(901, output_tokens=902))
    await expect(rows(page).nth(0)).to_contain_text("902")
    await expect(rows(page).nth(1)).to_contain_text("901")
    await expect(rows(page)).to_have_count(200)


async def test_the_list_is_filtered_by_model(page, console):
    console.served(record(1), record(2, model="embed"), record(3, model="embed"))
    await open_requests(page)
    await page.get_by_role("combobox", name="Model").select_option("embed")
    await expect(rows(page)).to_have_count(2)
    console.served(record(4), record(5, model="embed"))
    await expect(rows(page)).to_have_count(3)
    await expect(page.get_by_text("3 of the last 200 requests")).to_be_visible()


async def test_a_paused_list_stays_and_counts_what_it_does_not_show(page, console):
    console.served(record(1))
    await open_requests(page)
    await page.get_by_role("button", name="Pause").click()
    console.served(record(2), record(3))
    await expect(page.get_by_text("paused, 2 new")).to_be_visible()
    await expect(rows(page)).to_have_count(1)
    await page.get_by_role("button", name="Resume").click()
    await expect(rows(page)).to_have_count(3)
