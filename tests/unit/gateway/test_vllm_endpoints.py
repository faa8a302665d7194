"""Clients reach vLLM's inference endpoints, and none of the others."""

import pytest
from fakes.wire import says
from vllm_endpoints import CLIENTS, GATEWAY, NOT_FOR_CLIENTS

from kubeai.gateway.local_routes import make_app
from kubeai.openai.routes import Kind, classify

PREFIXES = ("", "/openai")
JSON = "Content-Type: application/json"
BODY = b'{"model":"m"}'


def path_of(endpoint: str) -> tuple[str, str]:
    method, path = endpoint.replace("{response_id}", "resp_1").split()
    return ("GET" if method == "WEBSOCKET" else method), path


@pytest.mark.parametrize("endpoint", CLIENTS)
def test_every_endpoint_for_clients_has_a_route(endpoint):
    method, path = path_of(endpoint)
    for prefix in PREFIXES:
        found = classify(method, prefix + path)
        assert found.status == 200
        assert found.kind is not None
        assert not found.kind.is_local


def test_the_list_of_models_is_the_gateways_own():
    assert [classify(*path_of(endpoint)).kind for endpoint in GATEWAY] == [Kind.MODELS, None]


async def test_no_other_endpoint_is_reached(start):
    world = await start(local_routes=make_app)
    engine = await world.engine(says(b"reached"))
    world.route("m", {"0": engine})
    client = await world.client()
    for endpoint in NOT_FOR_CLIENTS:
        for prefix in (*PREFIXES, "/v1", "/openai/v1"):
            for method in ("GET", "POST"):
                path = prefix + path_of(endpoint)[1]
                head = (
                    f"{method} {path} HTTP/1.1\r\nHost: h\r\n{JSON}\r\nContent-Length: 13\r\n\r\n"
                )
                await client.send(head.encode() + BODY)
                assert (await client.answer()).status == 404, path
    assert engine.requests == []


async def test_json_endpoints_get_the_body_at_their_own_path(start):
    world = await start(local_routes=make_app)
    engine = await world.engine(says(b"{}"))
    world.route("m", {"0": engine})
    client = await world.client()
    kinds = []
    for endpoint in CLIENTS:
        method, path = path_of(endpoint)
        kind = classify(method, path).kind
        if kind.is_json:
            kinds.append(kind)
            head = f"POST /openai{path}?q=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 13\r\n\r\n"
            await client.send(head.encode() + BODY)
            assert (await client.answer()).body == b"{}"
    assert [request.target for request in engine.requests] == [f"{kind}?q=1" for kind in kinds]
    assert {request.body for request in engine.requests} == {BODY}
