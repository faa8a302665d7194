"""Each error of the gateway's table occurs in a real request, and the table has all that occur."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fakes.api_document import operations, resolved, validator
from fakes.api_keys import ALICE, BOB, bearer, get, keyed, record
from fakes.chats import CHAT, ask, failing, hang, lose
from fakes.websocket import handshake
from fakes.wire import Message, post, says, until
from fakes.world import World
from fakes.world import start as start
from repository import REPOSITORY

from kubeai.api.config.system import KeysConfig, QueueConfig
from kubeai.gateway import retries
from kubeai.gateway.local_routes import make_app
from kubeai.gateway.openapi.errors import ERRORS, GatewayError, Retry
from kubeai.openai.errors import error_format
from kubeai.routing.routes import Block

Pair = tuple[int, str | None]
OBJECTIVE = "X-Gateway-Inference-Objective"


class Scene:
    """What a scenario needs to provoke an error."""

    def __init__(self, start: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._start = start
        self.console_path = str(tmp_path / "console")
        self.monkeypatch = monkeypatch

    async def world(self, **config: Any) -> World:
        world: World = await self._start(**{"local_routes": make_app} | config)
        return world

    async def keyed(self, *records: Any, **config: Any) -> World:
        return await keyed(self._start, *records, **config)

    async def asked(self, world: World, request: bytes) -> Message:
        wire = await world.client()
        await wire.send(request)
        return await wire.answer()

    async def chat(self, model: str = "m", *headers: str, **config: Any) -> Message:
        """A chat in a new World with the Model m, which has no endpoint."""
        world = await self.world(**config)
        world.route("m", {})
        return await self.asked(world, ask(model, *headers))


Scenario = Callable[[Scene], Awaitable[Message]]
SCENARIOS: dict[Pair, tuple[str, str, Scenario]] = {}


def provokes(status: int, code: str | None, method: str = "POST", path: str = CHAT) -> Any:
    """Register the scenario of an error. ``path``: of its request."""

    def register(scenario: Scenario) -> Scenario:
        SCENARIOS[status, code] = method, path, scenario
        return scenario

    return register


@provokes(400, None)
async def _(scene: Scene) -> Message:
    world = await scene.world()
    return await scene.asked(world, post(CHAT, b'{"model":'))


@provokes(401, "invalid_api_key")
async def _(scene: Scene) -> Message:
    return await scene.asked(await scene.keyed(), post(CHAT))


@provokes(403, "model_not_allowed")
async def _(scene: Scene) -> Message:
    world = await scene.keyed(record("b", BOB, models="team=b"))
    world.route("m", {}, labels={"team": "a"})
    return await scene.asked(world, ask("m", bearer(BOB)))


@provokes(403, "admin_required", "GET", "/ui/")
async def _(scene: Scene) -> Message:
    world = await scene.keyed(record("alice", ALICE), console_path=scene.console_path)
    return await get(await world.client(), "/ui/", bearer(ALICE))


@provokes(403, "not_loopback", "GET", "/ui/")
async def _(scene: Scene) -> Message:
    world = await scene.world(console_path=scene.console_path)
    return await get(await world.client(), "/ui/", "X-Forwarded-For: 192.0.2.1")


@provokes(403, "foreign_origin", "GET", "/v1/realtime")
async def _(scene: Scene) -> Message:
    world = await scene.world()
    world.route("m", {})
    return await scene.asked(world, handshake("/v1/realtime?model=m", "Origin: http://other"))


@provokes(404, "model_not_found")
async def _(scene: Scene) -> Message:
    return await scene.chat("other")


@provokes(404, "unknown_url", "GET", "/v2/models")
async def _(scene: Scene) -> Message:
    return await get(await (await scene.world()).client(), "/v2/models")


@provokes(404, None, "GET", "/v1/responses/{id}")
async def _(scene: Scene) -> Message:
    return await get(await (await scene.world()).client(), "/v1/responses/resp_1")


@provokes(405, "method_not_allowed", "DELETE", "/v1/models")
async def _(scene: Scene) -> Message:
    return await get(await (await scene.world()).client(), "/v1/models", method="DELETE")


@provokes(408, None)
async def _(scene: Scene) -> Message:
    world = await scene.world(body_timeout_s=0.05)
    return await scene.asked(world, post(CHAT, b"x" * 50)[:-1])


@provokes(413, None)
async def _(scene: Scene) -> Message:
    return await scene.chat("m" * 50, body_max_bytes=20)


@provokes(415, None)
async def _(scene: Scene) -> Message:
    return await scene.chat("m", "Content-Encoding: br")


@provokes(417, None)
async def _(scene: Scene) -> Message:
    return await scene.chat("m", "Expect: more")


@provokes(421, "unknown_host", "GET", "/ui/")
async def _(scene: Scene) -> Message:
    world = await scene.world(console_path=scene.console_path)
    return await scene.asked(world, b"GET /ui/ HTTP/1.1\r\nHost: attacker.example\r\n\r\n")


@provokes(426, "upgrade_required", "GET", "/v1/realtime")
async def _(scene: Scene) -> Message:
    return await get(await (await scene.world()).client(), "/v1/realtime?model=m")


@provokes(429, "rate_limit_exceeded")
async def _(scene: Scene) -> Message:
    world = await scene.keyed(keys=KeysConfig(required=True, failures_per_minute=1))
    await scene.asked(world, ask("m", bearer("wrong")))
    return await scene.asked(world, ask("m", bearer("wrong")))


@provokes(429, "queue_full")
async def _(scene: Scene) -> Message:
    queue = QueueConfig(objectives={"urgent": 10})
    world = await scene.world(hold_max_requests=1, queue=queue, hold_timeout_s=30.0)
    world.route("m", {"a": await world.engine(hang)}, capacity=1)
    wires = [await world.client() for _ in range(3)]
    await wires[0].send(ask("m"))
    await until(lambda: world.in_flight("m") == 1)
    await wires[1].send(ask("m"))
    await until(lambda: world.held("m") == 1)
    await wires[2].send(ask("m", f"{OBJECTIVE}: urgent"))
    return await wires[1].answer()


@provokes(431, None)
async def _(scene: Scene) -> Message:
    return await scene.chat("m", "A: 1", "B: 2", "C: 3", head_max_count=3)


@provokes(500, "internal_error")
async def _(scene: Scene) -> Message:
    world = await scene.world()
    world.route("m", {})
    wire = await world.client()
    await wire.send(ask("m"))
    await until(lambda: world.held("m") == 1)
    picker = type(world.table.find("m"))
    scene.monkeypatch.setattr(picker, "pick", lambda *_: 1 / 0)
    world.route("m", {"a": await world.engine(says(b"{}"))})
    return await wire.answer()


@provokes(500, None)
async def _(scene: Scene) -> Message:
    world = await scene.world()
    scene.monkeypatch.setattr(world.table, "find", lambda *_: 1 / 0)
    return await scene.asked(world, ask("m"))


@provokes(500, "bad_gateway")
async def _(scene: Scene) -> Message:
    """No retry is in the budget, and the other replica fails while this request waits for it."""
    world = await scene.world(retry_budget_percent=0.0, retry_budget_min=0.0)
    engine = await world.engine(failing(500))
    world.route("m", {"a": engine, "b": engine.address})
    may_answer = iter([True])
    scene.monkeypatch.setattr(retries, "_may_answer", lambda _: next(may_answer, False))
    scene.monkeypatch.setattr(retries, "_is_trusted", lambda _: False)
    return await scene.asked(world, ask("m"))


@provokes(502, "bad_gateway")
async def _(scene: Scene) -> Message:
    world = await scene.world(retries=0)
    world.route("m", {"a": await world.engine(lose)})
    return await scene.asked(world, ask("m"))


@provokes(502, "engine_died")
async def _(scene: Scene) -> Message:
    world = await scene.world()

    async def crash(_: Any, request: Message) -> None:
        engine.die()

    engine = await world.engine(crash)
    world.route("m", {"a": engine})
    return await scene.asked(world, ask("m"))


@provokes(502, None, "GET", "/ui/")
async def _(scene: Scene) -> Message:
    world = await scene.world(console_path=scene.console_path)
    return await scene.asked(world, b"GET /ui/ HTTP/1.1\r\nHost: localhost\r\n\r\n")


def blocked(retry: bool) -> Scenario:
    async def scenario(scene: Scene) -> Message:
        world = await scene.world()
        world.route("m", {}, block=Block("UnknownImage", "no such image", 0.0, retry))
        return await scene.asked(world, ask("m"))

    return scenario


provokes(503, "model_unavailable")(blocked(True))
provokes(503, "model_cannot_start")(blocked(False))


@provokes(503, "overloaded")
async def _(scene: Scene) -> Message:
    return await scene.chat(hold_max_requests=0)


@provokes(503, None)
async def _(scene: Scene) -> Message:
    return await scene.chat(buffer_max_bytes=10)


@provokes(504, "timeout")
async def _(scene: Scene) -> Message:
    return await scene.chat(hold_timeout_s=0.01)


def test_every_error_of_the_table_has_a_scenario():
    pairs = [(error.status, error.code) for error in ERRORS]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == set(SCENARIOS)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{error.status}-{error.code}")
async def test_an_error_of_the_table_is_what_a_client_gets(
    start, tmp_path, monkeypatch, error: GatewayError
):
    method, path, scenario = SCENARIOS[error.status, error.code]
    async with asyncio.timeout(20):
        answered = await scenario(Scene(start, tmp_path, monkeypatch))
    assert answered.status == error.status
    said = json.loads(answered.body)["error"]
    assert said["code"] == error.code
    assert said["type"] in error.types
    check_advice(error, answered)
    described = operations().get((method, path))
    if described is not None and error.status != 405:
        response = resolved(described["responses"][str(error.status)])
        names = {name.lower() for name in response["headers"]}
        given = {name.lower() for name, _ in answered.headers}
        assert given - names <= {
            *("content-type", "content-length", "date", "connection", "upgrade")
        }
    name = error_format(path).__name__
    validator(f"#/components/schemas/{name}").validate(json.loads(answered.body))


def check_advice(error: GatewayError, answered: Message) -> None:
    """The headers that say whether to retry are those that the table promises."""
    never = answered.one("x-should-retry") == "false"
    assert never == (error.retry is Retry.NEVER)
    waits = answered.one("retry-after") is not None
    if error.status == 504:  # only once a start of the Model was measured
        assert error.retry is Retry.LATER
    else:
        assert waits == (error.retry is Retry.LATER)


# -- what the code can answer ----------------------------------------------------------------------

PACKAGES = ("gateway", "openai")
# Errors whose status is not a constant where they are made, with the pairs that they can have.
COMPUTED: dict[tuple[str, str], set[Pair]] = {
    ("gateway/attempts.py", "_say"): set(),  # its callers are read instead
    ("gateway/retries.py", "_exhausted"): {
        (500, "bad_gateway"),
        (502, "bad_gateway"),
        (503, "model_unavailable"),
        (504, "timeout"),
    },
    ("openai/errors.py", "engine_error"): set(),  # the engine's own error
    ("openai/errors.py", "relay_error"): set(),  # the relay's calls are read instead
}


def constants() -> dict[str, str]:
    """The strings that modules of the gateway have names for."""
    found = {}
    for path in sources(".py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for target in node.targets:
                    if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                        found[target.id] = node.value.value
    return found


def sources(suffix: str) -> list[Any]:
    roots = (REPOSITORY / "kubeai" / package for package in PACKAGES)
    return sorted(path for root in roots for path in root.rglob(f"*{suffix}"))


def code_values(node: ast.expr | None, names: dict[str, str]) -> set[str | None] | None:
    """The values that an expression for a code may have; None: it is computed."""
    match node:
        case None:
            return {None}
        case ast.Constant(value=str() | None as value):
            return {value}
        case ast.Name(id=name) if name in names:
            return {names[name]}
        case ast.IfExp(body=body, orelse=orelse):
            one, other = code_values(body, names), code_values(orelse, names)
            return None if one is None or other is None else one | other
    return None


def pairs_in_python() -> set[Pair]:
    names, found = constants(), set()
    for path in sources(".py"):
        where = str(path.relative_to(REPOSITORY / "kubeai"))
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for call in ast.walk(function):
                if not isinstance(call, ast.Call):
                    continue
                pair = pairs_of(call, names)
                if pair is None:
                    assert (where, function.name) in COMPUTED, (where, function.name, call.lineno)
                    found |= COMPUTED[where, function.name]
                else:
                    found |= pair
    return found


def pairs_of(call: ast.Call, names: dict[str, str]) -> set[Pair] | None:
    """The errors that a call makes; None: its arguments are computed."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    match call.func:
        case ast.Name(id="ErrorResponse"):
            args = dict(zip(("message", "param", "status", "code"), call.args, strict=False))
            status, code = keywords.get("status", args.get("status")), keywords.get("code")
            code = code or args.get("code")
        case ast.Attribute(attr="_say"):
            status, code = call.args[0], call.args[2] if len(call.args) > 2 else None
        case ast.Attribute(attr="__init__") if "status" in keywords:  # of a subclass
            status, code = keywords["status"], keywords.get("code")
        case _:
            return set()
    codes = code_values(code, names)
    if status is None:
        statuses = {400}
    elif isinstance(status, ast.Constant) and isinstance(status.value, int):
        statuses = {status.value}
    else:
        return None
    return None if codes is None else {(each, code) for each in statuses for code in codes}


def pairs_in_cython() -> set[Pair]:
    found: set[Pair] = set()
    for path in sources(".pyx"):
        text = path.read_text()
        for arguments in re.findall(r"_refuse\(\s*(\d{3}[^,]*),", text):
            found |= {(int(status), None) for status in re.findall(r"\b\d{3}\b", arguments)}
        for arguments in re.findall(r"ErrorResponse\((.*?)^    \)", text, re.DOTALL | re.MULTILINE):
            status = re.search(r"status=(\d+)", arguments)
            code = re.search(r'code="(\w+)"', arguments)
            found.add((int(status[1]) if status else 400, code[1] if code else None))
    return found


def test_the_table_has_exactly_the_errors_that_the_code_makes():
    python, cython = pairs_in_python(), pairs_in_cython()
    assert {(417, None), (429, "rate_limit_exceeded")} <= cython  # it is read
    assert {(error.status, error.code) for error in ERRORS} == python | cython
