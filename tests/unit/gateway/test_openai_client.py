"""The exceptions that the openai client raises for the gateway's own error responses."""

import contextlib
import gzip
import json
import sys

import httpx2
import openai
import pytest
import uvloop
from fakes.wire import Broken, Message, Wire, says
from fakes.world import World

from kubeai.gateway.local_routes import make_app
from kubeai.routing.routes import Block

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DATA = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
COMPRESS = {"gzip": gzip.compress, "zstd": zstd.compress}
LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def start():
    """A worker with its real local routes, and a client of it that never retries."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**config) -> tuple[World, openai.AsyncOpenAI]:
            world = await World.start(local_routes=make_app, **config)
            stack.push_async_callback(world.close)
            client = openai.AsyncOpenAI(
                base_url=f"http://127.0.0.1:{world.port}/openai/v1", api_key="none", max_retries=0
            )
            return world, await stack.enter_async_context(client)

        yield start


async def drop(wire: Wire, request: Message) -> None:
    raise Broken(b"", False)


async def test_a_model_that_does_not_exist_is_a_not_found_error(start):
    _, client = await start()
    for asking in (
        client.chat.completions.create(model="nope", messages=MESSAGES),
        client.embeddings.create(model="nope", input="x"),
        client.audio.transcriptions.create(model="nope", file=b"RIFF"),
        client.models.retrieve("nope"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await asking
        error = caught.value
        assert (error.type, error.code) == ("invalid_request_error", "model_not_found")
        assert error.param == "model"
        assert "'nope'" in error.message


async def test_an_unsupported_path_is_a_not_found_error_that_names_the_base_url(start):
    _, client = await start()
    with pytest.raises(openai.NotFoundError) as caught:
        await client.fine_tuning.jobs.list()
    assert (caught.value.type, caught.value.code) == ("invalid_request_error", "unknown_url")
    base_url = f"http://{client.base_url.host}:{client.base_url.port}"
    assert f"Use the base URL {base_url}/v1 or {base_url}/openai/v1;" in caught.value.message


async def test_an_invalid_request_is_a_bad_request_error_with_the_cause(start):
    world, client = await start()
    world.route("m", {})
    bad = {"X-Label-Selector": "a in"}
    for asking, param in (
        (client.chat.completions.create(model="", messages=MESSAGES), "model"),
        (client.audio.transcriptions.create(model="", file=b"RIFF"), "model"),
        (client.models.list(extra_headers=bad), "X-Label-Selector"),
        (
            client.chat.completions.create(model="m", messages=MESSAGES, extra_headers=bad),
            "X-Label-Selector",
        ),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await asking
        assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)


async def test_a_body_over_the_limit_is_a_status_error(start):
    _, client = await start(body_max_bytes=100, multipart_max_bytes=100)
    for asking in (
        client.embeddings.create(model="m", input="x" * 200),
        client.audio.transcriptions.create(model="m", file=b"x" * 200),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            await asking
        assert (caught.value.status_code, caught.value.type) == (413, "invalid_request_error")


@pytest.mark.parametrize(
    ("config", "endpoints", "status", "code"),
    [
        ({"hold_timeout_s": 0.01}, (), 504, "timeout"),
        ({"hold_max_requests": 0}, (), 503, "overloaded"),
        ({"retries": 0}, (drop,), 502, "bad_gateway"),
    ],
)
async def test_a_model_that_cannot_serve_is_an_internal_server_error(
    start, config, endpoints, status, code
):
    world, client = await start(**config)
    world.route("m", {str(n): await world.engine(s) for n, s in enumerate(endpoints)})
    for asking in (
        client.chat.completions.create(model="m", messages=MESSAGES),
        client.audio.transcriptions.create(model="m", file=b"RIFF"),
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            await asking
        error = caught.value
        assert (error.status_code, error.type, error.code) == (status, "server_error", code)
        assert "'m'" in error.message
        assert (error.response.headers.get("Retry-After") is not None) == (status == 503)


@pytest.mark.parametrize(
    ("retry", "code", "retry_after", "should_retry"),
    [(True, "model_unavailable", "5", None), (False, "model_cannot_start", None, "false")],
)
async def test_a_model_that_cannot_start_is_an_internal_server_error_with_the_reason(
    start, retry, code, retry_after, should_retry
):
    world, client = await start()
    world.route("m", {}, block=Block("EngineNotInstalled", "vllm is not installed", 0.0, retry))
    for asking in (
        client.chat.completions.create(model="m", messages=MESSAGES),
        client.audio.transcriptions.create(model="m", file=b"RIFF"),
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            await asking
        error = caught.value
        assert (error.status_code, error.type, error.code) == (503, "server_error", code)
        assert "EngineNotInstalled: vllm is not installed" in error.message
        assert error.response.headers.get("Retry-After") == retry_after
        assert error.response.headers.get("x-should-retry") == should_retry
    assert world.demanded == []


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
async def test_a_client_that_compresses_its_requests_is_answered(start, coding):
    world, _ = await start()
    reply = {"id": "1", "object": "list", "model": "m", "data": DATA, "usage": None}
    engine = await world.engine(says(json.dumps(reply).encode()))
    world.route("m", {"pod-1": engine})

    async def compress(request: httpx2.Request) -> None:
        body = COMPRESS[coding](await request.aread())
        request.stream = httpx2.ByteStream(body)
        request.headers |= {"Content-Encoding": coding, "Content-Length": str(len(body))}

    async with httpx2.AsyncClient(event_hooks={"request": [compress]}) as transport:
        client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{world.port}/v1", api_key="none", http_client=transport
        )
        assert (await client.embeddings.create(model="m", input="x")).model == "m"
    (request,) = engine.requests
    assert request.one("content-encoding") == coding
