"""What is checked of an engine through the gateway, with the clients that its users have.

Each check asserts what the client relies on. Which of them apply is decided in ``suites.py``: an
engine does not have every route.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import wave
from typing import Any

import ollama
import openai
from session import Session

MESSAGES: Any = [{"role": "user", "content": "Hello, what do you do?"}]
SENTENCES = ["a cat sits on the mat", "a kitten is sitting on a rug", "the stock market crashed"]
SPEECH_SECONDS, SPEECH_HZ = 2, 16000


# -- text generation -------------------------------------------------------------------------------


async def chat(s: Session) -> None:
    answer = await s.openai.chat.completions.create(
        model=s.model, messages=MESSAGES, max_tokens=8, temperature=0
    )
    assert answer.model == s.model, answer.model
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 1


async def chat_streamed(s: Session) -> str:
    stream = await s.openai.chat.completions.create(
        model=s.model,
        messages=MESSAGES,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {s.model}
    finished = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finished[-1] in ("length", "stop"), finished
    assert chunks[-1].usage is not None, "no usage in the last chunk"
    assert len(chunks) > 3, f"only {len(chunks)} chunks"
    return f"{len(chunks)} chunks"


async def structured_output(s: Session) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    answer = await s.openai.chat.completions.create(
        model=s.model,
        messages=MESSAGES,
        max_tokens=40,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
    )
    assert json.loads(answer.choices[0].message.content or "")["answer"] in ("yes", "no")


async def completions(s: Session) -> None:
    answer = await s.openai.completions.create(model=s.model, prompt="Hello", max_tokens=5)
    assert answer.model == s.model
    stream = await s.openai.completions.create(
        model=s.model, prompt="Hello", max_tokens=5, stream=True
    )
    assert [chunk async for chunk in stream]


async def responses(s: Session) -> None:
    answer = await s.openai.responses.create(model=s.model, input="Hello", max_output_tokens=6)
    assert answer.model == s.model, answer.model
    stream = await s.openai.responses.create(
        model=s.model, input="Hello", max_output_tokens=6, stream=True
    )
    types = [event.type async for event in stream]
    assert types[0] == "response.created", types
    assert types[-1] in ("response.completed", "response.incomplete"), types


async def stored_responses(s: Session) -> None:
    """A stored response is found again; an unknown one is not."""
    answer = await s.openai.responses.create(
        model=s.model, input="Hello", max_output_tokens=4, store=True
    )
    again = await s.openai.responses.retrieve(answer.id)
    assert again.id == answer.id
    try:
        await s.openai.responses.retrieve("resp_unknown")
    except openai.NotFoundError:
        return
    raise AssertionError("an unknown response did not give 404")


async def cancelled_response(s: Session) -> str:
    answer = await s.openai.responses.create(
        model=s.model, input="Hello", max_output_tokens=1500, store=True, background=True
    )
    cancelled = await s.openai.responses.cancel(answer.id)
    assert cancelled.id == answer.id
    return str(cancelled.status)


async def messages(s: Session) -> None:
    answer = await s.anthropic.messages.create(model=s.model, messages=MESSAGES, max_tokens=6)
    assert answer.model == s.model, answer.model
    assert answer.usage.output_tokens >= 1
    async with s.anthropic.messages.stream(
        model=s.model, messages=MESSAGES, max_tokens=6
    ) as stream:
        events = [event.type async for event in stream]
    assert events[0] == "message_start", events
    assert events[-1] == "message_stop", events


async def count_tokens(s: Session) -> str:
    count = await s.anthropic.messages.count_tokens(model=s.model, messages=MESSAGES)
    assert count.input_tokens > 3
    return f"{count.input_tokens} tokens"


async def vllm_tokens(s: Session) -> None:
    """vLLM's /tokenize and /detokenize give the text back."""
    tokens = (await s.post("/v1/tokenize", {"prompt": "Hello world"}))["tokens"]
    assert "Hello world" in (await s.post("/v1/detokenize", {"tokens": tokens}))["prompt"]


async def sglang_tokens(s: Session) -> None:
    """SGLang's /tokenize and /detokenize give the text back."""
    tokens = (await s.post("/v1/tokenize", {"prompt": "Hello world"}))["tokens"]
    assert "Hello world" in (await s.post("/v1/detokenize", {"tokens": tokens}))["text"]


async def llama_cpp_tokens(s: Session) -> None:
    """llama.cpp's /tokenize and /detokenize give the text back."""
    tokens = (await s.post("/v1/tokenize", {"content": "Hello world"}))["tokens"]
    assert "Hello world" in (await s.post("/v1/detokenize", {"tokens": tokens}))["content"]


