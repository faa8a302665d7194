"""The console of a running `kubeai local`, with mock engines."""

import asyncio
import os
import re
import signal
import sys

import pytest
import pytest_asyncio
from browsers import go, open_page
from harness import model, replicas, running, until
from playwright.async_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(180),
]
SLOW_START = ("--startup-delay=5s",)  # comments begin after two seconds
PROMPT = 'It\'s "quoted", $HOME `id`\nand <b>more</b>'
MANIFEST = """\
apiVersion: kubeai.org/v1
kind: Model
metadata: {name: applied}
spec:
  url: hf://mock/applied
  engine: VLLM
  features: [TextGeneration]
  image: kubeai/mock-engine
  minReplicas: 0
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def local(tmp_path_factory):
    """Models that start from zero. Each test uses its own."""
    models = (
        model("cold", args=SLOW_START, minReplicas=0, maxReplicas=2),
        model("chat", minReplicas=1, maxReplicas=2),
        model("scaled", minReplicas=1, maxReplicas=3, scaleDownDelaySeconds=600),
        model("embed", engine="Infinity", features=("TextEmbedding",), minReplicas=0),
        model("speech", engine="FasterWhisper", features=("SpeechToText",), minReplicas=0),
    )
    async with running(tmp_path_factory.mktemp("local"), *models, workers=2) as local:
        yield local


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser, local):
    async with open_page(browser, f"{origin(local)}/") as page:
        await expect(page.locator("#connection")).to_have_text("Live")
        yield page


def origin(local):
    return local.endpoint.removesuffix("/openai/v1")


def row(page, name):
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name))


async def say(page, text):
    await page.get_by_role("textbox", name="Message").fill(text)
    await page.get_by_role("textbox", name="Message").press("Enter")


async def test_the_root_leads_to_the_models(page, local):
    assert page.url.startswith(f"{origin(local)}/ui/")
    for name in ("cold", "chat", "scaled", "embed", "speech"):
        await expect(row(page, name)).to_be_visible()
    await expect(row(page, "chat")).to_contain_text("Ready")
    await expect(page.locator("#workers")).to_have_text("2 workers")


async def test_a_cold_start_in_the_playground_ends_with_an_answer(page):
    await go(page, "playground/cold")
    await expect(page.get_by_role("combobox", name="Model")).to_have_value("cold")
    await say(page, "Hello?")
    progress = page.locator(".progress:visible")
    # From the comments of the stream.
    await expect(progress).to_contain_text("Waiting for a replica: loading the model")
    await expect(progress.locator(".elapsed")).to_have_text(re.compile(r"[1-9]\.\d s"))
    answer = page.get_by_role("article", name="cold")
    await expect(answer).to_contain_text("mock", timeout=30_000)
    await expect(answer).to_contain_text("output tokens", timeout=30_000)
    await expect(answer).to_contain_text(re.compile(r"held for \d"))
    # The request, its endpoint and why it was chosen.
    await page.get_by_role("link", name="Requests").click()
    request = page.get_by_role("region", name="Requests").get_by_role("row").nth(1)
    await expect(request).to_contain_text("model-cold-")
    await expect(request).to_contain_text("200")
    assert len(await request.locator("td").last.inner_text()) > 10
    # The Model, with the reason for the step from zero.
    await request.get_by_role("link", name="cold").click()
    await expect(page.get_by_role("listitem").first).to_contain_text("0 → 1")
    await expect(page.get_by_role("region", name="Pods")).to_contain_text("model-cold-")
    await page.get_by_role("link", name="Log").click()
    await expect(page.get_by_role("log")).to_contain_text("mock engine listens")
    await page.get_by_role("link", name="YAML").click()
    await expect(page.get_by_role("region", name="YAML")).to_contain_text("--startup-delay=5s")


async def test_a_model_is_scaled_within_its_bounds(page, local):
    up = page.get_by_role("button", name=re.compile("Scale scaled up"))
    await up.click()
    async with local.kube() as kube:

        async def two():
            return await replicas(kube, "scaled") == (2, 2, 2)

        await until("two replicas are ready", two, 30)
    await expect(row(page, "scaled")).to_contain_text("2 / 2")


async def test_a_manifest_is_applied_and_its_model_deleted(page):
    await page.get_by_role("button", name="Apply a manifest").click()
    await page.locator("#manifest").fill(MANIFEST.replace("VLLM", "vLLM"))
    await page.get_by_role("button", name="Apply", exact=True).click()
    await expect(page.locator("#apply-error")).to_contain_text("engine")
    await page.locator("#manifest").fill(MANIFEST)
    await page.get_by_role("button", name="Apply", exact=True).click()
    await expect(row(page, "applied")).to_contain_text("Scaled to zero")
    await page.get_by_role("button", name="Delete applied").click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await expect(row(page, "applied")).to_have_count(0)


async def test_embeddings_and_transcriptions_are_answered(page):
    await go(page, "playground/embed")
    await page.get_by_label("Text", exact=True).fill("a king in his castle")
    await page.get_by_label("Compare with").fill("a queen in her castle")
    await page.get_by_role("button", name="Embed", exact=True).click()
    await expect(page.locator(".result:visible")).to_contain_text(
        re.compile(r"Cosine similarity0\.\d{4}"), timeout=30_000
    )
    await go(page, "playground/speech")
    file = {"name": "speech.mp3", "mimeType": "audio/mpeg", "buffer": bytes(32_000)}
    await page.get_by_label("Audio file").set_input_files(file)
    await page.get_by_role("button", name="Transcribe").click()
    await expect(page.locator(".result:visible")).to_contain_text("mock", timeout=30_000)


@pytest.mark.parametrize("language", ["curl", "Python"])
async def test_a_copied_program_gets_an_answer_from_the_gateway(page, language):
    await go(page, "playground/chat")
    await expect(page.get_by_role("combobox", name="Model")).to_have_value("chat")
    await page.get_by_role("textbox", name="Message").fill(PROMPT)
    await page.get_by_role("button", name=language, exact=True).click()
    await page.get_by_role("complementary").get_by_role("button", name="Copy").click()
    program = await page.evaluate("navigator.clipboard.readText()")
    command = ["sh", "-c", program] if language == "curl" else [sys.executable, "-c", program]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    assert process.returncode == 0
    assert b"mock" in printed


async def test_a_dead_worker_is_noticed_and_recovered_from(page, local):
    await expect(row(page, "chat")).to_contain_text("Ready")
    before = local.workers()
    assert len(before) == 2
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    banner = page.get_by_role("region", name="Connection")
    await expect(banner).to_contain_text(re.compile("is lost|Connected again"))
    await expect(banner).to_contain_text("Connected again", timeout=30_000)
    await expect(page.locator("#connection")).to_have_text("Live")
    await expect(page.locator("#workers")).to_have_attribute("title", re.compile("1 restart"))
    await go(page, "playground/chat")
    await say(page, "Still there?")
    await expect(page.get_by_role("article", name="chat")).to_contain_text("output tokens")
