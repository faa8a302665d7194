"""Text from outside is never markup, and the page keeps to its origin and its policy."""

import pytest
from browsers import go, open_page
from fakes.scripted_console import HEADERS, Chat, pod, record
from playwright.async_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
]
ATTACK = "<img src=x onerror=\"window.owned='{0}'\"><script>window.owned='{0}'</script>"
NAME = "<img src=x onerror=alert(1)>'\"&"


async def untouched(page):
    """No text became an element, and no script of it ran."""
    assert await page.evaluate("window.owned") is None
    assert await page.locator("main img[src=x], main script, #notices img").count() == 0


async def test_names_messages_and_log_lines_are_text(page, console):
    text = ATTACK.format
    console.put(
        NAME,
        state="Starting",
        reason=text("reason"),
        message=text("message"),
        engine=text("engine"),
        url=text("url"),
        adapters=[text("adapter")],
    )
    console.detail(
        NAME,
        pods=[pod(text("pod"), message=text("why"), address=text("address"), ready=False)],
        conditions=[
            {"type": text("type"), "status": "True", "reason": text("reason"),
             "message": text("condition"), "last_transition_s": 1.0}
        ],
        timeline=[{"time_s": 1.0, "from": 0, "to": 1, "reason": text("step")}],
        yaml=text("yaml"),
    )  # fmt: skip
    console.log(text("pod"), text("log"))
    console.served(record(1, model=NAME, endpoint=text("endpoint"), why=text("why")))
    await expect(page.get_by_role("rowheader", name=NAME)).to_be_visible()
    await expect(page.get_by_text(text("message"))).to_be_visible()
    await untouched(page)
    await page.get_by_role("link", name=NAME, exact=True).click()
    for shown in ("why", "condition", "step"):
        await expect(page.get_by_text(text(shown))).to_be_visible()
    await untouched(page)
    await page.get_by_role("link", name="Log").click()
    await expect(page.get_by_text(text("log"))).to_be_visible()
    await page.get_by_role("link", name="YAML").click()
    await expect(page.get_by_text(text("yaml"))).to_be_visible()
    await page.get_by_role("link", name="Requests").click()
    await expect(page.get_by_text(text("endpoint"))).to_be_visible()
    await untouched(page)


async def test_prompts_answers_and_errors_are_text(page, console):
    text = ATTACK.format
    await go(page, "playground/chat")
    console.chat = Chat.at_once(pieces=(text("answer"), f"\n```{text('code')}\n{text('code')}"))
    message = page.get_by_role("textbox", name="Message")
    await message.fill(text("prompt"))
    await message.press("Enter")
    await expect(page.get_by_text(text("answer"))).to_be_visible()
    await expect(page.locator(".said", has_text="prompt")).to_be_visible()
    console.chat = Chat.at_once(refusal=(503, text("error")))
    await message.fill("again")
    await message.press("Enter")
    await expect(page.locator("main").get_by_role("alert").first).to_contain_text(text("error"))
    await untouched(page)


async def test_errors_of_actions_are_text(page, console):
    text = ATTACK.format
    console.refusals |= {"scale": (422, text("scale")), "apply": (422, text("apply"))}
    await page.get_by_role("button", name="Scale chat up").click()
    await expect(page.get_by_role("alert")).to_contain_text(text("scale"))
    await page.get_by_role("button", name="Apply a manifest").click()
    await page.locator("#manifest").fill("kind: Model")
    await page.get_by_role("button", name="Apply", exact=True).click()
    await expect(page.locator("#apply-error")).to_have_text(text("apply"))
    await untouched(page)


async def test_a_hostile_address_is_only_a_name(page, console):
    for path in ("models/%3Cscript%3E", "models/%ff", "javascript:alert(1)", "/x.test/y"):
        await go(page, path)
        await expect(page.get_by_role("heading", level=1)).to_be_visible()
    await untouched(page)


async def test_every_view_keeps_to_its_origin_and_its_policy(browser, console):
    """`open_page` checks the console of the browser and each request at the end."""
    console.detail("chat", pods=[pod("chat-0")])
    async with open_page(browser, f"{console.url}/ui/") as page:
        response = await page.reload()
        policy = HEADERS["Content-Security-Policy"]
        assert response.headers["content-security-policy"] == policy
        for path in ("requests", "models/chat", "models/chat/log", "models/chat/yaml",
                     "playground"):  # fmt: skip
            await go(page, path)
            await expect(page.get_by_role("heading", level=1)).to_have_count(1)


async def insert_a_script(browser, url):
    async with open_page(browser, url) as page:
        await page.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "window.owned = 1";
            document.body.append(script);
        }""")
        assert await page.evaluate("window.owned") is None


async def test_a_violation_of_the_policy_fails_a_test(browser, console):
    with pytest.raises(AssertionError, match="Content Security Policy"):
        await insert_a_script(browser, f"{console.url}/ui/")
