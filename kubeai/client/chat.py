"""``kubeai chat``: a conversation with a model, or one question.

The answer goes to stdout as it arrives. What happens meanwhile goes to stderr, if that is a
terminal: the gateway's SSE comments while it waits for a replica, and how long the wait has taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from typing import IO, Any

import msgspec

from kubeai.client.gateway import Gateway
from kubeai.errors import KubeAIError
from kubeai.loadtest.sse import Delta, decode_completion
from kubeai.logs import colours_wanted, printable

STATUS_INTERVAL_S = 0.5
STATUS_AFTER_S = 1.0
PROMPT_MAX_BYTES = 16 << 20
ERROR_BODY_MAX_BYTES = 64 << 10
PROMPT = ">>> "
HELP = "Ctrl-C stops an answer. /clear forgets the conversation. /exit or Ctrl-D leaves."

Message = dict[str, str]


class Status:
    """One line on a terminal that says what is being waited for; nothing without a terminal."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream if stream.isatty() else None
        self._text = ""
        self._began_s = 0.0
        self._is_shown = False

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Keep the line up to date while the block runs, and remove it afterwards."""
        self._text, self._began_s = "waiting for the answer", time.monotonic()
        ticker = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticker.cancel()
            await asyncio.gather(ticker, return_exceptions=True)
            self.clear()

    def set(self, text: str) -> None:
        """Change the line."""
        self._text = printable(text)
        self._draw()

    def clear(self) -> None:
        """Remove the line, and show nothing until the next `waiting`."""
        self._text = ""
        if self._stream is not None and self._is_shown:
            self._write("\r\x1b[K")
            self._is_shown = False

    async def _tick(self) -> None:
        await asyncio.sleep(STATUS_AFTER_S)
        while self._text:
            self._draw()
            await asyncio.sleep(STATUS_INTERVAL_S)

    def _draw(self) -> None:
        if self._stream is not None and self._text:
            waited_s = time.monotonic() - self._began_s
            # Without auto-wrap, a line that is too long stays one line.
            self._write(f"\r\x1b[K\x1b[?7l… {self._text} ({waited_s:.0f} s)\x1b[?7h")
            self._is_shown = True

    def _write(self, text: str) -> None:
        assert self._stream is not None
        self._stream.write(text)
        self._stream.flush()


class Conversation:
    """The messages so far, and how to get the next answer."""

    def __init__(
        self, gateway: Gateway, model: str, *, system: str = "", **parameters: object
    ) -> None:
        """``parameters``: further fields of the requests; None is left out."""
        self._gateway = gateway
        self._model = model
        self._parameters = {key: value for key, value in parameters.items() if value is not None}
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._system)
        self._status = Status(sys.stderr)

    def clear(self) -> None:
        """Forget all messages but the system message."""
        self.messages = list(self._system)

    async def ask(self, text: str) -> None:
        """Print the answer to a message. It is remembered, as far as it has arrived."""
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            async with self._status.waiting():
                await self._stream(answer)
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
                _write_out("\n")
            else:  # so that the question can be asked again
                self.messages.pop()

    async def _stream(self, answer: list[str]) -> None:
        body = {
            "model": self._model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},  # for the gateway's rates of tokens
            **self._parameters,
        }
        url = f"{self._gateway.base_url}/chat/completions"
        async with self._gateway.request("POST", url, json=body) as response:
            if response.status != 200:
                error = await response.content.read(ERROR_BODY_MAX_BYTES)
                await self._gateway.check_model(self._model, response, error)
            if response.content_type != "text/event-stream":
                self._take(await response.read(), answer)
                return
            try:
                async for line in response.content:
                    if self._line(line, answer):
                        return
            except ValueError:  # from aiohttp
                raise KubeAIError("the stream has a line that is too long") from None
        if answer:
            raise KubeAIError("the answer was cut off: the stream ended early")
        raise KubeAIError("the stream ended without an answer")

    def _line(self, line: bytes, answer: list[str]) -> bool:
        """Take a line of the stream; returns whether it was the last one."""
        field, _, value = line.rstrip(b"\r\n").partition(b":")
        if not field and value:  # a comment
            self._status.set(value.decode(errors="replace").strip())
        if field != b"data":
            return False
        if value.strip() == b"[DONE]":
            return True
        self._take(value, answer)
        return False

    def _take(self, data: bytes, answer: list[str]) -> None:
        try:
            event = decode_completion(data)
        except msgspec.DecodeError as error:
            raise KubeAIError(f"invalid event in the stream: {error}") from None
        if event.error is not None:
            detail: Any = event.error
            message = detail.get("message") if isinstance(detail, dict) else detail
            raise KubeAIError(str(message))
        for delta in event.deltas[:1]:
            self._show(delta, answer)

    def _show(self, delta: Delta, answer: list[str]) -> None:
        thought = delta.reasoning_content or delta.reasoning or ""
        if thought and sys.stdout.isatty():
            self._status.clear()
            _write_out(thought, faint=True)
        if delta.content:
            self._status.clear()
            answer.append(delta.content)
            _write_out(delta.content)


def ask_once(gateway: Gateway, conversation: Conversation, text: str) -> None:
    """Print the answer to one question."""

    async def run() -> None:
        async with gateway:
            await conversation.ask(text)

    asyncio.run(run())


def talk(gateway: Gateway, conversation: Conversation) -> None:
    """Ask for messages and print the answers until the user leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() then edits lines and has a history)
    print(HELP, file=sys.stderr)
    with asyncio.Runner() as runner:
        runner.run(gateway.__aenter__())
        try:
            while (text := _read_message()) is not None:
                if text == "/clear":
                    conversation.clear()
                elif text:
                    _answer(runner, conversation, text)
        finally:
            runner.run(gateway.__aexit__())


def _read_message() -> str | None:
    """The next message; None if the user leaves."""
    try:
        text = input(PROMPT).strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
    return None if text in ("/exit", "/quit", "/bye") else text


def _answer(runner: asyncio.Runner, conversation: Conversation, text: str) -> None:
    try:
        runner.run(conversation.ask(text))
    except KeyboardInterrupt:
        print("(stopped)", file=sys.stderr)
    except KubeAIError as error:
        print(f"error: {error}", file=sys.stderr)


def read_prompt() -> str:
    """The whole of stdin; KubeAIError if it is empty or too long."""
    data = sys.stdin.buffer.read(PROMPT_MAX_BYTES + 1)
    if len(data) > PROMPT_MAX_BYTES:
        raise KubeAIError(f"the prompt on stdin is longer than {PROMPT_MAX_BYTES >> 20} MiB")
    text = data.decode(errors="replace").strip()
    if not text:
        raise KubeAIError("stdin is empty; give the prompt as an argument or on stdin")
    return text


def _write_out(text: str, *, faint: bool = False) -> None:
    """Write to stdout; on a terminal, the model's text must not control it."""
    if sys.stdout.isatty():
        text = "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))
        if faint and colours_wanted():
            text = f"\x1b[2m{text}\x1b[0m"
    sys.stdout.write(text)
    sys.stdout.flush()
