"""What a request does while no endpoint can serve it, on the test's clock."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any, cast

import pytest
from fakes.time import FAKE_TIME

from kubeai._load import LoadTable
from kubeai._prompt import Prompt
from kubeai.api.config.system import GatewayConfig
from kubeai.gateway.context import Context
from kubeai.gateway.holding import HoldComments, advice, hold
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.request import named, read
from kubeai.openai.routes import Kind
from kubeai.routing.publisher import Publisher
from kubeai.routing.queueing import Waiting
from kubeai.routing.routes import Block, Endpoint, Route
from kubeai.routing.table import RoutingTable

pytestmark = FAKE_TIME

HOLD_S = 600.0


class Upstream:
    def close(self):
        pass


class Worker:
    """A gateway, its model `m`, and requests that nothing serves yet."""

    def __init__(self):
        self.loads = LoadTable.create(8, 1)
        self.publisher = Publisher(self.loads)
        self.table = RoutingTable(
            LoadTable.attach(self.loads.fd, 0), lambda routed, endpoint: cast(Any, Upstream())
        )
        self.demanded = []
        config = GatewayConfig(hold_timeout_s=HOLD_S)
        self.context = Context(config, self.demanded.append)
        self.context.routes = self.table
        self.route()

    def route(self, *endpoints, block=None, **values):
        route = Route(
            "m", "VLLM", adapters=("fin",), endpoints=endpoints, block=block, **values
        )  # fmt: skip
        delta = self.publisher.update("m", route)
        if delta is not None:
            self.table.apply(delta)

    def ask(self, model="m"):
        return asyncio.create_task(self._hold(model))

    async def _hold(self, model):
        """Return the endpoint's name or the error, and the seconds that it took."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        routed = self.table.find("m")
        admission = routed.admit()
        ask = named(Kind.CHAT, model)
        waiting = Waiting(Prompt(), ask.adapter)
        try:
            reservation = await hold(self.context, routed, model, waiting, admission)
        except ErrorResponse as error:
            return error, loop.time() - began_s
        finally:
            admission.close()
        reservation.release()
        return reservation.name, loop.time() - began_s

    @property
    def held(self):
        return self.loads.held(self.publisher.row("m"))


@pytest.fixture
async def worker():
    worker = Worker()
    yield worker
    assert worker.held == worker.context.held("m") == 0
    worker.table.close()
    worker.loads.close()


def now_s():
    return asyncio.get_running_loop().time()


def failing_in(time_s, reason="CrashLoopBackOff", **values):
    return Block(reason, "container server keeps exiting", now_s() + time_s, **values)


def ready(*adapters):
    return Endpoint("a", "127.0.0.1:1", adapters)


def check(error, status, code, *words):
    assert (error.status, error.code) == (status, code)
    for word in words:
        assert word in error.message


async def test_a_permanent_trouble_fails_at_once_and_scales_nothing_up(worker):
    worker.route(block=Block("InvalidProfile", "spec.resourceProfile: no 'x'", 0.0, retry=False))
    error, took_s = await worker.ask()
    check(error, 503, "model_cannot_start", "'m'", "InvalidProfile", "spec.resourceProfile: no 'x'")
    assert took_s == 0
    assert worker.demanded == []
    assert advice(error) == {"x-should-retry": "false"}


async def test_a_temporary_trouble_fails_requests_after_the_grace_and_then_at_once(worker):
    worker.route(block=failing_in(30))
    error, took_s = await worker.ask()
    check(error, 503, "model_unavailable", "CrashLoopBackOff", "container server keeps exiting")
    assert took_s == pytest.approx(30)
    assert int(advice(error)["Retry-After"]) > 0
    error, took_s = await worker.ask()
    assert (error.status, took_s) == (503, 0)


async def test_a_request_held_before_the_trouble_fails_with_it(worker):
    asking = worker.ask()
    await asyncio.sleep(100)
    assert worker.demanded == ["m"]
    worker.route(block=failing_in(30))
    error, took_s = await asking
    assert (error.status, took_s) == (503, pytest.approx(130))


async def test_a_permanent_trouble_ends_an_ongoing_wait(worker):
    asking = worker.ask()
    await asyncio.sleep(1)
    worker.route(block=Block("EngineNotInstalled", "vllm is not installed", 0.0, retry=False))
    error, took_s = await asking
    check(error, 503, "model_cannot_start", "EngineNotInstalled: vllm is not installed")
    assert took_s == pytest.approx(1)


async def test_a_request_is_served_once_the_trouble_clears(worker):
    worker.route(block=failing_in(30))
    asking = worker.ask()
    await asyncio.sleep(20)
    worker.route()
    await asyncio.sleep(40)
    assert not asking.done()
    worker.route(ready())
    assert await asking == ("a", pytest.approx(60))


async def test_an_endpoint_that_appears_within_the_grace_serves_the_request(worker):
    worker.route(block=failing_in(30))
    asking = worker.ask()
    await asyncio.sleep(29)
    worker.route(ready())
    assert await asking == ("a", pytest.approx(29))


async def test_a_new_trouble_with_a_longer_grace_extends_the_wait(worker):
    worker.route(block=failing_in(30))
    asking = worker.ask()
    await asyncio.sleep(10)
    worker.route(block=failing_in(300, "Unschedulable"))
    error, took_s = await asking
    check(error, 503, "model_unavailable", "Unschedulable")
    assert took_s == pytest.approx(310)


