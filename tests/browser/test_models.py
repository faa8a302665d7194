"""The list of Models: what it shows, live updates, scaling, applying and deleting."""

import re
import time

import pytest
from browsers import go
from fakes.scripted_console import summary
from playwright.async_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
]
MANIFEST = "apiVersion: kubeai.org/v1\nkind: Model\nmetadata:\n  name: {}\n"


def row(page, name):
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name))


async def test_a_row_shows_state_reason_replicas_load_and_latency(page, console):
    console.put(
        "llama",
        state="Starting",
        reason="PullingImage",
        message="pulling image vllm:1, 1 of 3",
        replicas={"ready": 1, "desired": 3, "min": 0, "max": 5},
        in_flight=17,
        held=4,
        rates={
            "window_s": 60,
            "requests_per_s": 2.34,
            "prompt_tokens_per_s": 1800.0,
            "output_tokens_per_s": 55.0,
        },
        ttft_s={"window_s": 300, "count": 9, "p50": 0.21, "p99": 1.5},
    )
    cells = row(page, "llama")
    await expect(cells).to_contain_text("Starting")
    await expect(cells).to_contain_text("PullingImage: pulling image vllm:1, 1 of 3")
    for text in ("1 / 3", "0 to 5", "17", "4", "2.3", "55", "1,800 prompt", "210 ms", "1.50 s"):
        await expect(cells).to_contain_text(text)
    await expect(page.locator("#workers")).to_have_text("1 worker")
    await expect(page.locator("#connection")).to_have_text("Live")


async def test_tokens_that_no_engine_reports_are_a_dash(page, console):
    rates = {"window_s": 60, "requests_per_s": 2.0, "prompt_tokens_per_s": 800.0}
    console.put("chat", rates=rates | {"output_tokens_per_s": None})
    await expect(row(page, "chat").get_by_role("cell").nth(5)).to_have_text("–800 prompt")
    await go(page, "models/chat")
    await expect(page.locator(".tile", has_text="Output tokens/s").locator("dd")).to_have_text("–")


async def test_rows_change_appear_and_disappear_with_the_state(page, console):
    await expect(row(page, "chat")).to_contain_text("Ready")
    console.put("chat", state="Degraded", reason="CrashLoopBackOff", message="engine exits with 1")
    await expect(row(page, "chat")).to_contain_text("CrashLoopBackOff: engine exits with 1")
    console.put("another")
    await expect(row(page, "another")).to_be_visible()
    del console.models["another"]
    console.push()
    await expect(row(page, "another")).to_have_count(0)


async def test_scale_buttons_send_the_next_number_and_stop_at_the_bounds(page, console):
    console.put("chat", replicas={"ready": 1, "desired": 1, "min": 1, "max": 2})
    up = page.get_by_role("button", name=re.compile("Scale chat up"))
    down = page.get_by_role("button", name=re.compile("Scale chat down"))
    await expect(down).to_have_attribute("aria-disabled", "true")
    await up.click()
    await expect(row(page, "chat")).to_contain_text("1 / 2")
    await expect(up).to_have_attribute("aria-disabled", "true")
    await expect(up).to_have_attribute("title", "maxReplicas of chat is 2")
    await up.click(force=True)  # Playwright waits until it is enabled
    await down.click()
    await expect(row(page, "chat")).to_contain_text("1 / 1")
    path = "/ui/api/models/chat/scale"
    assert console.calls == [("POST", path, {"replicas": 2}), ("POST", path, {"replicas": 1})]


async def test_a_refused_scale_shows_the_message_of_the_api(page, console):
    console.refusals["scale"] = (422, "replicas: 2 is above maxReplicas (1)")
    await page.get_by_role("button", name=re.compile("Scale chat up")).click()
    alert = page.get_by_role("alert").filter(has_text="above maxReplicas (1)")
    await expect(alert).to_be_visible()
    await expect(row(page, "chat")).to_contain_text("1 / 1")
    await alert.get_by_role("button", name="Dismiss").click()
    await expect(alert).to_have_count(0)


async def test_a_manifest_is_applied_from_the_text(page, console):
    await page.get_by_role("button", name="Apply a manifest").click()
    await page.locator("#manifest").fill(MANIFEST.format("fresh"))
    await page.get_by_role("button", name="Apply", exact=True).click()
    await expect(row(page, "fresh")).to_be_visible()
    await expect(page.get_by_role("dialog")).to_have_count(0)
    await expect(page.get_by_text("Applied: fresh")).to_be_visible()
    assert console.calls == [("POST", "/ui/api/apply", MANIFEST.format("fresh"))]