async def compressed(s: Session) -> None:
    """With ``gateway.decompressBodies``, an engine need not understand compressed requests."""
    body = {"model": s.model, "messages": MESSAGES, "max_tokens": 4}
    response = await s.http.post(
        "/openai/v1/chat/completions",
        content=gzip.compress(json.dumps(body).encode()),
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    assert response.status_code == 200, f"{response.status_code} {response.text[:300]}"


async def errors(s: Session) -> None:
    """The engine's own error passes through, and clients recognise it."""
    try:
        await s.openai.chat.completions.create(
            model=s.model, messages=MESSAGES, max_tokens=4, extra_body={"temperature": "warm"}
        )
    except (openai.BadRequestError, openai.UnprocessableEntityError):
        return
    raise AssertionError("a temperature that is no number was accepted")


async def listed(s: Session) -> None:
    response = await s.http.get("/openai/v1/models", params={"feature": FEATURES})
    assert s.model in [one["id"] for one in response.json()["data"]]


FEATURES = ["TextGeneration", "TextEmbedding", "Reranking", "SpeechToText"]


async def operator_routes(s: Session) -> None:
    """Routes by which an operator changes an engine are not served."""
    for path in ("/v1/load_lora_adapter", "/sleep", "/reset_prefix_cache", "/api/pull", "/slots/0"):
        response = await s.http.post(f"/openai{path}", json={"model": s.model})
        assert response.status_code == 404, f"{path}: {response.status_code}"
    assert (await s.http.get("/metrics")).status_code == 404


# -- embeddings and reranking ----------------------------------------------------------------------


async def embeddings(s: Session) -> str:
    answer = await s.openai.embeddings.create(model=s.model, input=SENTENCES)
    return in_order([one.embedding for one in answer.data])


def in_order(vectors: list[list[float]]) -> str:
    """Check that sentences about the same thing are closer; the note says how close."""
    near, far = (similarity(vectors[0], other) for other in vectors[1:])
    assert near > far + 0.2, (near, far)
    return f"{len(vectors[0])} dimensions, similarity {near:.2f} and {far:.2f}"


def similarity(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


async def embed_v2(s: Session) -> str:
    body = {"texts": SENTENCES, "embedding_types": ["float"]}
    return in_order((await s.post("/v2/embed", body))["embeddings"]["float"])


async def pooling(s: Session) -> None:
    assert len((await s.post("/v1/pooling", {"input": SENTENCES}))["data"]) == len(SENTENCES)


async def rerank(s: Session) -> None:
    for path in ("/v1/rerank", "/v2/rerank"):
        answer = await s.post(path, {"query": "an animal", "documents": SENTENCES})
        results = answer["results"]
        assert sorted(one["index"] for one in results) == [0, 1, 2], path
        assert all(isinstance(one["relevance_score"], float) for one in results), path


async def rerank_v1(s: Session) -> None:
    answer = await s.post("/v1/rerank", {"query": "an animal", "documents": SENTENCES})
    assert sorted(one["index"] for one in answer["results"]) == [0, 1, 2]


async def score(s: Session) -> None:
    for path in ("/v1/score", "/score"):
        answer = await s.post(path, {"text_1": "an animal", "text_2": SENTENCES})
        assert len(answer["data"]) == len(SENTENCES), path


async def classify(s: Session) -> None:
    assert len((await s.post("/v1/classify", {"input": SENTENCES}))["data"]) == len(SENTENCES)


# -- speech to text --------------------------------------------------------------------------------


def speech() -> bytes:
    """A WAV file with a tone. Random weights transcribe it as something."""
    output = io.BytesIO()
    with wave.open(output, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SPEECH_HZ)
        for number in range(SPEECH_SECONDS * SPEECH_HZ):
            sample = int(8000 * math.sin(number * 2 * math.pi * 440 / SPEECH_HZ))
            file.writeframesraw(sample.to_bytes(2, "little", signed=True))
    return output.getvalue()


async def transcription(s: Session) -> None:
    answer = await s.openai.audio.transcriptions.create(
        model=s.model, file=("speech.wav", speech()), language="en"
    )
    assert isinstance(answer.text, str)


async def transcription_formats(s: Session) -> None:
    for kind in ("text", "verbose_json"):
        answer: Any = await s.openai.audio.transcriptions.create(
            model=s.model, file=("speech.wav", speech()), language="en", response_format=kind
        )
        assert isinstance(answer, str) == (kind == "text"), kind


async def translation(s: Session) -> None:
    answer = await s.openai.audio.translations.create(model=s.model, file=("speech.wav", speech()))
    assert isinstance(answer.text, str)


async def realtime(s: Session) -> None:
    """A WebSocket is relayed in both directions."""
    async with s.openai.realtime.connect(model=s.model) as connection:
        assert (await connection.recv()).type == "session.created"
        await connection.input_audio_buffer.clear()
        assert (await connection.recv()).type == "input_audio_buffer.cleared"


# -- Ollama's API ----------------------------------------------------------------------------------


async def ollama_chat(s: Session) -> str:
    client = ollama.AsyncClient(host=s.root_url)
    options = {"num_predict": 6}
    answer = await client.chat(model=s.model, messages=MESSAGES, options=options)
    assert answer.message.role == "assistant"
    stream = await client.chat(model=s.model, messages=MESSAGES, options=options, stream=True)
    parts = [part async for part in stream]
    assert parts[-1].done
    generated = await client.generate(model=s.model, prompt="Hello", options=options)
    assert generated.done
    return f"{len(parts)} parts"


async def ollama_embed(s: Session) -> str:
    answer = await ollama.AsyncClient(host=s.root_url).embed(model=s.model, input=SENTENCES)
    return in_order([list(vector) for vector in answer.embeddings])


async def ollama_list(s: Session) -> None:
    names = [one.model for one in (await ollama.AsyncClient(host=s.root_url).list()).models]
    assert f"{s.model}:latest" in names, names
