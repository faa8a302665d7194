"""The OpenAPI document describes the routes, headers and bodies that the gateway has."""

import json
import re

import pytest
from fakes.api_document import operations, resolved, validator
from fakes.api_keys import ALICE, bearer, get, keyed, record
from fakes.wire import says
from fakes.world import start as start
from repository import REPOSITORY

from kubeai.cli.openapi import openapi
from kubeai.gateway.console import LOGIN_PATHS
from kubeai.gateway.local_routes import OWN_ROUTES, make_app
from kubeai.gateway.openapi import document, document_json
from kubeai.gateway.openapi.apis import APIS, TAGS
from kubeai.openai.request import SHAPES, read
from kubeai.openai.routes import PREFIX, Kind, classify, route_table

# Headers that the gateway reads and that are no part of the API: those of HTTP, of browsers, of
# proxies and of the console. The document's security schemes have those with a key.
OTHER_HEADERS = {
    *("accept", "authorization", "content-type", "cookie", "origin", "x-kubeai-ui"),
    *("access-control-request-headers", "access-control-request-method"),
    *("sec-websocket-key", "sec-websocket-version", "x-forwarded-host"),
}


def test_it_is_valid_openapi_3_1():
    # Imported here because its grammars take seconds to compile.
    from openapi_spec_validator import OpenAPIV31SpecValidator

    OpenAPIV31SpecValidator(document()).validate()


def test_it_has_every_route_and_method_of_the_table_and_of_the_application_and_no_other():
    with_ids = [
        prefix + path
        for prefix in ("", PREFIX)
        for path in ("/v1/models/{id}", "/v1/responses/{id}", "/v1/responses/{id}/cancel")
    ]
    expected = {("HEAD", "/"), *(("POST", path) for path in LOGIN_PATHS)}
    expected |= {(method, path) for path in OWN_ROUTES for method in ("GET", "HEAD")}
    for path in (*route_table, *with_ids):
        allowed = classify("PUT", path.replace("{id}", "resp_1")).allow
        assert allowed, path
        expected |= {(method, path) for method in allowed}
    assert set(operations()) == expected


def test_every_kind_of_request_has_a_summary_and_every_tag_is_used():
    assert set(APIS) == set(Kind)
    used = {tag for operation in operations().values() for tag in operation["tags"]}
    assert used == set(TAGS)


def test_it_describes_every_request_header_that_the_gateway_reads():
    source = "".join(
        path.read_text()
        for package in ("gateway", "openai")
        for path in (REPOSITORY / "kubeai" / package).rglob("*.py*")
        if path.suffix in (".py", ".pyx")
    )
    read_there = set(re.findall(r'headers\(b"([a-z0-9-]+)"\)', source))
    described = {name.lower() for name in document()["components"]["parameters"]}
    assert {name for name in read_there if name.startswith("x-")} & described  # finds some
    assert read_there - OTHER_HEADERS <= described
    assert described - {"x-request-id"} <= read_there  # the relay reads that one


def test_every_component_is_used():
    text = document_json().decode()
    for kind, components in document()["components"].items():
        if kind != "securitySchemes":
            for name in components:
                assert f'"#/components/{kind}/{name}"' in text, (kind, name)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_body_that_the_schema_accepts_can_be_read(kind):
    schema = resolved(
        operations()["POST", kind.value]["requestBody"]["content"]["application/json"]["schema"]
    )
    assert schema["required"] == ["model"]
    body = {"model": "m"} | {name: None for name in schema["properties"] if name != "model"}
    assert read(kind, json.dumps(body).encode()).name == "m"
    shape = SHAPES[kind]
    routed_by = (shape.conversation, shape.text, shape.system, shape.previous)
    assert {name.decode() for name in routed_by if name is not None} <= schema["properties"].keys()


# -- served ----------------------------------------------------------------------------------------


async def test_it_is_served_as_json(start):
    world = await start(local_routes=make_app)
    wire = await world.client()
    served = await get(wire, "/openapi.json")
    assert (served.status, served.one("content-type")) == (200, "application/json")
    assert served.body == document_json()
    head = await get(wire, "/openapi.json", method="HEAD")
    assert (head.status, head.one("content-length")) == (200, str(len(document_json())))
    refused = await get(wire, "/openapi.json", method="DELETE")
    assert (refused.status, refused.one("allow")) == (405, "GET, HEAD")
    for path in ("/openai/openapi.json", "/openapi.json/"):
        assert (await get(wire, path)).status == 404


async def test_it_needs_a_key_if_keys_are_required(start):
    world = await keyed(start, record("alice", ALICE))
    wire = await world.client()
    refused = await get(wire, "/openapi.json")
    assert refused.status == 401
    assert b"openapi" not in refused.body
    assert (await get(wire, "/openapi.json", bearer(ALICE))).body == document_json()


async def test_the_models_that_the_gateway_lists_match_the_schemas(start):
    world = await start(local_routes=make_app)
    engine = await world.engine(says(b"{}"))
    world.route("m", {"0": engine}, engine="OLlama", aliases=("a",), adapters=("x",))
    wire = await world.client()
    for path, schema in (
        ("/v1/models", "ModelList"),
        ("/v1/models/m", "ListedModel"),
        ("/api/tags", "OllamaModels"),
        ("/api/ps", "OllamaModels"),
        ("/api/version", "OllamaVersion"),
    ):
        answered = await get(wire, path)
        assert answered.status == 200
        described = operations()["GET", "/v1/models/{id}" if path.endswith("/m") else path]
        (content,) = described["responses"]["200"]["content"].values()
        assert content["schema"]["$ref"] == f"#/components/schemas/{schema}"
        validator(content["schema"]["$ref"]).validate(json.loads(answered.body))


def test_the_command_prints_it(capsys):
    openapi()
    assert json.loads(capsys.readouterr().out) == json.loads(document_json())
