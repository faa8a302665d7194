"""The console with keys: logging in and out, a key that is revoked, and the Playground."""

import pytest
from browsers import go, open_page
from fakes.scripted_console import Chat
from playwright.async_api import expect

from kubeai.gateway.login import HEADERS

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
]
KEY = "sk-kubeai-a_b-C0123456789"


async def log_in(page, key=KEY):
    await page.get_by_label("API key").fill(key)
    await page.get_by_role("button", name="Log in").click()


@pytest.fixture
def keyed(console):
    console.admins_key = KEY
    return console


async def test_the_form_leads_to_the_console_and_back(browser, keyed):
    async with open_page(browser, f"{keyed.url}/ui/") as page:
        await expect(page.get_by_label("API key")).to_be_focused()
        await log_in(page, "wrong")
        await expect(page.get_by_role("alert")).to_have_text("The API key is not valid.")
        await expect(page.get_by_label("API key")).to_be_empty()
        await page.keyboard.type(f" {KEY} ")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("rowheader", name="chat")).to_be_visible()
        (cookie,) = await page.context.cookies()
        assert (cookie["name"], cookie["value"], cookie["path"]) == ("kubeai_key", KEY, "/ui")
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert cookie["expires"] == -1
        assert await page.evaluate("document.cookie") == ""
        assert KEY not in await page.content()
        await page.reload()
        await page.get_by_role("button", name="Log out").click()
        await expect(page.get_by_label("API key")).to_be_visible()
        assert await page.context.cookies() == []


async def test_without_keys_there_is_no_log_out(page, console):
    await expect(page.get_by_role("rowheader", name="chat")).to_be_visible()
    await expect(page.get_by_role("button", name="Log out")).to_have_count(0)


async def test_the_form_has_no_script_and_its_own_policy(browser, keyed):
    async with open_page(browser, f"{keyed.url}/ui/", java_script_enabled=False) as page:
        response = await page.reload()
        assert response.status == 401
        policy = HEADERS["Content-Security-Policy"]
        assert response.headers["content-security-policy"].split(", ")[0] == policy
        width = await page.locator("main").bounding_box()
        assert width["width"] < 500, "the style is blocked"
        await log_in(page)
        await expect(page).to_have_url(f"{keyed.url}/ui/")


async def test_a_revoked_key_leads_to_the_form(browser, keyed):
    async with open_page(browser, f"{keyed.url}/ui/") as page:
        await log_in(page)
        await expect(page.get_by_role("rowheader", name="chat")).to_be_visible()
        keyed.admins_key = "another"
        await keyed.stop()
        await keyed.start()
        await expect(page.get_by_label("API key")).to_be_visible()
        await expect(page.get_by_role("alert")).to_have_text("No longer valid.")


async def test_the_playground_uses_the_login_and_its_programs_a_variable(browser, keyed):
    keyed.chat = Chat.at_once()
    async with open_page(browser, f"{keyed.url}/ui/") as page:
        await log_in(page)
        await go(page, "playground/chat")
        program = page.get_by_role("region", name="Program")
        await expect(program).to_contain_text('-H "Authorization: Bearer $KUBEAI_API_KEY"')
        await expect(program).to_contain_text(f"{keyed.url}/openai/v1/chat/completions")
        await page.get_by_role("button", name="Python", exact=True).click()
        await expect(program).to_contain_text('os.environ["KUBEAI_API_KEY"]')
        await page.get_by_role("button", name="JavaScript").click()
        await expect(program).to_contain_text("process.env.KUBEAI_API_KEY")
        await page.get_by_role("textbox", name="Message").fill("Hi")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("article", name="chat")).to_contain_text("Hello there.")


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing_in_the_form(browser, keyed, theme):
    axe = pytest.importorskip("axe_playwright_python.async_playwright").Axe()
    async with open_page(browser, f"{keyed.url}/ui/", color_scheme=theme, bypass_csp=True) as page:
        await log_in(page, "wrong")
        await expect(page.get_by_role("alert")).to_be_visible()
        found = await axe.run(page)
        assert found.response["passes"], "axe did not run"
        assert found.violations_count == 0, found.generate_report()
