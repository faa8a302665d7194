"""The exceptions that the anthropic client raises for the gateway's own error responses."""

import contextlib
import json

import anthropic
import pytest
import uvloop
from fakes.wire import Broken, Message, Wire, answer, post
from fakes.world import World

from kubeai.gateway.local_routes import make_app

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
PATH = "/openai/v1/messages"
MESSAGES = [{"role": "user", "content": "Hello"}]
ID = "the-clients-own"


@pytest.fixture
async def start():
    """A worker with its real local routes, and a client of it that never retries."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**config) -> tuple[World, anthropic.AsyncAnthropic]:
            world = await World.start(local_routes=make_app, **config)
            stack.push_async_callback(world.close)
            client = anthropic.AsyncAnthropic(
                base_url=f"http://127.0.0.1:{world.port}/openai",
                api_key="none",
                max_retries=0,
                default_headers={"X-Request-Id": ID},
            )
            return world, await stack.enter_async_context(client)

        yield start


async def error_of(client, expected, model="m", **options):
    """The exception that one message raises, checked to have Anthropic's complete error shape."""
    with pytest.raises(expected) as caught:
        await client.messages.create(model=model, max_tokens=9, messages=MESSAGES, **options)
    error = caught.value
    assert error.body == {
        "type": "error",
        "error": {"type": error.type, "message": error.api_message},
        "request_id": ID,
    }
    assert error.request_id == ID
    assert error.response.headers["X-Request-Id"] == ID
    return error


async def drop(wire: Wire, request: Message) -> None:
    raise Broken(b"", False)


async def test_an_unknown_model_is_a_not_found_error(start):
    _, client = await start()
    error = await error_of(client, anthropic.NotFoundError, model="nope")
    assert error.type == "not_found_error"
    assert "'nope'" in error.api_message


async def test_an_unsupported_path_is_a_not_found_error(start):
    _, client = await start()
    with pytest.raises(anthropic.NotFoundError) as caught:
        await client.messages.batches.list()
    assert caught.value.type == "not_found_error"
    assert caught.value.request_id == ID


async def test_a_bad_request_is_a_bad_request_error(start):
    world, client = await start()
    world.route("m", {})
    error = await error_of(client, anthropic.BadRequestError, model="")
    assert error.type == "invalid_request_error"
    bad = {"X-Label-Selector": "a in"}
    error = await error_of(client, anthropic.BadRequestError, extra_headers=bad)
    assert error.type == "invalid_request_error"


async def test_a_body_over_the_limit_is_a_content_too_large_error(start):
    _, client = await start(body_max_bytes=100)
    error = await error_of(client, anthropic.ContentTooLargeError, system="x" * 200)
    assert error.type == "request_too_large"


async def test_a_body_in_an_unsupported_coding_is_a_415(start):
    _, client = await start()
    brotli = {"Content-Encoding": "br"}
    error = await error_of(client, anthropic.APIStatusError, extra_headers=brotli)
    assert (error.status_code, error.type) == (415, "invalid_request_error")
    assert error.response.headers["Accept-Encoding"] == "gzip, zstd"


@pytest.mark.parametrize(
    ("config", "endpoints", "expected", "kind"),
    [
        ({"hold_timeout_s": 0.01}, (), anthropic.GatewayTimeoutError, "timeout_error"),
        ({"hold_max_requests": 0}, (), anthropic.ServiceUnavailableError, "overloaded_error"),
        ({"buffer_max_bytes": 10}, (), anthropic.ServiceUnavailableError, "overloaded_error"),
        ({"retries": 0}, (drop,), anthropic.InternalServerError, "api_error"),
    ],
)
async def test_a_model_that_cannot_serve_is_an_internal_server_error(
    start, config, endpoints, expected, kind
):
    world, client = await start(**config)
    world.route("m", {str(n): await world.engine(s) for n, s in enumerate(endpoints)})
    error = await error_of(client, expected)
    assert isinstance(error, anthropic.InternalServerError)
    assert error.type == kind
    retry_after = error.response.headers.get("Retry-After")
    assert (retry_after is not None) == (error.status_code == 503)


async def test_an_exception_in_the_gateway_is_an_internal_server_error(start, monkeypatch):
    world, client = await start()
    world.route("m", {})
    monkeypatch.setattr(world.context, "hold", None)
    error = await error_of(client, anthropic.InternalServerError)
    assert (error.status_code, error.type) == (500, "api_error")


async def test_an_engines_own_error_passes_through(start):
    world, client = await start()
    said = b'{"type":"error","error":{"type":"invalid_request_error","message":"no"}}'

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(400, said, "Content-Type: application/json"))

    world.route("m", {"0": await world.engine(script)})
    with pytest.raises(anthropic.BadRequestError) as caught:
        await client.messages.create(model="m", max_tokens=9, messages=MESSAGES)
    assert caught.value.body == json.loads(said)


LINE = f"POST {PATH} HTTP/1.1\r\nHost: h\r\n"


WEBSOCKET = "Connection: Upgrade\r\nUpgrade: websocket"


@pytest.mark.parametrize(
    ("config", "request_", "status"),
    [
        ({}, LINE + "Content-Length: x\r\n\r\n", 400),
        ({}, LINE + "X: y\n\r\n", 400),
        ({}, LINE + "Expect: more\r\n\r\n", 417),
        ({"head_max_bytes": 80}, LINE + "X: " + "y" * 100, 431),
        ({"head_max_count": 1}, LINE + "X: y\r\n" * 3, 431),
        ({"head_timeout_s": 0.02}, LINE + "X: ", 408),
        ({"body_timeout_s": 0.02}, LINE + "Content-Length: 9\r\n\r\n", 408),
        ({}, f"GET {PATH}?x=1 HTTP/1.1\r\nHost: h\r\n\r\n", 405),
        ({}, f"GET http://h{PATH} HTTP/1.1\r\nHost: h\r\n\r\n", 405),
        ({}, f"GET {PATH} HTTP/1.1\r\nHost: h\r\n{WEBSOCKET}\r\n\r\n", 426),
    ],
)
async def test_errors_of_the_relay_have_the_same_shape(start, config, request_, status):
    world, _ = await start(**config)
    wire = await world.client()
    await wire.send(request_.encode())
    refused = await wire.answer()
    assert refused.status == status
    body = json.loads(refused.body)
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert set(body["error"]) == {"type", "message"}
    assert body["request_id"] == refused.one("X-Request-Id") == refused.one("request-id")


async def test_each_request_on_a_connection_gets_the_error_shape_of_its_own_api(start):
    world, _ = await start()
    wire = await world.client()
    for path, anthropics in ((PATH, True), ("/openai/v1/chat/completions", False), (PATH, True)):
        await wire.send(post(path, b'{"model":"nope"}'))
        body = json.loads((await wire.answer()).body)
        assert ("type" in body) == anthropics
    await wire.send(b"POST /openai/v1/chat/completions HTTP/1.1\r\nno colon\r\n\r\n")
    refused = await wire.answer()
    assert (refused.status, "type" in json.loads(refused.body)) == (400, False)