async def test_many_held_requests_end_together(worker):
    asking = [worker.ask() for _ in range(50)]
    await asyncio.sleep(5)
    assert worker.held == 50
    worker.route(block=failing_in(30))
    for error, took_s in await asyncio.gather(*asking):
        assert (error.status, took_s) == (503, pytest.approx(35))


@pytest.mark.parametrize("grace_s", [HOLD_S + 1, math.inf])
async def test_the_hold_timeout_error_includes_the_reason(worker, grace_s):
    worker.route(block=Block("ReplicasStarting", "0 of 1 replica is ready", now_s() + grace_s))
    error, took_s = await worker.ask()
    check(error, 504, "timeout", "'m'", "ReplicasStarting: 0 of 1 replica is ready")
    assert took_s == pytest.approx(HOLD_S)


async def test_the_hold_timeout_without_a_known_reason(worker):
    error, took_s = await worker.ask()
    check(error, 504, "timeout", "'m'")
    assert took_s == pytest.approx(HOLD_S)


async def test_requests_for_an_adapter_that_fails_to_load_fail_while_its_model_serves(worker):
    block = failing_in(30, "AdaptersFailed")
    worker.route(ready(), adapter_blocks={"fin": block})
    error, took_s = await worker.ask("m_fin")
    check(error, 503, "model_unavailable", "'m_fin'", "AdaptersFailed")
    assert took_s == pytest.approx(30)
    assert await worker.ask() == ("a", 0)
    worker.route(ready("fin"))
    assert await worker.ask("m_fin") == ("a", 0)


async def test_requests_for_an_adapter_fail_if_its_model_cannot_start(worker):
    worker.route(block=Block("InvalidURL", "spec.url: wrong", 0.0, retry=False))
    error, _ = await worker.ask("m_fin")
    check(error, 503, "model_cannot_start", "'m_fin'", "InvalidURL")


async def test_a_request_is_dropped_when_its_client_disconnects_in_the_grace(worker):
    worker.route(block=failing_in(30))
    asking = worker.ask()
    await asyncio.sleep(1)
    assert worker.held == 1
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    assert worker.held == 0


# -- comments, measured starts ---------------------------------------------------------------------


class Stream:
    """What a held request's response consists of: (time, text)."""

    begun = False

    def __init__(self):
        self.written = []

    def begin(self, headers):
        if not self.begun:
            self.begun = True
            self.written.append((now_s(), headers))

    def comment(self, text):
        self.written.append((now_s(), text))


def comments_on(stream, phrase=lambda: "pulling image"):
    return HoldComments(stream, GatewayConfig(), lambda: b"head", phrase)


async def test_the_first_comment_comes_after_two_seconds_and_then_one_every_five():
    stream, began_s = Stream(), now_s()
    comments = comments_on(stream)
    await asyncio.sleep(13)
    comments.stop()
    await asyncio.sleep(60)
    times = [at_s - began_s for at_s, _ in stream.written]
    assert times == pytest.approx([2, 2, 7, 12])
    assert [text for _, text in stream.written[:2]] == [
        b"head",
        b"waiting for a replica: pulling image",
    ]


async def test_a_wait_that_ends_within_two_seconds_sends_nothing():
    stream = Stream()
    comments = comments_on(stream)
    await asyncio.sleep(1.9)
    comments.stop()
    await asyncio.sleep(60)
    assert stream.written == []


async def test_a_second_wait_of_a_request_continues_with_the_interval():
    stream = Stream()
    stream.begun = True
    began_s = now_s()
    comments = comments_on(stream)
    await asyncio.sleep(6)
    comments.stop()
    assert [at_s - began_s for at_s, _ in stream.written] == pytest.approx([5])


@pytest.mark.parametrize(
    ("kind", "stream", "after_s", "comments"),
    [
        (Kind.CHAT, True, 2.0, True),
        (Kind.MESSAGES, True, 2.0, True),
        (Kind.CHAT, False, 2.0, False),
        (Kind.CHAT, True, 0.0, False),
        (Kind.EMBEDDINGS, True, 2.0, False),
    ],
)
def test_only_streams_have_comments_and_only_if_the_config_does_not_forbid_it(
    kind, stream, after_s, comments
):
    request = read(kind, b'{"model": "m", "stream": %s}' % (b"true" if stream else b"false"))
    config = GatewayConfig(hold_comment_after_s=after_s)
    assert HoldComments.suit(request, config) is comments


async def test_errors_of_held_requests_say_when_to_retry_once_starts_were_measured(worker):
    worker.route(start_s=42)
    error, took_s = await worker.ask()
    check(error, 504, "timeout")
    assert took_s == pytest.approx(HOLD_S)
    assert advice(error) == {"Retry-After": "42"}
    worker.route(start_s=10_000, block=failing_in(0))
    error, _ = await worker.ask()
    assert advice(error) == {"Retry-After": "600"}
    worker.route(start_s=42, block=Block("InvalidURL", "spec.url: wrong", 0.0, retry=False))
    error, _ = await worker.ask()
    assert advice(error) == {"x-should-retry": "false"}
