"""One Model: overview, log and YAML."""

import time

import pytest
from browsers import go
from fakes.scripted_console import pod
from playwright.async_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
]


async def test_the_overview_shows_pods_conditions_and_why_it_was_scaled(page, console):
    now = time.time()
    console.detail(
        "chat",
        pods=[
            pod("chat-0", in_flight=3, pending_tokens=512, ring_share=0.33, cached_share=0.8),
            pod("chat-1", ready=False, reason="CrashLoopBackOff", message="exit 1", restarts=7),
            pod("chat-2", ejected=True),
        ],
        conditions=[
            {
                "type": "Degraded",
                "status": "True",
                "reason": "CrashLoopBackOff",
                "message": "pod chat-1 fails",
                "last_transition_s": now - 300,
            }
        ],
        timeline=[
            {"time_s": now - 10, "from": 3, "to": 1, "reason": "average of 0.4 in flight"},
            {"time_s": now - 90, "from": 1, "to": 3, "reason": "average of 12.4 in flight"},
        ],
    )
    await page.get_by_role("link", name="chat", exact=True).click()
    await expect(page.get_by_role("heading", level=1, name="chat")).to_be_focused()
    pods = page.get_by_role("region", name="Pods")
    for text in ("Ready", "512", "33%", "80%", "CrashLoopBackOff: exit 1", "7", "Ejected"):
        await expect(pods).to_contain_text(text)
    await expect(page.get_by_role("region", name="Conditions")).to_contain_text("pod chat-1 fails")
    steps = page.get_by_role("listitem")
    await expect(steps).to_have_count(2)
    await expect(steps.first).to_contain_text("3 → 1")
    await expect(steps.first).to_contain_text("average of 0.4 in flight")
    await expect(steps.first).to_contain_text("10 s ago")


async def test_the_overview_follows_the_state(page, console):
    console.detail("chat", pods=[pod("chat-0")])
    await go(page, "models/chat")
    await expect(page.get_by_text("chat-0")).to_be_visible()
    console.detail("chat", pods=[pod("chat-0", in_flight=41), pod("chat-9")])
    await expect(page.get_by_text("chat-9")).to_be_visible()
    await expect(page.get_by_role("region", name="Pods")).to_contain_text("41")
    console.put("chat", state="Failed", reason="ImagePullFailed", message="no such image")
    await expect(page.get_by_text("ImagePullFailed: no such image")).to_be_visible()


async def test_a_model_that_does_not_exist_says_so_until_it_does(page, console):
    await go(page, "models/missing")
    await expect(page.get_by_text("There is no Model 'missing'.")).to_be_visible()
    console.put("missing")
    await expect(page.get_by_text("hf://example/missing")).to_be_visible()
    await expect(page.get_by_text("There is no Model 'missing'.")).to_be_hidden()


async def test_deleting_on_its_view_goes_back_to_the_list(page, console):
    await go(page, "models/chat")
    await page.get_by_role("button", name="Delete", exact=True).click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await expect(page.get_by_role("heading", level=1, name="Models")).to_be_focused()


async def test_the_log_is_streamed_and_follows_until_the_reader_scrolls_up(page, console):
    console.detail("chat", pods=[pod("chat-0"), pod("chat-1")])
    console.log("chat-0", *(f"line {number}" for number in range(300)))
    console.log("chat-1", "the other pod")
    await go(page, "models/chat/log")
    log = page.get_by_role("log", name="Log of the engine")
    await expect(log).to_contain_text("line 299")
    console.log("chat-0", "\x1b[32mINFO\x1b[0m in colour")
    await expect(log).to_contain_text("INFO in colour")
    await expect(log.get_by_text("INFO in colour")).to_be_in_viewport()
    follow = page.get_by_role("button", name="Follow")
    await expect(follow).to_have_attribute("aria-pressed", "true")
    await log.hover()
    await page.mouse.wheel(0, -4000)
    await expect(follow).to_have_attribute("aria-pressed", "false")
    top = await log.evaluate("log => log.scrollTop")
    console.log("chat-0", "not in sight")
    await expect(log).to_contain_text("not in sight")
    assert await log.evaluate("log => log.scrollTop") == top
    await follow.click()
    await expect(log.get_by_text("not in sight")).to_be_in_viewport()
    await page.get_by_label("Pod").select_option("chat-1")
    await expect(log).to_have_text("the other pod")


async def test_only_the_last_lines_of_a_long_log_are_kept(page, console):
    console.detail("chat", pods=[pod("chat-0")])
    await go(page, "models/chat/log")
    await expect(page.get_by_text("0 of at most 2,000 lines")).to_be_visible()
    console.log("chat-0", *(f"<{number}>" for number in range(5000)))
    log = page.get_by_role("log", name="Log of the engine")
    await expect(log).to_contain_text("<4999>")
    await expect(page.get_by_text("2,000 of at most 2,000 lines")).to_be_visible()
    assert await log.locator("div").count() == 2000
    assert await log.locator("div").first.text_content() == "<3000>"


async def test_a_log_that_is_refused_says_why_and_is_tried_again(page, console):
    console.refusals["log"] = (409, "The container waits: PullingImage")
    console.detail("chat", pods=[pod("chat-0")])
    console.log("chat-0", "started")
    await go(page, "models/chat/log")
    await expect(page.get_by_text("The container waits: PullingImage")).to_be_visible()
    del console.refusals["log"]
    await expect(page.get_by_role("log", name="Log of the engine")).to_have_text("started")


async def test_the_yaml_is_copied_as_it_is(page, console):
    text = 'kind: Model\nspec:\n  args: [\'--a="b"\', "$x `y`"]\n'
    console.detail("chat", yaml=text)
    await go(page, "models/chat/yaml")
    await expect(page.get_by_role("region", name="YAML")).to_contain_text("kind: Model")
    await page.get_by_role("button", name="Copy YAML").click()
    await expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert await page.evaluate("navigator.clipboard.readText()") == text
