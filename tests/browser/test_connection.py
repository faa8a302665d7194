"""A lost supervisor, a refused stream, workers that are not ready."""

import re

import pytest
from browsers import go
from fakes.scripted_console import Chat, record
from harness import until
from playwright.async_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
]


async def test_a_lost_supervisor_is_shown_with_the_age_of_the_data_and_recovered_from(
    page, console
):
    await expect(page.get_by_text("Live")).to_be_visible()
    await console.stop()
    banner = page.get_by_role("region", name="Connection")
    await expect(banner).to_contain_text("The connection to KubeAI is lost")
    await expect(banner).to_contain_text("The data is")
    await expect(page.locator("#connection")).to_have_text("Reconnecting")
    await expect(page.locator("body")).to_have_class("stale")
    await expect(page.get_by_role("rowheader", name="chat")).to_be_visible()
    console.put("chat", in_flight=77)
    await console.start()
    await expect(banner).to_contain_text("Connected again after")
    await expect(page.get_by_role("row").filter(has_text="chat")).to_contain_text("77")
    await expect(page.locator("body")).not_to_have_class("stale")
    await expect(banner).to_be_hidden()


async def test_the_user_can_reconnect_before_the_back_off_ends(page, console):
    await expect(page.get_by_text("Live")).to_be_visible()
    await console.stop()
    banner = page.get_by_role("region", name="Connection")
    await expect(banner).to_contain_text(re.compile("Next attempt in ([5-9]|10) s"))
    await console.start()
    await page.get_by_role("button", name="Retry now").click()
    await expect(page.get_by_text("Live")).to_be_visible(timeout=3000)


async def test_requests_are_not_repeated_after_reconnecting(page, console):
    console.served(record(1), record(2))
    await page.get_by_role("link", name="Requests").click()
    rows = page.get_by_role("region", name="Requests").locator("tbody tr")
    await expect(rows).to_have_count(2)
    await console.stop()
    await expect(page.locator("#connection")).to_have_text("Reconnecting")
    console.served(record(3))
    await console.start()
    await expect(rows).to_have_count(3)


async def test_a_chat_that_is_cut_off_keeps_its_text_and_can_be_tried_again(page, console):
    console.chat = Chat()
    console.chat.go.set()
    await go(page, "playground/chat")
    await page.get_by_role("textbox", name="Message").fill("Hello?")
    await page.get_by_role("textbox", name="Message").press("Enter")
    answer = page.get_by_role("article", name="chat")
    await expect(answer).to_contain_text("Hello there.")
    await console.stop()
    await expect(answer.get_by_role("alert")).to_contain_text("The connection was cut off.")
    await expect(answer).to_contain_text("Hello there.")
    console.chat.end.set()
    await console.start()
    await answer.get_by_role("button", name="Try again").click()
    await expect(answer).to_contain_text("2 output tokens")
    await expect(answer.get_by_role("alert")).to_have_count(0)


async def test_a_stream_that_is_silent_for_too_long_is_given_up(page, console):
    """A supervisor that hangs closes no connection; a live one sends a comment every 15 seconds."""
    await page.clock.install()
    await page.reload()
    await expect(page.get_by_text("Live")).to_be_visible()
    await page.clock.fast_forward(30_000)
    await expect(page.get_by_text("Live")).to_be_visible()
    await page.clock.fast_forward(11_000)
    await expect(page.get_by_role("region", name="Connection")).to_contain_text("is silent")
    await page.clock.fast_forward(1_000)
    await expect(page.get_by_text("Live")).to_be_visible()


async def test_a_hidden_page_gives_its_stream_back_and_a_visible_one_takes_it(page, console):
    show = """hidden => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    await page.clock.install()
    await page.reload()
    await expect(page.get_by_text("Live")).to_be_visible()
    await page.evaluate(show, True)
    await page.clock.fast_forward(30_000)
    console.put("chat", in_flight=66)
    await expect(page.get_by_role("row").filter(has_text="chat")).to_contain_text("66")
    await expect(page.get_by_text("Live")).to_be_visible()
    await page.clock.fast_forward(31_000)
    await expect(page.get_by_text("Paused")).to_be_visible()
    await until("no page reads the events", lambda: console.pages == 0)
    console.put("chat", in_flight=88)
    await page.evaluate(show, False)
    await expect(page.get_by_role("row").filter(has_text="chat")).to_contain_text("88")
    await expect(page.get_by_text("Live")).to_be_visible()


async def test_a_refusal_is_shown_with_its_message(page, console):
    console.refusals["events"] = (403, "The console is only served to loopback addresses.")
    await page.reload()
    banner = page.get_by_role("region", name="Connection")
    await expect(banner).to_contain_text("The console is only served to loopback addresses.")


async def test_workers_and_message_streams_that_are_not_ready_are_shown(page, console):
    console.workers = [
        {"worker": 0, "ready": True, "restarts": 0},
        {"worker": 1, "ready": False, "restarts": 3},
    ]
    console.push()
    banner = page.get_by_role("region", name="Connection")
    await expect(banner).to_contain_text("Worker 1 of 2 is not ready.")
    await expect(page.locator("#workers")).to_have_text("1 of 2 workers ready")
    console.workers[1]["ready"] = True
    console.stream_problems = ["nats://jobs: requests: refused"]
    console.push()
    await expect(banner).to_contain_text("streams not connected: nats://jobs: requests: refused.")
    console.stream_problems = []
    console.push()
    await expect(banner).to_be_hidden()
    await expect(page.locator("#workers")).to_have_text("2 workers")
