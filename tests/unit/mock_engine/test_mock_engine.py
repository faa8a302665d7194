"""The mock engine over real loopback, with real clients."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import re
import signal
import sys
import time
import wave

import aiohttp
import msgspec
import openai
import pytest
import structlog
from aiohttp import web

from kubeai.mock_engine import main
from kubeai.mock_engine.formats.base import GenerationRequest, Meta
from kubeai.mock_engine.formats.completions import Chat
from kubeai.mock_engine.formats.transcriptions import audio_seconds
from kubeai.mock_engine.options import UsageError, parse
from kubeai.mock_engine.pacing import Job, Pacer, StreamingGroup
from kubeai.mock_engine.server import MockEngine
from kubeai.simulation.engine import Engine, EngineConfig
from kubeai.simulation.presets import PRESETS
from kubeai.simulation.text import pack, reply

FAST = ("--prefill-tokens-per-second=0", "--decode-tokens-per-second=0")
HELLO = [{"role": "user", "content": "Hello there, engine"}]


class Served:
    def __init__(self, mock: MockEngine, url: str) -> None:
        self.mock = mock
        self.url = url
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.session = aiohttp.ClientSession(url)

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, object]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(path, data=data, headers=headers) as response:
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.text()

    async def events(self, path: str, body: dict) -> list[tuple[str, object]]:
        """The (event name, data) pairs of a stream."""
        async with self.session.post(path, json=body | {"stream": True}) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            text = await response.text()
        events = []
        for block in text.removesuffix("\n\n").split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            data = fields["data"]
            value = data if data == "[DONE]" else json.loads(data)
            events.append((fields.get("event", ""), value))
        return events


@contextlib.asynccontextmanager
async def serving(*flags: str):
    options, ignored = parse(["--model=hf://mock/m", "--served-model-name=m", *flags])
    assert not ignored
    mock = MockEngine(options, "replica-1")
    runner = web.AppRunner(mock.app(), handler_cancellation=True, shutdown_timeout=5.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    served = Served(mock, f"http://{host}:{port}")
    try:
        yield served
        assert mock.engine.cache.used == 0, "a sequence was left in the engine"
        assert (mock.engine.running, mock.engine.waiting) == (0, 0)
    finally:
        await served.session.close()
        await served.client.close()
        await runner.cleanup()


@pytest.fixture
async def served():
    async with serving(*FAST) as served:
        yield served


@pytest.fixture(autouse=True)
def logging_as_it_was():
    yield
    structlog.reset_defaults()  # main() configures it for a separate process


async def until(check, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not check():  # noqa: ASYNC110 (the state is the engine's own)
            await asyncio.sleep(0.005)


# -- chat --------------------------------------------------------------------------------------


async def test_a_chat_response_has_usage_and_is_the_same_for_the_same_messages(served):
    create = served.client.chat.completions.create
    first = await create(model="m", messages=HELLO, max_tokens=12)
    again = await create(model="m", messages=HELLO, max_tokens=12)
    other = await create(model="m", messages=[{"role": "user", "content": "Bye"}], max_tokens=12)
    (choice,) = first.choices
    assert choice.message.role == "assistant"
    assert choice.message.content.startswith("mock ")
    assert len(choice.message.content.split()) == 12
    assert choice.finish_reason == "length"
    assert again.choices[0].message.content == choice.message.content
    assert other.choices[0].message.content != choice.message.content
    usage = first.usage
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert first.system_fingerprint == "replica-1"
    assert first.id.startswith("chatcmpl-")


async def test_a_chat_without_a_token_limit_ends_by_itself(served):
    answer = await served.client.chat.completions.create(model="m", messages=HELLO)
    assert answer.choices[0].finish_reason == "stop"
    assert 24 <= answer.usage.completion_tokens <= 72


async def test_a_streamed_chat_has_vllms_events_one_per_token(served):
    body = {"model": "m", "messages": HELLO, "max_tokens": 5}
    events = [
        value
        for _, value in await served.events(
            "/v1/chat/completions", body | {"stream_options": {"include_usage": True}}
        )
    ]
    assert events[-1] == "[DONE]"
    *chunks, usage = events[:-1]
    assert {chunk["object"] for chunk in events[:-1]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in events[:-1]}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(chunks) == 6
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    whole = await served.client.chat.completions.create(**body)
    said = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert said == whole.choices[0].message.content
    without = [value for _, value in await served.events("/v1/chat/completions", body)]
    assert len(without) == 7
    assert all("usage" not in chunk for chunk in without[:-1])


async def test_the_openai_client_streams_a_chat(served):
    stream = await served.client.chat.completions.create(
        model="m",
        messages=HELLO,
        max_completion_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    said = "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)
    assert len(said.split()) == 9
    assert chunks[-1].usage.completion_tokens == 9
    assert {chunk.system_fingerprint for chunk in chunks} == {"replica-1"}


@pytest.mark.parametrize(
    "content",
    [
        "text",
        [{"type": "text", "text": "text"}],
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
        "",
        None,
    ],
)
async def test_content_may_be_text_parts_or_absent(served, content):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    status, answer = await served.post(
        "/v1/chat/completions", {"model": "m", "messages": messages, "max_tokens": 2}
    )
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("as_list", [False, True])
async def test_stop_strings_end_the_text_before_them(served, as_list):
    body = {"model": "m", "messages": HELLO, "max_tokens": 20}
    _, whole = await served.post("/v1/chat/completions", body)
    words = whole["choices"][0]["message"]["content"].split()
    stop = [words[4], "never"] if as_list else words[4]
    _, cut = await served.post("/v1/chat/completions", body | {"stop": stop})
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["stop_reason"] == words[4]
    said = cut["choices"][0]["message"]["content"]
    assert said.split() == words[:4]
    events = await served.events("/v1/chat/completions", body | {"stop": stop})
    chunks = [value for _, value in events][:-1]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == said
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_next_turn_has_the_previous_turns_tokens_cached(served):
    messages = [{"role": "user", "content": "Tell me about owls. " * 20}]
    first = await served.client.chat.completions.create(model="m", messages=messages, max_tokens=64)
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "And about foxes?"})
    second = await served.client.chat.completions.create(model="m", messages=messages)
    known = first.usage.total_tokens
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert known - 17 <= cached <= known
    assert cached % 16 == 0


# -- completions -------------------------------------------------------------------------------


async def test_completions_accept_texts_and_token_ids(served):
    create = served.client.completions.create
    one = await create(model="m", prompt="Once upon", max_tokens=4)
    assert one.object == "text_completion"
    assert len(one.choices[0].text.split()) == 4
    two = await create(model="m", prompt=["Once upon", "Never"], max_tokens=4)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text == one.choices[0].text != two.choices[1].text
    assert two.usage.completion_tokens == 8
    numbers = await create(model="m", prompt=[1, 2, 3], max_tokens=1)
    assert numbers.usage.prompt_tokens == 3
    lists = await create(model="m", prompt=[[1, 2, 3], [4]], max_tokens=1)
    assert lists.usage.prompt_tokens == 4
    empty = await create(model="m", prompt="", max_tokens=1)
    assert empty.usage.prompt_tokens == 1
    default = await create(model="m", prompt="Once")
    assert default.usage.completion_tokens == 16


async def test_streamed_completions_carry_each_prompts_index(served):
    stream = await served.client.completions.create(
        model="m",
        prompt=["Once upon", "Never"],
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    said = {0: "", 1: ""}
    finished = []
    async for chunk in stream:
        for choice in chunk.choices:
            said[choice.index] += choice.text
            finished += [choice.index] * (choice.finish_reason == "length")
    assert finished == [0, 1]
    assert chunk.usage.completion_tokens == 8
    whole = await served.client.completions.create(
        model="m", prompt=["Once upon", "Never"], max_tokens=4
    )
    assert said == {choice.index: choice.text for choice in whole.choices}


# -- responses, messages -----------------------------------------------------------------------


async def test_the_openai_client_reads_a_response(served):
    answer = await served.client.responses.create(
        model="m", input="Hello", instructions="Be brief", max_output_tokens=6
    )
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert len(answer.output_text.split()) == 6
    assert answer.usage.output_tokens == 6
    listed = await served.client.responses.create(
        model="m",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
    )
    assert listed.status == "completed"
    assert listed.metadata == {"replica": "replica-1"}


async def test_the_openai_client_streams_a_response(served):
    said, kinds, numbers = "", [], []
    async with served.client.responses.stream(model="m", input="Hello") as stream:
        async for event in stream:
            numbers.append(event.sequence_number)
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                said += event.delta
        final = await stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == said
    assert numbers == list(range(len(numbers)))
    assert len(said.split()) == final.usage.output_tokens


async def test_messages_have_anthropics_shape(served):
    body = {"model": "m", "messages": HELLO, "system": "Be brief", "max_tokens": 4}
    status, answer = await served.post("/v1/messages", body)
    assert status == 200
    assert answer["type"] == "message"
    assert answer["content"][0]["type"] == "text"
    assert answer["stop_reason"] == "max_tokens"
    assert answer["usage"]["output_tokens"] == 4
    word = answer["content"][0]["text"].split()[2]
    _, cut = await served.post("/v1/messages", body | {"stop_sequences": [word]})
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", word)
    events = await served.events("/v1/messages", body)
    assert [name for name, _ in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 4,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(value["type"] == name for name, value in events)
    said = "".join(value["delta"]["text"] for _, value in events[2:6])
    assert said == answer["content"][0]["text"]
    start, delta = events[0][1]["message"]["usage"], events[-2][1]["usage"]
    assert start["input_tokens"] + start["cache_read_input_tokens"] > 0
    assert delta["output_tokens"] == 4
    status, error = await served.post("/v1/messages", body | {"model": "x"})
    assert (status, error["type"], error["error"]["type"]) == (404, "error", "not_found_error")


# -- embeddings, rerank, audio -----------------------------------------------------------------


async def test_embeddings_are_floats_or_base64_of_any_dimension(served):
    create = served.client.embeddings.create
    encoded = await create(model="m", input=["owls sleep", "foxes run"])  # base64 on the wire
    plain = await create(model="m", input=["owls sleep", "foxes run"], encoding_format="float")
    assert [item.index for item in plain.data] == [0, 1]
    for one, other in zip(encoded.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
        assert sum(value * value for value in one.embedding) == pytest.approx(1.0, rel=1e-5)
    assert plain.data[0].embedding != plain.data[1].embedding
    assert len(plain.data[0].embedding) == 384
    assert plain.usage.prompt_tokens == 6
    small = await create(model="m", input="owls sleep", dimensions=16)
    assert len(small.data[0].embedding) == 16
    numbers = await create(model="m", input=[[1, 2], [3]])
    assert len(numbers.data) == 2
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        await create(model="m", input="owls", dimensions=0)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
async def test_rerank_puts_the_nearest_document_first(served, path):
    documents = ["the price of tin", {"text": "owls sleep in old oaks"}, "where foxes go"]
    body = {"model": "m", "query": "where do owls sleep", "documents": documents}
    status, answer = await served.post(path, body)
    assert status == 200
    assert [result["index"] for result in answer["results"]] == [1, 2, 0]
    assert answer["results"][0]["document"]["text"] == "owls sleep in old oaks"
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    _, top = await served.post(path, body | {"top_n": 1, "return_documents": False})
    assert len(top["results"]) == 1
    assert "document" not in top["results"][0]


def wav(seconds: float, value: int = 0) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes([value]) * int(16000 * seconds))
    return file.getvalue()


async def test_a_transcription_depends_on_the_audios_bytes():
    async with serving(*FAST, "--engine=FasterWhisper") as served:
        create = served.client.audio.transcriptions.create
        first = await create(model="m", file=("a.wav", wav(2.5)))
        assert "2.50 s" in first.text
        again = await create(model="m", file=("b.wav", wav(2.5)))
        other = await create(model="m", file=("a.wav", wav(2.5, 1)))
        assert first.text == again.text != other.text
        text = await create(model="m", file=("a.wav", wav(2.5)), response_format="text")
        assert text == first.text + "\n"
        verbose = await create(model="m", file=("a.wav", wav(2.5)), response_format="verbose_json")
        assert verbose.duration == 2.5
        assert verbose.segments[0].text == verbose.text == first.text
        with pytest.raises(openai.BadRequestError, match="response_format"):
            await create(model="m", file=("a.wav", wav(1)), response_format="srt")
        form = aiohttp.FormData({"file": io.BytesIO(wav(40.0))})
        async with served.session.post("/v1/audio/transcriptions", data=form) as response:
            assert response.status == 200, "no model is needed"
            assert "40.00 s" in (await response.json())["text"]


async def test_a_malformed_form_or_one_without_a_file_is_rejected(served):
    path = "/v1/audio/transcriptions"
    assert (await served.post(path, {"model": "m"}))[0] == 400
    kind = {"Content-Type": "multipart/form-data"}
    assert (await served.post(path, b"--x\r\n", **kind))[0] == 400
    form = aiohttp.FormData({"model": "m"}, default_to_multipart=True)
    async with served.session.post(path, data=form) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "file"


def test_the_audio_length_is_the_headers_limited_by_the_bytes():
    data = wav(3.0)
    assert audio_seconds(data[:64], len(data)) == 3.0
    assert audio_seconds(data[:64], 16_000) == 1.0
    assert audio_seconds(b"ID3 something else", 32_000) == 2.0


# -- models and adapters -----------------------------------------------------------------------


async def test_adapters_are_loaded_served_and_unloaded_with_vllms_responses(served, tmp_path):
    load = {"lora_name": "pirate", "lora_path": str(tmp_path / "pirate")}
    status, error = await served.post("/v1/load_lora_adapter", load)
    assert (status, error["error"]["type"]) == (404, "NotFoundError")
    assert "No adapter found" in error["error"]["message"]
    (tmp_path / "pirate").mkdir()
    assert await served.post("/v1/load_lora_adapter", load) == (
        200,
        "Success: LoRA adapter 'pirate' added successfully.",
    )
    status, error = await served.post("/v1/load_lora_adapter", load)
    assert status == 400
    assert error["error"]["type"] == "InvalidUserInput"
    assert "has already been loaded" in error["error"]["message"]
    assert (await served.post("/v1/load_lora_adapter", load | {"load_inplace": True}))[0] == 200
    assert (await served.post("/v1/load_lora_adapter", {"lora_name": "x"}))[0] == 400

    cards = {card.id: card async for card in served.client.models.list()}
    assert list(cards) == ["m", "pirate"]
    assert cards["pirate"].parent == "m"
    create = served.client.chat.completions.create
    adapted = await create(model="pirate", messages=HELLO * 40, max_tokens=4)
    base = await create(model="m", messages=HELLO * 40, max_tokens=4)
    assert adapted.model == "pirate"
    assert adapted.choices[0].message.content != base.choices[0].message.content
    assert base.usage.prompt_tokens_details.cached_tokens == 0, "adapters share no KV blocks"

    unload = {"lora_name": "pirate"}
    assert await served.post("/v1/unload_lora_adapter", unload) == (
        200,
        "Success: LoRA adapter 'pirate' removed successfully.",
    )
    status, error = await served.post("/v1/unload_lora_adapter", unload)
    assert (status, error["error"]["type"]) == (404, "NotFoundError")
    assert (await served.post("/v1/unload_lora_adapter", {}))[0] == 400
    with pytest.raises(openai.NotFoundError):
        await create(model="pirate", messages=HELLO)


# -- what is wrong with a request --------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/chat/completions", b"{", "truncated"),
        ("/v1/chat/completions", b"\xff", "malformed"),
        ("/v1/chat/completions", {"messages": []}, "$.messages"),
        ("/v1/chat/completions", {"messages": [{"content": 1}]}, "$.messages[0].content"),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 0}, "$.max_tokens"),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 10**6}, "max_tokens"),
        ("/v1/chat/completions", {"messages": HELLO, "n": 2}, "n:"),
        ("/v1/chat/completions", {"messages": HELLO * 10**4}, "maximum context length"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "echo": True}, "echo"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/embeddings", {"input": "a b" * 10**5}, "maximum context length"),
        ("/v1/rerank", {"query": "a", "documents": []}, "$.documents"),
        ("/v1/messages", {"messages": HELLO}, "max_tokens"),
        ("/v1/responses", {}, "input"),
    ],
)
async def test_a_bad_request_is_400_and_names_the_field(served, path, body, says):
    status, answer = await served.post(path, body)
    assert status == 400
    assert says in answer["error"]["message"]
    if path != "/v1/messages":
        assert answer["error"]["code"] == 400
        assert answer["error"]["type"] == "BadRequestError"


async def test_unknown_models_and_routes_are_404_in_vllms_shape(served):
    with pytest.raises(openai.NotFoundError) as caught:
        await served.client.chat.completions.create(model="x", messages=HELLO)
    assert caught.value.body == {
        "message": "The model `x` does not exist.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    status, answer = await served.post("/v1/nothing", {})
    assert (status, answer["error"]["code"]) == (404, 404)
    async with served.session.get("/v1/chat/completions") as response:
        assert response.status == 405
    assert (await served.post("/v1/completions", {"prompt": "a", "max_tokens": 1}))[0] == 200


# -- who answered, and how often ---------------------------------------------------------------


async def test_responses_name_their_replica_and_requests_are_recorded(served):
    body = {"model": "m", "messages": HELLO, "max_tokens": 1}
    for number in range(3):
        async with served.session.post(
            "/v1/chat/completions", json=body, headers={"X-Request-Id": f"r-{number}"}
        ) as response:
            assert response.headers["X-Request-Id"] == f"r-{number}"
            assert response.headers["X-Mock-Replica"] == "replica-1"
            assert (await response.json())["id"] == f"chatcmpl-r-{number}"
    await served.post("/v1/chat/completions", body | {"model": "x"})
    async with served.session.get("/mock/requests") as response:
        report = await response.json()
    assert report["replica"] == "replica-1"
    assert [item["id"] for item in report["requests"]] == ["r-0", "r-1", "r-2", ""]
    assert report["answered"] == {"200": 3, "404": 1}
    assert report["received"] == {"/v1/chat/completions": 4}
    assert (report["total"], report["aborted"], report["forgotten"]) == (4, 0, 0)


async def test_metrics_have_vllms_names(served):
    await served.client.chat.completions.create(model="m", messages=HELLO * 9, max_tokens=3)
    await served.client.chat.completions.create(model="m", messages=HELLO * 9, max_tokens=3)
    async with served.session.get("/metrics") as response:
        text = await response.text()
    labels = '{engine="0",model_name="m"}'
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values[f"vllm:num_requests_running{labels}"] == "0.0"
    assert values[f"vllm:num_requests_waiting{labels}"] == "0.0"
    assert values[f"vllm:generation_tokens_total{labels}"] == "6.0"
    queries = float(values[f"vllm:prefix_cache_queries_total{labels}"])
    hits = float(values[f"vllm:prefix_cache_hits_total{labels}"])
    assert 0 < hits < queries == float(values[f"vllm:prompt_tokens_total{labels}"])
    assert values['mock_requests_total{path="/v1/chat/completions"}'] == "2.0"


# -- time --------------------------------------------------------------------------------------


RATE = ("--prefill-tokens-per-second=0", "--decode-tokens-per-second=100")


async def test_tokens_are_not_generated_faster_than_the_given_rate():
    async with serving(*RATE) as served:
        started = time.perf_counter()
        stream = await served.client.chat.completions.create(
            model="m", messages=HELLO, max_tokens=31, stream=True
        )
        tokens = [chunk async for chunk in stream if chunk.choices[0].delta.content]
        assert len(tokens) == 31
        assert time.perf_counter() - started >= 0.3


@pytest.mark.looptime
async def test_tokens_are_generated_at_the_given_rate():
    times = []

    class Timed(There):
        def write(self, data):
            times.append(asyncio.get_running_loop().time())

    pacer = Pacer(Engine(parse(RATE)[0].config))
    await stream_to(Timed(), pacer, tokens=31).run([Job(10, 31)])
    assert len(times) == 30, "the last one is sent with the end"
    assert [later - earlier for earlier, later in itertools.pairwise(times)] == [
        pytest.approx(0.01)
    ] * 29


async def test_streams_run_in_parallel_up_to_the_batch_size_and_the_others_wait():
    async with serving("--decode-tokens-per-second=50", "--max-batch=2") as served:
        body = {"model": "m", "messages": HELLO, "max_tokens": 10}
        chats = [asyncio.create_task(served.events("/v1/chat/completions", body)) for _ in range(3)]
        engine = served.mock.engine
        await until(lambda: (engine.running, engine.waiting) == (2, 1))
        assert all(len(events) == 12 for events in await asyncio.gather(*chats))


async def test_a_client_that_disconnects_frees_its_slot():
    async with serving("--decode-tokens-per-second=5") as served:
        body = {"model": "m", "messages": HELLO, "max_tokens": 1000}
        engine = served.mock.engine
        for stream in (True, False):
            leaving = asyncio.create_task(
                served.post("/v1/chat/completions", body | {"stream": stream})
            )
            await until(lambda: engine.running == 1)
            leaving.cancel()
            await until(lambda: engine.running == 0)
        await until(lambda: served.mock.request_log.aborted == 2)


async def test_during_the_start_up_delay_it_is_unhealthy_and_rejects_requests():
    body = {"messages": HELLO, "max_tokens": 1}

    async def health(served):
        async with served.session.get("/health") as response:
            return response.status

    async with serving(*FAST, "--startup-delay=60s") as served:
        assert await health(served) == 503
        assert (await served.post("/v1/chat/completions", body))[0] == 503
    async with serving(*FAST, "--startup-delay=300ms") as served:
        async with asyncio.timeout(5):
            while (status := await health(served)) != 200:
                assert status == 503
        assert (await served.post("/v1/chat/completions", body))[0] == 200


async def test_many_simultaneous_streams_all_complete(served):
    body = {"model": "m", "messages": HELLO, "max_tokens": 20}
    results = await asyncio.gather(
        *(served.events("/v1/chat/completions", body) for _ in range(300))
    )
    assert {len(events) for events in results} == {22}
    assert served.mock.request_log.total == 300


async def test_an_http_1_0_client_gets_its_stream_unchunked(served):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    body = json.dumps({"messages": HELLO, "max_tokens": 3, "stream": True})
    writer.write(
        f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")
    assert events.count(b"data: ") == 5


# -- faults ------------------------------------------------------------------------------------


async def test_every_nth_request_fails_if_configured():
    async with serving(*FAST, "--fail-every=3") as served:
        body = {"messages": HELLO, "max_tokens": 1}
        statuses = [(await served.post("/v1/chat/completions", body))[0] for _ in range(6)]
        assert statuses == [200, 200, 500, 200, 200, 500]


# -- the process -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def process(*flags: str, **env: str):
    """Run the engine as a process; yields (process, url, replica)."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kubeai.mock_engine", "--port=0", "--served-model-name=m"),
        *flags,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | env,
    )
    try:
        async with asyncio.timeout(15):
            log = []
            while not log or "mock engine listens" not in log[-1]:
                line = await child.stderr.readline()
                assert line, f"it exited: {log}"
                log.append(line.decode())
        address = re.search(r'"address": ?"([^"]+)"', log[-1])[1]
        yield child, f"http://{address}", log
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def accepts(url: str) -> bool:
    """Whether a new connection is still accepted."""
    host, port = url.removeprefix("http://").split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True


