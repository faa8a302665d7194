"""Requests that schemathesis generates from the OpenAPI document, against a gateway with an engine.

A request that the document allows, or almost allows, never gets a 5xx of the gateway or a response
that the document does not describe. API_EXAMPLES: for each operation, of which each route has two
or more, as it has that many paths. Needs the extra `api`.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator

import pytest
import uvloop
from fakes.mock_engine import FAST, serving
from fakes.world import World

from kubeai.gateway.local_routes import make_app
from kubeai.gateway.openapi import document

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
EXAMPLES = int(os.environ.get("API_EXAMPLES", "10"))
# A WebSocket; and the console, which is not served here.
LEFT_OUT = r"/realtime|/ui/"


class Gateway(threading.Thread):
    """A World with the mock engine, in an event loop of its own: schemathesis blocks its thread."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.port = 0
        self._ready, self._done = threading.Event(), threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            uvloop.run(self._serve())
        except BaseException as error:  # reported by stop()
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        async with serving(*FAST) as mock:
            world = await World.start(local_routes=make_app, hold_timeout_s=1.0)
            world.context.ready = True
            world.route("m", {"0": mock.url.removeprefix("http://")}, engine="OLlama")
            self.port = world.port
            self._ready.set()
            await asyncio.to_thread(self._done.wait)
            await world.close()

    def started(self) -> Gateway:
        self.start()
        assert self._ready.wait(30)
        assert self._error is None, self._error
        return self

    def stop(self) -> None:
        self._done.set()
        self.join(30)
        assert not self.is_alive()
        assert self._error is None, self._error


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    gateway = Gateway().started()
    yield gateway
    gateway.stop()


def test_generated_requests_get_what_the_document_describes(gateway: Gateway) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    described = json.loads(json.dumps(document()))
    # Half of the bodies name the model that exists, so that the engine gets them.
    for schema in described["components"]["schemas"].values():
        model = schema.get("properties", {}).get("model")
        if model is not None and "minLength" in model:
            schema["properties"]["model"] = {"type": "string", "enum": ["m", "m_x", "other"]}
    api = schemathesis.openapi.from_dict(described).exclude(path_regex=LEFT_OUT)
    seen: dict[int, int] = {}
    checks = (
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
    )
    tried = 0
    for result in api.get_all_operations():
        operation = result.ok()
        tried += 1

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
            database=None,
        )
        @given(case=operation.as_strategy())
        def ask(case: schemathesis.Case) -> None:
            answered = case.call(base_url=f"http://127.0.0.1:{gateway.port}")
            seen[answered.status_code] = seen.get(answered.status_code, 0) + 1
            case.validate_response(answered, checks=list(checks))

        ask()
    assert tried == sum(
        method not in ("parameters", "servers")
        for path, item in document()["paths"].items()
        for method in item
        if "realtime" not in path and not path.startswith("/ui/")
    )
    assert {200, 400, 404} <= seen.keys(), seen