async def test_a_refused_manifest_keeps_the_text_and_shows_why(page, console):
    console.refusals["apply"] = (422, "spec.engine: 'vLLM' is not one of VLLM, OLlama")
    await page.get_by_role("button", name="Apply a manifest").click()
    await page.locator("#manifest").fill(MANIFEST.format("fresh"))
    await page.locator("#manifest").press("Control+Enter")
    dialog = page.get_by_role("dialog")
    await expect(dialog.get_by_role("alert")).to_have_text(console.refusals["apply"][1])
    await expect(page.locator("#manifest")).to_have_value(MANIFEST.format("fresh"))


async def test_a_file_is_dropped_on_the_page_or_chosen(page, console):
    drop = """text => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([text], "model.yaml"));
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
    }"""
    await expect(row(page, "chat")).to_be_visible()
    await page.evaluate(drop, MANIFEST.format("dropped"))
    await expect(page.locator("#manifest")).to_have_value(MANIFEST.format("dropped"))
    file = {"name": "m.yaml", "mimeType": "text/yaml", "buffer": MANIFEST.format("chosen").encode()}
    await page.locator("#manifest-file").set_input_files(file)
    await expect(page.locator("#manifest")).to_have_value(MANIFEST.format("chosen"))


async def test_a_model_is_deleted_only_after_confirmation(page, console):
    delete = page.get_by_role("button", name="Delete chat")
    await delete.click()
    await expect(page.get_by_role("dialog")).to_contain_text("its 1 ready replica")
    await page.get_by_role("button", name="Cancel").click()
    await expect(delete).to_be_focused()
    assert console.calls == []
    await delete.click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await expect(row(page, "chat")).to_have_count(0)
    assert [call[:2] for call in console.calls] == [("DELETE", "/ui/api/models/chat")]
    await expect(page.get_by_text("There is no Model yet.")).to_be_visible()


async def test_what_is_not_allowed_is_not_offered(page, console):
    await expect(page.get_by_role("button", name="Delete chat")).to_be_visible()
    console.can = {"scale": False, "apply": False, "delete": False}
    console.push()
    for name in ("Delete chat", "Apply a manifest", re.compile("Scale chat")):
        await expect(page.get_by_role("button", name=name)).to_have_count(0)


async def test_the_filter_matches_names_states_engines_and_features(page, console):
    console.put("embed", engine="Infinity", features=["TextEmbedding"], state="Scaled to zero")
    search = page.get_by_role("searchbox", name="Filter Models")
    for text, shown in (("emb", "embed"), ("infinity zero", "embed"), ("generation", "chat")):
        await search.fill(text)
        await expect(page.get_by_role("rowheader")).to_have_count(1)
        await expect(row(page, shown)).to_be_visible()
    await search.fill("nothing")
    await expect(page.get_by_text("No Model matches the filter.")).to_be_visible()
    await search.fill("")
    await page.keyboard.press("Tab")
    await page.locator("h1").click()
    await page.keyboard.press("/")
    await expect(search).to_be_focused()


async def test_200_models_show_at_once_and_update_without_losing_the_focus(page, console):
    for number in range(200):
        name = f"model-{number:03}"
        console.models[name] = summary(name)
    started = time.monotonic()
    await page.reload()
    await expect(row(page, "model-199")).to_be_attached()
    assert time.monotonic() - started < 10, "seconds until 200 rows are shown"
    button = page.get_by_role("button", name="Delete model-150")
    await button.focus()
    row_element = await row(page, "model-150").element_handle()
    for number in range(200):
        console.models[f"model-{number:03}"] |= {"in_flight": number + 7}
    started = time.monotonic()
    console.put("model-150", in_flight=1234)
    await expect(row(page, "model-150")).to_contain_text("1,234")
    assert time.monotonic() - started < 3, "seconds until 200 changed rows are shown"
    await expect(button).to_be_focused()
    assert await row_element.evaluate("row => row.isConnected"), "the row was replaced"
    # Models before it come and go; the focus stays where it is.
    console.put("a-first")
    del console.models["model-149"]
    console.push()
    await expect(row(page, "a-first")).to_be_visible()
    await expect(button).to_be_focused()


async def test_an_update_of_200_models_takes_less_than_a_frame_budget(page, console):
    """Median time of the script and the layout for one state in which every row changes."""
    for number in range(200):
        console.models[f"m-{number:03}"] = summary(f"m-{number:03}")
    console.push()
    await expect(row(page, "m-199")).to_be_attached()
    took_ms = await page.evaluate("""async () => {
        const { store } = await import("/ui/static/store.js");
        const took = [];
        for (let round = 1; round <= 7; round += 1) {
            for (const model of store.state.models) model.in_flight = round;
            const began = performance.now();
            store.dispatchEvent(new Event("state"));
            document.body.getBoundingClientRect();
            took.push(performance.now() - began);
            await new Promise(requestAnimationFrame);
        }
        return took.sort((a, b) => a - b)[3];
    }""")
    assert took_ms < 150
