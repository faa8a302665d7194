"""The mock engine's ``/v1/realtime``; tests/clients has whole sessions."""

import asyncio
import base64

import pytest

from kubeai.mock_engine import realtime

AUDIO = base64.b64encode(bytes(32_000)).decode()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("no json", "invalid_json"),
        ("[]", "invalid_json"),
        ('{"type":"x"}', "unknown_event"),
        ('{"type":"session.update"}', "invalid_event"),
        ('{"type":"session.update","model":"none"}', "model_not_found"),
        ('{"type":"input_audio_buffer.commit"}', "model_not_validated"),
        ('{"type":"input_audio_buffer.append","audio":"!"}', "invalid_audio"),
        ('{"type":"input_audio_buffer.append","audio":""}', "invalid_audio"),
    ],
)
async def test_an_invalid_event_is_an_error_and_the_session_goes_on(served, message, code):
    async with served.session.ws_connect("/v1/realtime") as socket:
        assert (await socket.receive_json())["type"] == "session.created"
        await socket.send_str(message)
        error = await socket.receive_json()
        assert (error["type"], error["code"]) == ("error", code)
        await socket.send_json({"type": "session.update", "model": "m"})
        await socket.send_json({"type": "input_audio_buffer.commit", "final": True})
        assert (await socket.receive_json())["type"] == "transcription.done"


async def test_audio_beyond_the_limit_is_an_error_and_the_session_goes_on(served, monkeypatch):
    monkeypatch.setattr(realtime, "WAITING_AUDIO_MAX_BYTES", 70_000)
    async with served.session.ws_connect("/v1/realtime") as socket:
        await socket.receive_json()
        await socket.send_json({"type": "session.update", "model": "m"})
        for _ in range(3):
            await socket.send_json({"type": "input_audio_buffer.append", "audio": AUDIO})
        error = await socket.receive_json()
        assert (error["type"], error["code"]) == ("error", "invalid_audio")
        await socket.send_json({"type": "input_audio_buffer.commit", "final": True})
        events = [(await socket.receive_json())["type"] for _ in range(3)]
    assert events == ["transcription.delta", "transcription.delta", "transcription.done"]


async def test_small_pieces_of_audio_are_bounded_too(served, monkeypatch):
    monkeypatch.setattr(realtime, "WAITING_AUDIO_MAX_PIECES", 3)
    audio = base64.b64encode(b"12").decode()
    async with served.session.ws_connect("/v1/realtime") as socket:
        await socket.receive_json()
        for _ in range(4):
            await socket.send_json({"type": "input_audio_buffer.append", "audio": audio})
        assert (await socket.receive_json())["code"] == "invalid_audio"


async def test_the_transcript_depends_on_the_audio_only(served):
    texts = []
    for _ in range(2):
        async with served.session.ws_connect("/v1/realtime") as socket:
            await socket.send_json({"type": "session.update", "model": "m"})
            await socket.send_json({"type": "input_audio_buffer.append", "audio": AUDIO})
            await socket.send_json({"type": "input_audio_buffer.commit", "final": True})
            events = [await socket.receive_json() for _ in range(3)]
        assert [event["type"] for event in events] == [
            "session.created",
            "transcription.delta",
            "transcription.done",
        ]
        texts.append(events[-1]["text"])
    assert texts[0] == texts[1]
    assert texts[0].startswith("mock ")


async def test_sessions_are_closed_when_the_engine_stops(served):
    async with served.session.ws_connect("/v1/realtime") as socket:
        await socket.receive_json()
        stopping = asyncio.create_task(served.runner.cleanup())
        await socket.receive()
        assert socket.close_code == 1012
        await stopping
