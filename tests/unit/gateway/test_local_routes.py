"""Models, health and 404s over HTTP."""

import aiohttp
import pytest
import pytest_asyncio
from fakes.web import serving

from kubeai._load import LoadTable
from kubeai.api.config.system import GatewayConfig
from kubeai.gateway.context import Context
from kubeai.gateway.local_routes import make_runner
from kubeai.gateway.server import Server
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route

TRANSCRIPTIONS = "/openai/v1/audio/transcriptions"


class Replica:
    """One worker's local routes, and the supervisor's side of its routing table."""

    def __init__(self, **config):
        self.table = LoadTable.create(64, 1)
        self.publisher = Publisher(self.table)
        config = GatewayConfig(**config)
        self.demands = []
        self.context = Context(config, self.demands.append)
        self.routing = Server(self.context, LoadTable.attach(self.table.fd, 0)).routes

    def publish(self, model, *addresses, gone=False, **values):
        values.setdefault("engine", "FasterWhisper")
        endpoints = tuple(Endpoint(f"{model}-{n}", a) for n, a in enumerate(addresses))
        values.setdefault("endpoints", endpoints)
        route = None if gone else Route(model, **values)
        self.routing.apply(self.publisher.update(model, route))


@pytest.fixture
def replica():
    return Replica()


async def client_of(stack, replica):
    address = await stack.enter_async_context(serving(make_runner(replica.context)))
    session = aiohttp.ClientSession(f"http://{address}")
    return await stack.enter_async_context(session)


@pytest_asyncio.fixture
async def client(stack, replica):
    return await client_of(stack, replica)


async def error_of(response):
    assert response.content_type == "application/json"
    error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# -- models ----------------------------------------------------------------------------------------


def publish_three(replica):
    replica.publish(
        "chat",
        engine="VLLM",
        features=("TextGeneration",),
        labels={"tenant": "a", "env": "prod"},
        owner="me",
        created_s=1700000000,
        adapters=("fin", "law"),
    )
    replica.publish("embed", features=("TextEmbedding",), labels={"tenant": "b"})
    replica.publish("both", features=("TextEmbedding", "TextGeneration"), labels={"tenant": "b"})


async def ids(client, query="", selectors=(), base="/openai/v1"):
    headers = [("X-Label-Selector", selector) for selector in selectors]
    async with client.get(f"{base}/models{query}", headers=headers) as response:
        assert response.status == 200
        body = await response.json()
        assert body["object"] == "list"
        return [item["id"] for item in body["data"]]


async def test_models_are_listed_with_their_adapters(replica, client):
    publish_three(replica)
    response = await client.get("/openai/v1/models")
    listed = (await response.json())["data"]
    assert listed[1] == {
        "id": "chat",
        "created": 1700000000,
        "object": "model",
        "owned_by": "me",
        "features": ["TextGeneration"],
    }
    assert [item["id"] for item in listed] == ["both", "chat", "chat_fin", "chat_law"]
    assert listed[2] == {**listed[1], "id": "chat_fin"}


async def test_models_are_filtered_by_feature_with_text_generation_as_the_default(replica, client):
    publish_three(replica)
    assert await ids(client, "?feature=TextEmbedding") == ["both", "embed"]
    assert await ids(client, "?feature=SpeechToText") == []
    assert await ids(client, "?feature=no-feature") == []
    assert len(await ids(client, "?feature=TextEmbedding&feature=TextGeneration")) == 5


async def test_the_short_path_lists_models_of_all_features_by_default(replica, client):
    publish_three(replica)
    replica.publish("bare")
    assert await ids(client, base="/v1") == [
        "bare",
        "both",
        "chat",
        "chat_fin",
        "chat_law",
        "embed",
    ]
    assert await ids(client, "?feature=TextEmbedding", base="/v1") == ["both", "embed"]
    assert await ids(client, selectors=["tenant=b"], base="/v1") == ["both", "embed"]
    response = await client.get("/v1/models/chat_fin")
    assert (await response.json())["id"] == "chat_fin"
    assert (await client.get("/v1/models/nope")).status == 404


async def test_every_selector_must_match_on_top_of_the_feature(replica, client):
    publish_three(replica)
    assert await ids(client, selectors=["tenant=b"]) == ["both"]
    assert await ids(client, selectors=["tenant=a", "env in (prod)"]) == [
        "chat",
        "chat_fin",
        "chat_law",
    ]
    assert await ids(client, selectors=["tenant=a", "tenant=b"]) == []
    assert await ids(client, "?feature=TextEmbedding", ["!env"]) == ["both", "embed"]
    async with client.get("/openai/v1/models", headers={"X-Label-Selector": "a=b=c"}) as response:
        assert response.status == 400
        assert (await error_of(response))["param"] == "X-Label-Selector"


