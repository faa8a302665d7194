"""Chat requests, and scripts for engines that answer or fail."""

import json
from typing import Any

from fakes.wire import Message, Wire, answer, post

CHAT = "/openai/v1/chat/completions"


def ask(model: str = "m", *headers: str, path: str = CHAT, **fields: Any) -> bytes:
    return post(path, json.dumps({"model": model, **fields}).encode(), *headers)


async def error_of(wire: Wire, status: int) -> dict:
    answered = await wire.answer()
    assert answered.status == status, answered
    assert answered.one("content-type") == "application/json"
    error = json.loads(answered.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def failing(status: int):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(status, b"failed", reason="Bad"))

    return script


async def lose(wire: Wire, request: Message) -> None:
    wire.close()


async def reset(wire: Wire, request: Message) -> None:
    wire.reset()


async def nonsense(wire: Wire, request: Message) -> None:
    await wire.send(b"nonsense\r\n\r\n")


async def hang(wire: Wire, request: Message) -> None:
    await wire.reader.read()
