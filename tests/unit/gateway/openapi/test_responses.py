"""What the mock engine answers through the gateway is what the OpenAPI document describes."""

import fnmatch

import httpx
import pytest
from fakes.api_document import operations, resolved, servers
from fakes.mock_engine import FAST, serving
from fakes.world import World

from kubeai.gateway.local_routes import make_app
from kubeai.gateway.openapi import document
from kubeai.openai.routes import Kind, route_table

HI = [{"role": "user", "content": "Hi"}]
BODIES = {
    Kind.CHAT: {"messages": HI},
    Kind.CHAT_BATCH: {"messages": [HI]},
    Kind.COMPLETIONS: {"prompt": "Hi"},
    Kind.RESPONSES: {"input": "Hi"},
    Kind.MESSAGES: {"messages": HI, "max_tokens": 5},
    Kind.COUNT_TOKENS: {"messages": HI},
    Kind.SYSTEM_ONE: {
        "state": "Hi",
        "questions": {"q": {"type": "choice", "criteria": ["a", "b"]}},
    },
    Kind.EMBEDDINGS: {"input": "Hi"},
    Kind.EMBED_V2: {"texts": ["Hi"], "input_type": "search_query"},
    Kind.RERANK: {"query": "Hi", "documents": ["a", "b"]},
    Kind.SCORE: {"queries": "Hi", "documents": "a"},
    Kind.GENERATIVE_SCORING: {"query": "Hi", "items": ["a"], "label_token_ids": [1, 2]},
    Kind.POOLING: {"input": "Hi"},
    Kind.CLASSIFY: {"input": "Hi"},
    Kind.TOKENIZE: {"prompt": "Hi"},
    Kind.DETOKENIZE: {"tokens": [72, 105]},
    Kind.SPEECH: {"input": "Hi", "voice": "alloy"},
    Kind.IMAGES: {"prompt": "a cat"},
    Kind.IMAGE_EDITS: {"prompt": "a hat", "images": [{"image_url": "data:"}]},
    Kind.OLLAMA_CHAT: {"messages": HI},
    Kind.OLLAMA_GENERATE: {"prompt": "Hi"},
    Kind.OLLAMA_EMBED: {"input": "Hi"},
    Kind.OLLAMA_EMBEDDINGS: {"prompt": "Hi"},
}
FORMS = [kind for kind in Kind if kind.is_form]
OF_MOCK = {"x-mock-replica"}  # a header of the engine, which is passed on


@pytest.fixture
async def http():
    async with serving(*FAST) as mock:
        world = await World.start(local_routes=make_app)
        world.context.ready = True
        # The only engine that has Ollama's API; the others' routes work with any.
        world.route("m", {"0": mock.url.removeprefix("http://")}, engine="OLlama")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.port}") as http:
            yield http
        await world.close()


def check(method: str, path: str, answered: httpx.Response) -> None:
    """The response's status, content type and headers are in the document."""
    assert answered.is_success, (path, answered.text)
    responses = operations()[method, path]["responses"]
    response = resolved(responses.get(str(answered.status_code)) or responses["2XX"])
    given = answered.headers["content-type"].partition(";")[0]
    assert any(fnmatch.fnmatch(given, pattern) for pattern in response["content"]), (path, given)
    described = {name.lower() for name in response["headers"]}
    assert "x-request-id" in answered.headers
    assert {name for name in answered.headers if name.startswith("x-")} <= described | OF_MOCK


def test_every_kind_of_json_body_is_tried():
    assert set(BODIES) == {kind for kind in Kind if kind.is_json} | {Kind.IMAGE_EDITS}


@pytest.mark.parametrize("kind", BODIES)
async def test_responses_to_json_are_described(http, kind):
    body = {"model": "m", **BODIES[kind]}
    paths = [path for path, routed in route_table.items() if routed is kind]
    assert len(paths) >= 2
    for path in paths:
        check("POST", path, await http.post(path, json=body))
    content = resolved(operations()["POST", kind.value]["requestBody"]["content"])
    schema = resolved(content["application/json"]["schema"])
    if "stream" in schema["properties"]:
        for stream in (True, False):
            check("POST", kind.value, await http.post(kind.value, json=body | {"stream": stream}))


@pytest.mark.parametrize("kind", FORMS)
async def test_responses_to_forms_are_described(http, kind):
    assert "multipart/form-data" in operations()["POST", kind.value]["requestBody"]["content"]
    audio = kind in (Kind.TRANSCRIPTIONS, Kind.TRANSLATIONS)
    files = {"file" if audio else "image": ("a", b"RIFF" + bytes(100))}
    for given in ({}, {"response_format": "text"}) if audio else ({},):
        data = {"model": "m", "prompt": "x", **given}
        check("POST", kind.value, await http.post(kind.value, data=data, files=files))


async def test_the_gateways_own_responses_are_described(http):
    for path, item in document()["paths"].items():
        if "get" in item and "realtime" not in path and "responses" not in path:
            for prefix in servers(item):
                where = prefix + path.replace("{id}", "m")
                check("GET", prefix + path, await http.get(where))
    check("POST", "/api/show", await http.post("/api/show", json={"model": "m"}))
