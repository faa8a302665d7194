"""OpenAI's audio transcriptions API."""

from __future__ import annotations

import io
import wave
from typing import Any

from kubeai.mock_engine.formats.base import (
    ApiError,
    encode,
)
from kubeai.simulation import text


def audio_seconds(head: bytes, size_bytes: int) -> float:
    """The duration of audio: from the header if it is WAV, else assuming 128 kbit/s.

    ``head``: the first bytes, at least the header. The header of a streamed WAV has no valid
    length, so the duration is capped at what ``size_bytes`` can hold.
    """
    try:
        with wave.open(io.BytesIO(head)) as file:
            frame = file.getsampwidth() * file.getnchannels()
            frames = min(file.getnframes(), size_bytes // frame)
            return float(frames / file.getframerate())
    except (wave.Error, EOFError, ZeroDivisionError):
        return size_bytes / 16_000


def transcript(digest: bytes, seconds: float) -> str:
    """A transcript that depends only on the bytes, about two words per second."""
    words = text.reply(digest, limit=max(1, min(round(2 * seconds), 4096))).text
    return f"transcript of {seconds:.2f} s of audio {digest.hex()[:12]}: {words}"


def transcription(form: str, content: str, seconds: float) -> tuple[str, bytes]:
    """Content type and body of a response in format ``form``."""
    if form == "text":
        return "text/plain", content.encode() + b"\n"
    usage = {"type": "duration", "seconds": int(seconds + 0.999)}
    response: dict[str, Any] = {"text": content, "usage": usage}
    if form == "verbose_json":
        segment = {
            "id": 0,
            "seek": 0,
            "start": 0.0,
            "end": seconds,
            "text": content,
            "tokens": [],
            "temperature": 0.0,
            "avg_logprob": -0.1,
            "compression_ratio": 1.0,
            "no_speech_prob": 0.0,
        }
        more = {"task": "transcribe", "language": "en", "duration": seconds}
        response = more | response | {"segments": [segment]}
    elif form != "json":
        raise ApiError(
            f"response_format: {form!r} is not json, text or verbose_json", param="response_format"
        )
    return "application/json", encode(response)