async def test_sigterm_finishes_open_streams_and_accepts_no_new_ones():
    async with (
        process("--decode-tokens-per-second=20", POD_NAME="pod-7") as (child, url, _),
        aiohttp.ClientSession() as session,
        session.post(
            f"{url}/v1/chat/completions",
            json={"messages": HELLO, "max_tokens": 20, "stream": True},
        ) as response,
    ):
        assert response.headers["X-Mock-Replica"] == "pod-7"
        first = await response.content.readline()
        child.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while await accepts(url):
                pass
            rest = await response.content.read()
            assert (first + rest).count(b"data: ") == 22
            assert (first + rest).endswith(b"data: [DONE]\n\n")
            assert await child.wait() == 0


async def test_flags_of_the_imitated_engine_are_ignored_with_a_warning_each():
    async with process(
        *("--max-num-seqs", "64", "--enable-prefix-caching", "--max-model-len=2048", "v2"),
        POD_IP="127.0.0.9",
    ) as (_, url, log):
        assert url.startswith("http://127.0.0.9:")
        ignored = [re.search(r'"flag": ?"([^"]+)"', line)[1] for line in log if '"flag"' in line]
        assert ignored == ["--max-num-seqs 64", "--enable-prefix-caching v2"]
        async with aiohttp.ClientSession() as session:
            models = await (await session.get(f"{url}/v1/models")).json()
        assert models["data"][0]["max_model_len"] == 2048


