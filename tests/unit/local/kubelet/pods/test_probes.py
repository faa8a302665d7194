"""Probes: how an attempt is made, when, and after how many a container's state changes."""

import asyncio

import pytest
from aiohttp import web

from kubeai.local.kubelet.pods.pod import (
    ExecAction,
    Header,
    HTTPGet,
    PodError,
    Probe,
    TCPSocket,
)
from kubeai.local.kubelet.pods.probes import Loops, Prober, ProbeResult
from kubeai.local.kubelet.runtime.command import ExecResult

YES, NO, NOT_YET = (
    (ProbeResult.SUCCESS, ""),
    (ProbeResult.FAILURE, "no"),
    (ProbeResult.NOT_YET, "refused"),
)
looptime = pytest.mark.looptime(start=0)


class Script:
    """Attempts with the given outcomes, the last one repeatedly; records when they were made."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.times = []

    async def __call__(self, probe):
        self.times.append(round(asyncio.get_running_loop().time(), 3))
        return self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]


def loops(script):
    return Loops(script, asyncio.get_running_loop().time())


@looptime
async def test_the_first_attempt_is_immediate_and_the_next_one_period_later():
    script = Script(NO, NO, YES)
    assert await loops(script).startup(Probe(period_seconds=2)) is None
    assert script.times == [0, 2, 4]


@looptime
async def test_the_initial_delay_starts_with_the_container():
    script = Script(YES)
    later = loops(script)
    await asyncio.sleep(3)
    await later.startup(Probe(initial_delay_seconds=5))
    assert script.times == [5]


@looptime
async def test_a_startup_probe_fails_at_its_failure_threshold():
    script = Script(NO)
    assert await loops(script).startup(Probe(period_seconds=2, failure_threshold=3)) == "no"
    assert script.times == [0, 2, 4]


@looptime
async def test_an_engine_that_does_not_listen_yet_is_probed_every_100_ms():
    script = Script(*[NOT_YET] * 12, YES)
    assert await loops(script).startup(Probe(period_seconds=10)) is None
    assert script.times[-1] == pytest.approx(1.2)


@looptime
async def test_refused_connections_within_a_period_are_one_failure():
    script = Script(NOT_YET)
    failure = await loops(script).startup(Probe(period_seconds=2, failure_threshold=3))
    assert failure == "refused"
    assert 5.8 <= script.times[-1] <= 6


@looptime
async def test_liveness_fails_only_after_consecutive_failures():
    script = Script(NO, NO, YES, NO, NO, NO)
    await loops(script).liveness(Probe(period_seconds=1, failure_threshold=3))
    assert script.times == [0, 1, 2, 3, 4, 5]


@looptime
async def test_liveness_is_not_probed_early():
    script = Script(YES, NOT_YET)
    await loops(script).liveness(Probe(period_seconds=10, failure_threshold=2))
    assert script.times == [0, 10, 20]


@looptime
async def test_readiness_changes_at_its_thresholds():
    script = Script(NOT_YET, YES, YES, NO, YES, NO, NO, YES, YES)
    changes = []

    def report(ready, message):
        changes.append((round(asyncio.get_running_loop().time(), 1), ready))

    probe = Probe(period_seconds=10, success_threshold=2, failure_threshold=2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(75):
            await loops(script).readiness(probe, report)
    # A refused first attempt is repeated at once, but not after the container has been ready.
    assert changes == [(10, True), (50, False), (70, True)]


# -- attempts ------------------------------------------------------------------------------------


class FakeContainer:
    ip = "127.0.0.1"

    def __init__(self, port=0, result=None):
        self._port, self._result = port, result
        self.seen: list[tuple[str, object]] = []

    def port(self, wanted):
        if wanted == "nope":
            raise PodError("container server has no port named 'nope'")
        return self._port

    async def exec(self, command, timeout_s):
        if self._result is None:
            raise TimeoutError
        return self._result


@pytest.fixture
async def prober():
    prober = Prober()
    yield prober
    await prober.close()


@pytest.fixture
async def server():
    seen = []
    over = asyncio.Event()

    async def answer(request):
        seen.append((request.raw_path, request.headers))
        if request.path == "/hang":
            await over.wait()
        return web.Response(status=int(request.query.get("status", 200)))

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    target = FakeContainer(runner.addresses[0][1])
    target.seen = seen
    yield target
    over.set()
    await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, ProbeResult.SUCCESS),
        (302, ProbeResult.SUCCESS),
        (404, ProbeResult.FAILURE),
        (500, ProbeResult.FAILURE),
        (503, ProbeResult.NOT_YET),
    ],
)
async def test_a_status_from_200_to_399_is_success(prober, server, status, outcome):
    probe = Probe(http_get=HTTPGet("http", f"/health?status={status}"))
    assert (await prober.attempt(probe, server))[0] is outcome


async def test_the_path_and_the_headers_are_sent_unchanged(prober, server):
    action = HTTPGet("http", "a%2Fb?x=%20", http_headers=(Header("X-Probe", "1"),))
    assert (await prober.attempt(Probe(http_get=action), server))[0] is ProbeResult.SUCCESS
    path, headers = server.seen[0]
    assert path == "/a%2Fb?x=%20"
    assert headers["X-Probe"] == "1"


async def test_a_probe_timeout_is_a_failure(prober, server):
    probe = Probe(http_get=HTTPGet("http", "/hang"), timeout_seconds=1)
    assert await prober.attempt(probe, server) == (ProbeResult.FAILURE, "no response within 1 s")


async def test_a_refused_connection_is_reported_as_not_listening(prober, unused_tcp_port):
    target = FakeContainer(unused_tcp_port)
    for probe in (Probe(http_get=HTTPGet(1)), Probe(tcp_socket=TCPSocket(1))):
        assert (await prober.attempt(probe, target))[0] is ProbeResult.NOT_YET


async def test_a_tcp_probe_connects(prober, server):
    probe = Probe(tcp_socket=TCPSocket("http"))
    assert (await prober.attempt(probe, server))[0] is ProbeResult.SUCCESS


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        (ExecResult(0, ""), ProbeResult.SUCCESS),
        (ExecResult(1, "broken"), ProbeResult.FAILURE),
        (ExecResult(-1, "not found"), ProbeResult.FAILURE),
        (None, ProbeResult.FAILURE),
    ],
)
async def test_a_command_succeeds_with_code_0(prober, result, outcome):
    probe = Probe(exec=ExecAction(("true",)))
    assert (await prober.attempt(probe, FakeContainer(result=result)))[0] is outcome


@pytest.mark.parametrize(
    "probe", [Probe(http_get=HTTPGet("nope")), Probe(), Probe(http_get=HTTPGet(1, scheme="gopher"))]
)
async def test_an_invalid_probe_fails_with_a_message(prober, probe):
    outcome, message = await prober.attempt(probe, FakeContainer(1))
    assert outcome is ProbeResult.FAILURE
    assert message
