"""The Playground: chat, embeddings, transcription, cold starts, and the request as a program."""

import asyncio
import base64
import json
import os
import shutil
import sys

import pytest
from browsers import go
from fakes.scripted_console import Chat
from playwright.async_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
]
NASTY = "It's \"quoted\", $HOME `whoami` $(id) \\n \\ ! % 'x''\n<b>ünï</b> \t😀 \u2028 EOF\nEOF\n#"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


async def open_playground(page, model="chat"):
    await go(page, f"playground/{model}")
    await expect(page.get_by_role("combobox", name="Model")).to_have_value(model)


async def say(page, text):
    await page.get_by_role("textbox", name="Message").fill(text)
    await page.get_by_role("textbox", name="Message").press("Enter")


def alerts(page):
    """Error messages that are visible."""
    return page.locator("main .error:visible")


async def copied(page, language):
    await page.get_by_role("button", name=language, exact=True).click()
    request = page.get_by_role("complementary")
    await request.get_by_role("button", name="Copy").click()
    await expect(request.get_by_role("button", name="Copied")).to_be_visible()
    return await page.evaluate("navigator.clipboard.readText()")


async def execute(*command):
    """Run a copied program; returns what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_an_answer_is_streamed_with_its_figures(page, console):
    console.chat = Chat(
        usage={
            "prompt_tokens": 12,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 8},
        }
    )
    console.chat.go.set()
    await open_playground(page)
    await page.get_by_label("System prompt").fill("Be brief.")
    await page.get_by_label("Temperature").fill("0.3")
    await page.get_by_label("Maximum of output tokens").fill("64")
    await say(page, "Hello?")
    answer = page.get_by_role("article", name="chat")
    await expect(answer).to_contain_text("Hello there.")
    await expect(page.get_by_role("button", name="Stop")).to_be_visible()
    console.chat.end.set()
    await expect(answer).to_contain_text("2 output tokens")
    await expect(answer).to_contain_text("12 prompt tokens, 8 cached")
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert console.asked == [
        {
            "model": "chat",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello?"},
            ],
            "temperature": 0.3,
            "max_tokens": 64,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    await say(page, "And now?")
    await expect(page.get_by_role("article", name="chat")).to_have_count(2)
    assert [each["content"] for each in console.asked[1]["messages"]] == [
        *("Be brief.", "Hello?", "Hello there.", "And now?")
    ]


async def test_stop_ends_the_request_and_keeps_what_has_arrived(page, console):
    console.chat = Chat()
    console.chat.go.set()
    await open_playground(page)
    await say(page, "Hello?")
    await expect(page.get_by_role("article", name="chat")).to_contain_text("Hello there.")
    await page.get_by_role("button", name="Stop").click()
    await expect(page.get_by_role("article", name="chat")).to_contain_text("Stopped.")
    await asyncio.wait_for(console.left.wait(), 10)
    await expect(page.get_by_role("article", name="chat")).to_contain_text("Hello there.")


async def test_a_cold_start_shows_what_it_waits_for_and_for_how_long(page, console):
    console.put("chat", state="Scaled to zero", replicas={
        "ready": 0, "desired": 0, "min": 0, "max": 3})  # fmt: skip
    console.chat = Chat(comments=("waiting for a replica: pulling image, 1 of 3",), held_s=41.37)
    console.chat.end.set()
    await open_playground(page)
    await say(page, "Hello?")
    progress = page.locator(".progress:visible")
    await expect(progress).to_contain_text("Waiting for a replica: pulling image, 1 of 3")
    before = await progress.locator(".elapsed").text_content()
    await expect(progress.locator(".elapsed")).not_to_have_text(before)
    console.chat.go.set()
    await expect(page.get_by_role("article", name="chat")).to_contain_text("Hello there.")
    await expect(page.get_by_role("article", name="chat")).to_contain_text("held for 41.4 s")
    await expect(progress).to_have_count(0)


async def test_without_comments_the_progress_is_the_state_of_the_model(page, console):
    console.put("chat", state="Starting", reason="PullingImage", message="pulling image vllm:1",
                replicas={"ready": 0, "desired": 1, "min": 0, "max": 3})  # fmt: skip
    console.chat = Chat()
    await open_playground(page)
    await say(page, "Hello?")
    progress = page.locator(".progress:visible")
    await expect(progress).to_contain_text("Waiting for a replica: pulling image vllm:1")
    console.put("chat", message="loading weights")
    await expect(progress).to_contain_text("loading weights")
    console.chat.go.set()
    console.chat.end.set()


async def test_errors_are_the_messages_of_the_api_and_can_be_tried_again(page, console):
    console.chat = Chat.at_once(refusal=(503, "Too many requests are held."))
    await open_playground(page)
    await say(page, "Hello?")
    await expect(alerts(page)).to_contain_text("Too many requests are held.")
    console.chat = Chat.at_once(error="No replica was ready in time.")
    await page.get_by_role("button", name="Try again").click()
    await expect(alerts(page)).to_contain_text("No replica was ready in time.")
    await expect(page.get_by_role("article", name="chat")).to_contain_text("Hello there.")
    console.chat = Chat.at_once()
    await page.get_by_role("button", name="Try again").click()
    await expect(page.get_by_role("article", name="chat")).to_contain_text("2 output tokens")
    await expect(page.get_by_role("alert").filter(has_text="ready")).to_have_count(0)
    assert [len(each["messages"]) for each in console.asked] == [1, 1, 1]


async def test_code_in_an_answer_gets_a_block_of_its_own(page, console):
    pieces = ("Try:\n``", "`py\nprint(", "'<b>')\n```\nDone", ".")
    console.chat = Chat.at_once(pieces=pieces)
    await open_playground(page)
    await say(page, "Code, please")
    answer = page.get_by_role("article", name="chat")
    await expect(answer.locator("pre code")).to_have_text("print('<b>')")
    await expect(answer.locator(".answer > p")).to_have_text(["Try:", "Done."])
    await answer.get_by_role("button", name="Copy").click()
    await expect(answer.get_by_role("button", name="Copied")).to_be_visible()
    assert await page.evaluate("navigator.clipboard.readText()") == "print('<b>')"


async def test_images_are_sent_as_data_urls(page, console):
    await open_playground(page)
    image = {"name": "dot.png", "mimeType": "image/png", "buffer": PIXEL}
    await page.get_by_label("Images", exact=True).set_input_files(image)
    await expect(page.get_by_role("img", name="Image 1")).to_be_visible()
    await say(page, "What is it?")
    await expect(page.get_by_role("img", name="Attached image")).to_be_visible()
    await expect(page.get_by_role("article", name="chat")).to_contain_text("2 output tokens")
    url = f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"
    assert console.asked[0]["messages"][0]["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]


async def test_models_are_offered_by_feature_and_with_their_adapters(page, console):
    console.put("chat", adapters=["legal"])
    console.put("embed", features=["TextEmbedding"])
    await open_playground(page)
    model = page.get_by_role("combobox", name="Model")
    await expect(model.locator("option")).to_have_text(["chat", "chat_legal"])
    await page.get_by_role("button", name="Embeddings").click()
    await expect(model.locator("option")).to_have_text(["embed"])
    await page.get_by_role("button", name="Transcription").click()
    await expect(page.get_by_text("No Model has the feature SpeechToText.")).to_be_visible()


async def test_a_conversation_survives_a_look_at_another_view(page, console):
    await open_playground(page)
    await say(page, "Hello?")
    await expect(page.get_by_role("article", name="chat")).to_contain_text("2 output tokens")
    await page.get_by_role("link", name="Requests").click()
    await page.get_by_role("link", name="Playground").click()
    await expect(page.get_by_role("article", name="chat")).to_contain_text("Hello there.")
    await page.get_by_role("button", name="New chat").click()
    await expect(page.get_by_role("article")).to_have_count(0)


async def test_embeddings_show_dimensions_values_and_similarity(page, console):
    console.put("embed", features=["TextEmbedding"])
    await open_playground(page, "embed")
    await page.get_by_label("Text", exact=True).fill("king")
    await page.get_by_label("Compare with").fill("queen")
    await page.get_by_role("button", name="Embed", exact=True).click()
    result = page.locator(".result:visible")
    await expect(result).to_contain_text("0.6000")
    await expect(result.locator("dd").first).to_have_text("0.6000")
    await expect(result).to_contain_text("Dimensions3")
    await expect(result).to_contain_text("[1.0000, 0.0000, 0.0000]")


async def test_documents_are_ranked(page, console):
    console.put("rank", features=["Reranking"])
    await open_playground(page, "rank")
    await page.get_by_label("Query").fill("sea")
    await page.get_by_label("Documents").fill("the hills\n\n  the sea  \n")
    await page.get_by_role("button", name="Rerank", exact=True).click()
    result = page.locator(".result:visible")
    await expect(result.locator("li")).to_have_text(["0.5000 the sea", "0.0000 the hills"])
    await expect(result).to_contain_text("2 documents")
    expected = {"model": "rank", "query": "sea", "documents": ["the hills", "the sea"]}
    assert console.asked == [expected]


async def test_an_audio_file_is_transcribed(page, console):
    console.put("whisper", features=["SpeechToText"])
    await open_playground(page, "whisper")
    await page.get_by_role("button", name="Transcribe").click()
    await expect(alerts(page)).to_have_text("Choose an audio file first.")
    file = {"name": "speech.wav", "mimeType": "audio/wav", "buffer": bytes(5000)}
    await page.get_by_label("Audio file").set_input_files(file)
    await page.get_by_role("button", name="Transcribe").click()
    await expect(page.get_by_text("5000 bytes of speech.wav")).to_be_visible()
    assert console.asked == [{"model": "whisper", "file": "speech.wav", "bytes": 5000}]


# -- the request as a program ----------------------------------------------------------------------


async def chat_request(page, console, text):
    await open_playground(page)
    await page.get_by_label("System prompt").fill(f"System: {text}")
    await page.get_by_label("Temperature").fill("0.5")
    await page.get_by_role("textbox", name="Message").fill(text)
    return {
        "model": "chat",
        "messages": [
            {"role": "system", "content": f"System: {text}"},
            {"role": "user", "content": text},
        ],
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_the_copied_curl_command_sends_exactly_the_request(page, console):
    expected = await chat_request(page, console, NASTY)
    command = await copied(page, "curl")
    assert "Hello there." not in command
    printed = await execute("sh", "-c", command)
    assert '"Hello "' in printed
    assert console.asked == [expected]
    # The same that Send sends.
    await page.get_by_role("textbox", name="Message").press("Enter")
    await expect(page.get_by_role("article", name="chat")).to_contain_text("2 output tokens")
    assert console.asked[1] == expected


async def test_a_long_curl_command_passes_the_body_on_standard_input(page, console):
    expected = await chat_request(page, console, "word " * 12_000 + NASTY)
    command = await copied(page, "curl")
    assert "<<'EOF'" in command
    await execute("bash", "-c", command)
    assert console.asked == [expected]


async def test_the_copied_python_program_sends_exactly_the_request(page, console):
    expected = await chat_request(page, console, NASTY)
    printed = await execute(sys.executable, "-c", await copied(page, "Python"))
    assert printed == "Hello there.\n"
    assert console.asked == [expected]


async def test_the_copied_javascript_program_sends_exactly_the_request(page, console, tmp_path):
    expected = await chat_request(page, console, NASTY)
    program = await copied(page, "JavaScript")
    assert await javascript_call(program, tmp_path) == ["chat.completions", expected]


async def test_the_copied_programs_for_embeddings_send_exactly_the_request(page, console, tmp_path):
    console.put("embed", features=["TextEmbedding"])
    await open_playground(page, "embed")
    await page.get_by_label("Text", exact=True).fill(NASTY)
    await page.get_by_label("Compare with").fill("queen")
    expected = {"model": "embed", "input": [NASTY, "queen"], "encoding_format": "float"}
    await execute("sh", "-c", await copied(page, "curl"))
    printed = await execute(sys.executable, "-c", await copied(page, "Python"))
    assert printed == "3 [0.0, 0.0, 1.0]\n3 [0.6, 0.8, 0.0]\n"
    assert console.asked == [expected, expected]
    program = await copied(page, "JavaScript")
    assert await javascript_call(program, tmp_path) == ["embeddings", expected]


async def test_the_copied_programs_for_reranking_send_exactly_the_request(page, console, tmp_path):
    console.put("rank", features=["Reranking"])
    await open_playground(page, "rank")
    await page.get_by_label("Query").fill(NASTY)
    await page.get_by_label("Documents").fill("a\nb")
    expected = {"model": "rank", "query": NASTY.strip(), "documents": ["a", "b"]}
    await execute("sh", "-c", await copied(page, "curl"))
    printed = await execute(sys.executable, "-c", await copied(page, "Python"))
    assert printed == "0 0.0\n1 0.0\n"
    assert console.asked == [expected, expected]
    program = await copied(page, "JavaScript")
    assert await javascript_call(program, tmp_path) == ["/rerank", {"body": expected}]


async def test_the_copied_programs_for_a_file_send_exactly_the_request(
    page, console, tmp_path, monkeypatch
):
    name = 'it\'s; a "file", $(id) `x`.wav'
    (tmp_path / name).write_bytes(bytes(321))
    monkeypatch.chdir(tmp_path)
    console.put("whisper", features=["SpeechToText"])
    await open_playground(page, "whisper")
    file = {"name": name, "mimeType": "audio/wav", "buffer": bytes(321)}
    await page.get_by_label("Audio file").set_input_files(file)
    assert "321 bytes" in await execute("sh", "-c", await copied(page, "curl"))
    assert "321 bytes" in await execute(sys.executable, "-c", await copied(page, "Python"))
    assert [(each["model"], each["bytes"]) for each in console.asked] == [("whisper", 321)] * 2


async def javascript_call(program, tmp_path):
    """Run a program with a stand-in for the package `openai`; returns the call that it makes."""
    if shutil.which("node") is None:
        pytest.skip("node is not on PATH")
    package = tmp_path / "node_modules" / "openai"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"type": "module", "exports": "./index.js"}')
    (package / "index.js").write_text("""
        const call = (name) => ({ create: async (body) => {
            console.log(JSON.stringify([name, body]));
            const empty = { data: [], results: [] };
            empty[Symbol.asyncIterator] = async function* () {};
            return empty;
        } });
        export default class {
            chat = { completions: call("chat.completions") };
            embeddings = call("embeddings");
            post = (path, options) => call(path).create(options);
        }""")
    (tmp_path / "program.mjs").write_text(program)
    printed = await execute("node", os.fspath(tmp_path / "program.mjs"))
    return json.loads(printed)
