"""`kubeai chat` against a scripted gateway, with and without a terminal."""

import asyncio
import os
import sys

import pytest
from fakes.gateway import FakeGateway
from fakes.terminal import PtyProcess
from harness import until

from kubeai.client.gateway import Gateway
from kubeai.errors import KubeAIError

COMMAND = (sys.executable, "-m", "kubeai", "chat")
TIMEOUT_S = 30


@pytest.fixture
async def gateway():
    async with FakeGateway().running() as gateway:
        yield gateway


async def chat(gateway, *arguments, stdin=b"", **env):
    """Run without a terminal; returns the exit status, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"OPENAI_BASE_URL": gateway.base_url} | env,
    )
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


def on_terminal(gateway, *arguments):
    return PtyProcess(*COMMAND, *arguments, "--base-url", gateway.base_url)


async def test_a_prompt_is_answered_on_stdout_and_nothing_else_is_printed(gateway):
    gateway.script.insert(0, ": waiting for a replica: pulling image, 1 of 3")
    options = ("--system", "Be short", "--max-tokens", "5")
    answered = await chat(gateway, "chat", "Hi!", *options, OPENAI_API_KEY="secret")
    assert answered == (0, "Hello there\n", "")
    (sent,) = gateway.chats
    assert sent == {
        "model": "chat",
        "messages": [
            {"role": "system", "content": "Be short"},
            {"role": "user", "content": "Hi!"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
    }
    assert gateway.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("text", ["a\nb", "ä"])
def test_a_key_that_no_header_can_have_is_an_error(text):
    with pytest.raises(KubeAIError, match="the API key has"):
        Gateway("http://127.0.0.1/openai/v1", text)


async def test_stdin_is_the_prompt_if_it_is_not_a_terminal(gateway):
    assert await chat(gateway, "chat", stdin="grüß\nGott".encode()) == (0, "Hello there\n", "")
    assert gateway.chats[0]["messages"] == [{"role": "user", "content": "grüß\nGott"}]


@pytest.mark.parametrize(
    ("script", "out", "error"),
    [
        ([404], "", "there is no model 'nope'; there are: big, chat"),
        ([503], "", "it failed (HTTP status 503)"),
        (["a", ValueError("engine died")], "a\n", "engine died"),
        (["a", "cut"], "a\n", "the answer was cut off: the stream ended early"),
    ],
)
async def test_an_error_is_one_line_on_stderr(gateway, script, out, error):
    gateway.script = script
    assert await chat(gateway, "nope", "Hi!") == (2, out, f"error: {error}\n")


async def test_without_a_gateway_the_error_says_what_to_start(gateway):
    gateway.origin = "http://127.0.0.1:9"  # the discard port: nothing listens there
    code, out, err = await chat(gateway, "chat", "Hi!")
    assert (code, out) == (2, "")
    start = "error: no gateway can be reached at http://127.0.0.1:9 (Connection refused). "
    assert err.startswith(start)
    assert "`kubeai local`" in err


async def test_a_url_that_lists_no_models_is_an_error_that_names_the_option(gateway):
    code, _, err = await chat(gateway, "chat", "Hi!", "--base-url", gateway.origin)
    assert (code, err) == (
        2,
        f"error: --base-url {gateway.origin}: 404: Not Found (HTTP status 404)\n",
    )


async def test_an_invalid_url_is_an_error_that_names_the_option(gateway):
    code, _, err = await chat(gateway, "chat", "Hi!", "--base-url", "localhost:8000")
    assert code == 2
    assert err.startswith("error: --base-url: 'localhost:8000' is not an http")


async def test_a_conversation_keeps_its_history_until_it_is_cleared(gateway):
    async with on_terminal(gateway, "chat") as ran:
        await until("the prompt", lambda: ran.sees(">>>"))
        ran.type("one\n")
        await until("the answer", lambda: ran.sees("Hello there"))
        await until("the next prompt", lambda: ran.terminal.seen().count(">>>") == 2)
        ran.type("two\n")
        await until("the third prompt", lambda: ran.terminal.seen().count(">>>") == 3)
        ran.type("/clear\n")
        await until("the fourth prompt", lambda: ran.terminal.seen().count(">>>") == 4)
        ran.type("three\n")
        await until("the fifth prompt", lambda: ran.terminal.seen().count(">>>") == 5)
        ran.type("\x04")
        assert await ran.end() == 0
    said = [[message["content"] for message in chat["messages"]] for chat in gateway.chats]
    assert said == [["one"], ["one", "Hello there", "two"], ["three"]]


async def test_a_cold_start_is_shown_and_removed_when_the_answer_arrives(gateway):
    gateway.script = [": waiting for a replica: pulling image, 1 of 3", None]
    async with on_terminal(gateway, "chat", "Hi!") as ran:
        await until("the progress", lambda: ran.sees("… waiting for a replica: pulling image"))
    gateway.script = [": waiting for a replica: loading", "Hello"]
    async with on_terminal(gateway, "chat", "Hi!") as ran:
        assert await ran.end() == 0
        assert b"waiting for a replica: loading" in ran.raw
        assert ran.terminal.seen() == "Hello"


async def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(gateway):
    gateway.script = ["Once upon", None]
    async with on_terminal(gateway, "chat") as ran:
        await until("the prompt", lambda: ran.sees(">>>"))
        ran.type("tell me\n")
        await until("the answer begins", lambda: ran.sees("Once upon"))
        ran.type("\x03")
        await until("the next prompt", lambda: ran.terminal.seen().count(">>>") == 2)
        assert ran.sees("(stopped)")
        ran.type("\x03")
        assert await ran.end() == 0
        assert not ran.sees("Traceback")


async def test_an_error_does_not_end_the_conversation_and_control_characters_are_escaped(gateway):
    gateway.script = [500]
    async with on_terminal(gateway, "chat") as ran:
        await until("the prompt", lambda: ran.sees(">>>"))
        ran.type("one\n")
        await until("the error", lambda: ran.sees("error: it failed (HTTP status 500)"))
        gateway.script = ["a\x1b[2Jb"]
        ran.type("two\n")
        await until("the answer", lambda: ran.sees(r"a\x1b[2Jb"))
        ran.type("/exit\n")
        assert await ran.end() == 0
    assert gateway.chats[1]["messages"] == [{"role": "user", "content": "two"}]