async def test_a_model_is_returned_by_its_id(replica, client):
    publish_three(replica)
    for model_id in ("chat", "chat_fin", "embed"):
        response = await client.get("/openai/v1/models/" + model_id)
        assert (response.status, (await response.json())["id"]) == (200, model_id)
    for model_id in ("nope", "chat_nope", "chat_", "ch%61t_x", "a%2Fb"):
        response = await client.get("/openai/v1/models/" + model_id)
        assert response.status == 404
        assert (await error_of(response))["code"] == "model_not_found"
    hidden = {"X-Label-Selector": "tenant=b"}
    assert (await client.get("/openai/v1/models/chat", headers=hidden)).status == 404


async def test_the_server_software_is_not_disclosed(client):
    response = await client.get("/openai/v1/models")
    assert "Server" not in response.headers
    assert "Date" in response.headers


async def test_a_response_to_head_has_no_body(replica, client):
    publish_three(replica)
    full = await client.get("/openai/v1/models")
    head = await client.head("/openai/v1/models")
    assert (head.status, await head.read()) == (200, b"")
    assert head.headers["Content-Length"] == str(len(await full.read()))


# -- what is not found, health ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("POST", "/openai/v1/load_lora_adapter"),
        ("GET", "/metrics"),
        ("POST", "/openai/v1/models/a/b"),
        ("POST", "/openai/v1/audio/transcriptions/"),
        ("POST", "/openai/v1/audio/%74ranscriptions"),
        ("GET", "/openai/v1/../healthz"),
        ("GET", "/" + "x" * 9000),
    ],
)
async def test_an_unlisted_path_is_not_found(client, method, path):
    url = client._build_url("/").human_repr().rstrip("/") + path
    response = await client.request(method, aiohttp.client.URL(url, encoded=True))
    assert response.status == 404
    error = await error_of(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", "unknown_url")
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "path",
    ["/openai/v1/chat%2Fcompletions", "/openai/v1/%63hat/completions", "/%E2%82%AC/a%20b"],
)
async def test_a_404_names_the_path_as_it_was_sent(client, path):
    url = client._build_url("/").human_repr().rstrip("/") + path
    response = await client.post(aiohttp.client.URL(url + "?key=secret", encoded=True))
    assert response.status == 404
    message = (await error_of(response))["message"]
    assert message.startswith(f"Invalid URL (POST {path}). ")
    assert "secret" not in message


async def test_a_404_names_the_base_urls(client):
    headers = {"Host": "llm.example:8000"}
    for forwarded, scheme in (({}, "http"), ({"X-Forwarded-Proto": "https"}, "https")):
        response = await client.post("/chat/completions", headers=headers | forwarded)
        message = (await error_of(response))["message"]
        for url in ("/v1 ", "/openai/v1; clients of Anthropic and Ollama need "):
            assert f"{scheme}://llm.example:8000{url}" in message
    response = await client.post("/", headers={"Host": "x" * 5000, "X-Forwarded-Proto": "evil"})
    assert len((await error_of(response))["message"]) < 700


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/openai/v1/chat/completions", "POST, OPTIONS"),
        (TRANSCRIPTIONS, "POST, OPTIONS"),
        ("/openai/v1/models", "GET, HEAD, OPTIONS"),
    ],
)
async def test_options_returns_the_methods_of_a_path(client, path, allow):
    response = await client.options(path)
    assert (response.status, response.headers["Allow"]) == (204, allow)
    assert await response.read() == b""
    assert (await client.options("/v1/load_lora_adapter")).status == 404


async def test_an_unsupported_method_gets_the_allowed_ones(client):
    for method, path, allow in [
        ("GET", TRANSCRIPTIONS, "POST"),
        ("POST", "/openai/v1/models", "GET, HEAD"),
        ("POST", "/healthz", "GET, HEAD"),
    ]:
        response = await client.request(method, path)
        assert (response.status, response.headers["Allow"]) == (405, allow)
        assert (await error_of(response))["code"] == "method_not_allowed"


async def test_health_reflects_the_workers_state(replica, client):
    async def status(path):
        return (await client.get(path)).status

    assert (await status("/healthz"), await status("/readyz")) == (200, 503)
    replica.context.ready = True
    assert (await status("/healthz"), await status("/readyz")) == (200, 200)
    replica.context.draining = True
    assert (await status("/healthz"), await status("/readyz")) == (200, 503)