async def test_it_dies_after_the_configured_number_of_requests():
    async with (
        process("--die-after-requests=1") as (child, url, _),
        aiohttp.ClientSession() as session,
    ):
        body = {"messages": HELLO, "max_tokens": 1}
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await session.post(f"{url}/v1/chat/completions", json=body)
        assert await asyncio.wait_for(child.wait(), 5) == 70


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--port=http", "--port: 'http' is not an integer from 0 to 65535"),
        ("--startup-delay=1 minute", "--startup-delay: "),
        ("--startup-delay=-1s", "--startup-delay: '-1s' is negative"),
        (
            "--decode-tokens-per-second=nan",
            "--decode-tokens-per-second: 'nan' is not a non-negative number",
        ),
        ("--engine=TGI", "--engine: "),
        ("--max-batch=0", "--max-batch: "),
        ("--max-model-len=lots", "--max-model-len: 'lots'"),
        ("--max-model-len=65537", "--cache-blocks: 4096 blocks hold 65536 tokens, less than"),
    ],
)
def test_a_flag_with_a_bad_value_is_reported_in_one_line(flag, says, capsys):
    with pytest.raises(UsageError) as caught:
        parse([flag])
    assert str(caught.value).startswith(says)
    assert main([flag]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {caught.value}\n"


def test_a_port_in_use_is_reported_in_one_line(capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([f"--port={port}", "--host=127.0.0.1"]) == 2
    err = capsys.readouterr().err
    assert f"error: cannot listen on 127.0.0.1:{port}" in err
    assert "Traceback" not in err


def test_flags_are_accepted_in_every_form_used_in_manifests(monkeypatch):
    monkeypatch.setenv("POD_IP", "127.1.2.3")
    options, ignored = parse(
        [
            *("--engine=VLLM", "--model", "hf://a/b", "--served-model-name", "a", "b"),
            *("--startup-delay=1m30s", "--max-model-len=32k", "--tensor-parallel-size=2"),
        ]
    )
    assert options.served_model_names == ("a", "b")
    assert options.model == "hf://a/b"
    assert options.startup_delay_s == 90.0
    assert options.max_model_len == 32_000
    assert options.host == "127.1.2.3"
    assert ignored == ["--tensor-parallel-size=2"]
    assert parse(["--startup-delay=2.5"])[0].startup_delay_s == 2.5
    assert parse(["--cache-blocks=10"])[0].max_model_len == 160
    assert parse(["--max-model-len=auto"])[0].max_model_len == 32_768
    assert len(pack("four")) == 4


def test_a_preset_has_a_real_engines_speed_and_flags_override_it():
    preset = "llama-3.1-8b-fp8-l4"
    assert parse([f"--preset={preset}"])[0].config == PRESETS[preset]
    changed = parse([f"--preset={preset}", "--cache-blocks=99", "--max-batch=3"])[0].config
    expected = msgspec.structs.replace(PRESETS[preset], cache_blocks=99, max_batch=3)
    assert changed == expected


class Gone:
    """The transport of a disconnected client, as in uvloop."""

    def is_closing(self):
        return True

    def write(self, data):
        raise RuntimeError("unable to perform operation; the handler is closed")


class There(Gone):
    def __init__(self):
        self.written = []

    def is_closing(self):
        return False

    def write(self, data):
        self.written.append(data)


def stream_to(transport, pacer: Pacer, tokens: int) -> StreamingGroup:
    """A chat's stream of ``tokens`` tokens."""
    said = reply(b"x" * 40, limit=tokens)
    request = GenerationRequest("m", [b""], [], tokens, True, False)
    chat = Chat(Meta("chatcmpl-1", 0, "m", "r"), request)
    return StreamingGroup(pacer, chat, [said], transport, chunked=True)


async def test_a_client_that_disconnects_during_a_step_does_not_delay_others():
    pacer = Pacer(Engine(EngineConfig(prefill_tokens_per_s=0, decode_tokens_per_s=200)))
    there = There()
    streams = [stream_to(transport, pacer, tokens=5) for transport in (Gone(), there)]
    async with asyncio.timeout(10):
        await asyncio.gather(*(stream.run([Job(10, 5)]) for stream in streams))
    assert len(there.written) == 4, "the last one is sent with the end"
