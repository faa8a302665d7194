"""The mock engine over real loopback, with real clients."""

from __future__ import annotations

import openai
import pytest
from fakes.mock_engine import FAST, HELLO, serving

from kubeai.openai.routes import Kind
from kubeai.supervisor.cache_sizes import cache_tokens

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


async def test_replies_end_before_their_limit_if_the_engine_ends_early():
    body = {"model": "m", "messages": HELLO, "max_tokens": 900}
    async with serving(*FAST, "--reply-tokens", "8", "--end-early") as served:
        status, answer = await served.post("/v1/messages", body)
        _, cut = await served.post("/v1/messages", body | {"max_tokens": 2})
    assert status == 200
    assert answer["stop_reason"] == "end_turn"
    assert 4 <= answer["usage"]["output_tokens"] <= 12
    assert cut["stop_reason"] == "max_tokens"
    assert cut["usage"]["output_tokens"] == 2


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


# -- embeddings, rerank ------------------------------------------------------------------------


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
        ("/v1/completions", {"prompt": "a", "stream_options": {}}, "stream_options"),
        ("/v1/chat/completions", {"messages": HELLO, "stream_options": {}}, "stream_options"),
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
    assert cache_tokens(text) == 4_096 * 16


# -- faults ------------------------------------------------------------------------------------


async def test_every_nth_request_fails_if_configured():
    async with serving(*FAST, "--fail-every=3") as served:
        body = {"messages": HELLO, "max_tokens": 1}
        statuses = [(await served.post("/v1/chat/completions", body))[0] for _ in range(6)]
        assert statuses == [200, 200, 500, 200, 200, 500]


# -- the gateway's routes ------------------------------------------------------------------------


async def test_every_inference_route_of_the_gateway_is_served(served):
    for kind in Kind:
        if kind.is_json or kind.is_form:
            status, _ = await served.post(kind.value, {"model": "m"})
            assert status != 404, kind


async def test_a_response_is_stored_whole_or_streamed(served):
    whole = await served.client.responses.create(model="m", input="Hello")
    events = await served.events("/v1/responses", {"model": "m", "input": "Hello"})
    streamed = events[-1][1]["response"]
    for response_id in (whole.id, streamed["id"]):
        stored = await served.client.responses.retrieve(response_id)
        assert stored.output_text == whole.output_text
    with pytest.raises(openai.NotFoundError):
        await served.client.responses.retrieve("resp_unknown")
