"""Three `kubeai serve` replicas under load while replicas, engines and the API fail.

Clients see them as through a Kubernetes Service (fleets.py), and every request that fails is a
failure: none is tried again. The APIs are this module's own, since it takes them away. What is
cheap runs on the embedded one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
from fleets import Fleet, Replica, Service, Traffic, Watched
from harness import Answer, chat, model, pods, received, until
from machines import machine
from servers import ApiServer, assets, embedded, install_models, real

from kubeai.kube.resources import CONFIGMAPS, LEASES, MODELS, PODS

pytestmark = pytest.mark.timeout(480)
ENGINES = 3
SLOW = ("--decode-tokens-per-second=10", "--max-batch=256")
STREAMS = 50
STREAM_TOKENS = 40  # 4 s: a replica that is told to stop needs as long
PER_S = 100
OUTAGE_S = float(os.environ.get("OUTAGE_S", "10"))  # of the API; 30 in `make soak`
COLD = [f"cold-{number}" for number in range(5)]
ASKED_PER_MODEL = 100
UNREADY_MAX_S = 1.0
BACK_MAX_S = 20.0  # once the API is there again; its clients wait up to 10 s between tries
KEYS = 200
IN_FLIGHT = "kubeai_endpoint_requests_in_flight{"
PEERS_IN_FLIGHT = "kubeai_endpoint_peers_requests_in_flight{"


@pytest.fixture(scope="module")
def real_api(tmp_path_factory) -> Iterator[ApiServer]:
    if assets("etcd", "kube-apiserver") is None:
        pytest.skip("KUBEBUILDER_ASSETS holds no etcd and kube-apiserver")
    with real(tmp_path_factory.mktemp("api") / "real") as server:
        install_models(server)
        yield server


@pytest.fixture
async def fleet(real_api, tmp_path) -> AsyncIterator[Fleet]:
    async with machine(real_api, tmp_path, Fleet) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def small_api(tmp_path_factory) -> Iterator[ApiServer]:
    with embedded(tmp_path_factory.mktemp("api") / "embedded") as server:
        install_models(server)
        yield server


@pytest.fixture
async def small_fleet(small_api, tmp_path) -> AsyncIterator[Fleet]:
    async with machine(small_api, tmp_path, Fleet) as fleet:
        yield fleet


async def run_engines(fleet: Fleet) -> None:
    """A Model that has its engines from the start, and keeps them."""
    await fleet.create(model("chat", args=SLOW, minReplicas=ENGINES, maxReplicas=ENGINES))
    await until("the engines are ready", lambda: fleet.settled("chat", ENGINES), 60)


def load(fleet: Fleet, service: Service) -> Traffic:
    return Traffic(
        service,
        fleet.port,
        "chat",
        streams=STREAMS,
        stream_tokens=STREAM_TOKENS,
        per_s=PER_S,
    )


def passed_s(began_s: float) -> float:
    return time.monotonic() - began_s


# -- restarts --------------------------------------------------------------------------------------


@pytest.mark.cluster
async def test_a_rolling_restart_under_load_fails_nothing(fleet):
    await fleet.launch()
    await run_engines(fleet)
    async with Service(fleet.replicas) as service, load(fleet, service) as traffic:
        await until("all streams have begun", lambda: traffic.asked > PER_S)
        for replica in fleet.replicas:
            began_s = time.monotonic()
            assert await replica.stop() == 0
            stopped_s = time.monotonic()
            await replica.launch()
            await replica.until_ready()
            print(
                f"{replica.name}: {stopped_s - began_s:.1f} s to stop, "
                f"{passed_s(stopped_s):.1f} s to be ready again"
            )
    print(traffic.figures(), *traffic.failures, sep="\n")
    assert traffic.failures == []


async def test_replica_is_ready_once_synced_and_unready_once_stopping(small_fleet):
    fleet, api = small_fleet, small_fleet.api.program
    first, second, _ = fleet.replicas
    await first.launch()
    await first.until_ready()
    await fleet.tell_of(second)
    api.freeze()  # it answers nobody
    await second.launch()
    await until("it says that it is not synced", lambda: says(second, 503, "not synced"))
    api.kill()  # it refuses
    assert await says(second, 503, "not synced")
    assert await first.is_ready(), "what it knows it still serves"
    api.start()
    back_s = time.monotonic()
    await second.until_ready(BACK_MAX_S)
    print(f"{second.name}: ready {passed_s(back_s):.1f} s after the API's start")
    first.serve.process.send_signal(signal.SIGTERM)
    told_s = time.monotonic()
    await until("it is unready", lambda: says(first, 503, "stopping"))
    print(f"unready {passed_s(told_s):.2f} s after SIGTERM")
    assert passed_s(told_s) <= UNREADY_MAX_S
    assert await first.serve.process.wait() == 0


async def says(replica: Replica, status: int, text: str) -> bool:
    return await replica.readyz() == (status, text)


# -- one view of load ------------------------------------------------------------------------------


@pytest.mark.slow
async def test_what_one_replica_serves_counts_for_all(small_fleet):
    """Picks, the autoscaler, and which pod goes, when and how."""
    fleet = small_fleet
    fleet.config["modelAutoscaling"] = {"interval": "500ms", "timeWindow": "1s"}
    await fleet.launch()
    await until("all have heard each other", lambda: all_hear(fleet))
    leader = await fleet.leader()
    other, third = (replica for replica in fleet.replicas if replica is not leader)
    quick = {"targetRequests": 1, "scaleDownDelaySeconds": 1, "minReplicas": 2, "maxReplicas": 2}
    await fleet.create(model("m", args=("--decode-tokens-per-second=20",), **quick))
    await until("two are ready", lambda: fleet.settled("m", 2), 40)
    async with Callers() as callers:
        first = callers.stream(other, "m", tokens=200)
        await until("it has begun", lambda: loads_are(fleet, 0, 1))
        await until("the third was told", lambda: told(third, 0, 1))
        second = callers.stream(third, "m", tokens=400)
        await until("each has one", lambda: loads_are(fleet, 1, 1))
        await until("the leader has seen both for a while", lambda: average_is(fleet, 2.0))
        await fleet.kube.patch(MODELS, "m", {"spec": {"minReplicas": 0}})
        async with Watched(fleet.kube, fleet.namespace) as watched:
            long = await first
            assert long.whole, long.error
            assert watched.shrunk() == [], "nothing was taken away under the streams"
            # The pod of the stream that is over goes, the other serves on to its end.
            await until("one is left", lambda: fleet.settled("m", 1), 20)
            assert (await second).whole
            await until("none is left", lambda: fleet.settled("m", 0), 20)
    assert callers.failures == []


async def test_a_pod_is_drained_by_the_replicas_that_do_not_lead(small_fleet):
    fleet = small_fleet
    await fleet.launch()
    await until("all have heard each other", lambda: all_hear(fleet))
    leader = await fleet.leader()
    other = next(replica for replica in fleet.replicas if replica is not leader)
    slow = ("--decode-tokens-per-second=20",)
    await fleet.create(model("m", args=slow, autoscalingDisabled=True, replicas=1))
    await until("it is ready", lambda: fleet.settled("m", 1), 40)
    async with Callers() as callers:
        stream = callers.stream(other, "m", tokens=200)
        await until("it streams", lambda: loads_are(fleet, 1))
        await fleet.kube.patch(MODELS, "m", {"spec": {"replicas": 0}}, subresource="scale")
        await until("nobody routes to it", lambda: nobody_routes(fleet))
        (pod,) = await fleet.pods()
        assert "kubeai.org/draining-since" in pod["metadata"]["annotations"]
        answer = await stream
        assert answer.whole, answer.error
        await until("it is gone", lambda: fleet.settled("m", 0), 20)


async def all_hear(fleet: Fleet) -> bool:
    """Whether each replica has recently heard from the other two."""
    for replica in fleet.replicas:
        series = await replica.series()
        silences = [v for s, v in series.items() if s.startswith("kubeai_peer_silence_seconds{")]
        if len(silences) != len(fleet.replicas) - 1 or max(silences) > 2:
            return False
    return await fleet.leader() is not None


async def loads_are(fleet: Fleet, *loads: int) -> bool:
    """Whether the endpoints' in-flight counts, summed over all replicas, are ``loads``."""
    found: Counter[str] = Counter()
    for replica in fleet.replicas:
        series = await replica.series()
        found.update({s: v for s, v in series.items() if s.startswith(IN_FLIGHT)})
    return sorted(found.values()) == sorted(loads)


async def told(replica: Replica, *loads: int) -> bool:
    """Whether a replica has received ``loads`` as the others' in-flight counts per endpoint."""
    series = await replica.series()
    found = [v for s, v in series.items() if s.startswith(PEERS_IN_FLIGHT)]
    return sorted(found) == sorted(loads)


async def average_is(fleet: Fleet, requests: float) -> bool:
    """Whether the Model's average in the autoscaler's stored state is ``requests``."""
    found, _ = await fleet.kube.list(CONFIGMAPS, fleet.namespace)
    kept = [one["data"]["models"] for one in found if "models" in one.get("data", {})]
    return any(
        state["averageActiveRequests"] == requests
        for text in kept
        for state in json.loads(text)["models"].values()
    )


async def nobody_routes(fleet: Fleet) -> bool:
    return await loads_are(fleet)


# -- the API is away -------------------------------------------------------------------------------


@pytest.mark.cluster
async def test_hung_api_fails_no_request_and_held_requests_are_answered_after(fleet):
    await fleet.launch()
    await run_engines(fleet)
    cold = model("cold", args=SLOW, minReplicas=0, maxReplicas=1, scaleDownDelaySeconds=60)
    await fleet.create(cold)
    async with (
        Watched(fleet.kube, fleet.namespace) as watched,
        Service(fleet.replicas) as service,
        load(fleet, service) as traffic,
        Callers() as callers,
    ):
        fleet.api.program.freeze()
        for replica in fleet.replicas:
            callers.ask(replica, "cold", 20)
        await asyncio.sleep(OUTAGE_S)
        assert callers.answered == 0, "nobody can have started it"
        assert all([await replica.is_ready() for replica in fleet.replicas])
        fleet.api.program.thaw()
        back_s = time.monotonic()
        await until("the held requests are answered", callers.all_answered, 60)
        print(f"held requests answered {passed_s(back_s):.1f} s after the API was back")
    print(traffic.figures(), *traffic.failures, sep="\n")
    assert traffic.failures == []
    assert callers.failures == []
    await until("statuses are right", lambda: all_settled(fleet, chat=ENGINES, cold=1), 30)
    await until("one leads", lambda: is_led(fleet), 30)
    assert watched.shrunk() == []
    assert watched.woken("cold") == 1
    assert len(watched.pods["cold"]) == 1
    assert len(watched.pods["chat"]) == ENGINES


async def all_settled(fleet: Fleet, **replicas: int) -> bool:
    return all([await fleet.settled(name, count) for name, count in replicas.items()])


async def is_led(fleet: Fleet) -> bool:
    """Whether the lease's holder renews it, and it alone says that it leads."""
    before = await fleet.kube.get(LEASES, "kubeai.org", fleet.namespace)
    await asyncio.sleep(1.5)
    after = await fleet.kube.get(LEASES, "kubeai.org", fleet.namespace)
    renewed = before["spec"]["renewTime"] != after["spec"]["renewTime"]
    return renewed and await fleet.leader() is not None


@pytest.mark.cluster
async def test_cold_models_scale_up_once_and_answer_once_despite_failures(fleet):
    """The leader hangs and is killed while the API is down; no request to the others fails."""
    await fleet.launch()
    for name in COLD:
        cold = model(name, args=SLOW, minReplicas=0, maxReplicas=1, scaleDownDelaySeconds=90)
        await fleet.create(cold)
    await until("all are at zero", lambda: all_settled(fleet, **dict.fromkeys(COLD, 0)))
    leader = await fleet.leader()
    others = [replica for replica in fleet.replicas if replica is not leader]
    before = await generations(fleet)
    async with Watched(fleet.kube, fleet.namespace) as watched, Callers() as callers:
        for name in COLD:
            for replica in others:
                callers.ask(replica, name, ASKED_PER_MODEL // len(others))
        await until("one is woken", lambda: any(watched.woken(name) for name in COLD))
        leader.serve.signal_all(signal.SIGSTOP)
        fleet.api.program.kill()
        await asyncio.sleep(OUTAGE_S / 3)
        leader.serve.signal_all(signal.SIGCONT)
        await asyncio.sleep(OUTAGE_S / 3)
        await leader.kill()
        await asyncio.sleep(OUTAGE_S / 3)
        answered = callers.answered
        fleet.api.program.start()
        back_s = time.monotonic()
        try:
            await until("every request is answered", callers.all_answered, 90)
        except AssertionError as error:
            error.add_note(f"waiting: {callers.waiting()}")
            for pod in (await fleet.kube.list(PODS, fleet.namespace))[0]:
                error.add_note(f"{pod['metadata']['name']}: {pod.get('status')}")
            raise
        print(
            f"{answered} of {callers.asked} answered while the API was away, "
            f"the last {passed_s(back_s):.1f} s after its start"
        )
        assert callers.failures == []
        await until("statuses are right", lambda: all_settled(fleet, **dict.fromkeys(COLD, 1)), 30)
        await until(
            "the watch is there too",
            lambda: all(watched.pods[n] and watched.woken(n) for n in COLD),
            30,
        )
        engines = [pod for name in COLD for pod in await pods(fleet.kube, name)]
        came = await received([f"{pod['status']['podIP']}:8000" for pod in engines])
    assert sorted(came) == sorted(callers.ids)
    assert {id_: at for id_, at in came.items() if len(at) > 1} == {}, "sent twice"
    assert {name: watched.woken(name) for name in COLD} == dict.fromkeys(COLD, 1)
    assert await generations(fleet) == {name: one + 1 for name, one in before.items()}
    assert {name: len(watched.pods[name]) for name in COLD} == dict.fromkeys(COLD, 1)
    assert watched.shrunk() == []


async def generations(fleet: Fleet) -> dict[str, int]:
    """How often each Model's spec was written, whether a watch saw it or not."""
    found, _ = await fleet.kube.list(MODELS, fleet.namespace)
    return {one["metadata"]["name"]: one["metadata"]["generation"] for one in found}


class Callers:
    """Requests to replicas that the test chooses; each is sent once."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.ids: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Callers:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()

    def stream(self, replica: Replica, name: str, tokens: int) -> asyncio.Task[Answer]:
        """One long answer."""
        asked = chat(self._session, replica.endpoint, name, "Tell me all.", max_tokens=tokens)
        task = asyncio.create_task(asked)
        self._tasks.append(task)
        return task

    @property
    def asked(self) -> int:
        return len(self._tasks)

    @property
    def answered(self) -> int:
        return sum(task.done() for task in self._tasks)

    def all_answered(self) -> bool:
        return self.answered == self.asked

    def waiting(self) -> dict[str, int]:
        """How many have no answer yet, by model and replica."""
        return Counter(task.get_name() for task in self._tasks if not task.done())

    def ask(self, replica: Replica, name: str, times: int) -> None:
        for _ in range(times):
            self.ids.append(f"{name}-{len(self.ids)}")
            asked = self._ask(replica, name, self.ids[-1])
            self._tasks.append(asyncio.create_task(asked, name=f"{name} at {replica.name}"))

    async def _ask(self, replica: Replica, name: str, request_id: str) -> None:
        question = {"role": "user", "content": request_id}
        body = {"model": name, "messages": [question], "max_tokens": 4}
        url = f"{replica.endpoint}/chat/completions"
        headers = {"X-Request-Id": request_id}
        try:
            async with self._session.post(url, json=body, headers=headers) as answer:
                text = await answer.text()
                if answer.status != 200 or answer.headers["X-Request-Id"] != request_id:
                    self.failures.append(f"{request_id}: {answer.status} {text}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.failures.append(f"{request_id}: {error!r}")


# -- keys ------------------------------------------------------------------------------------------


async def test_every_replica_sends_a_key_to_the_same_endpoint(small_fleet):
    """The replicas start at different times, and see pods come and go in different orders."""
    fleet = small_fleet
    first, second, third = fleet.replicas
    hashed = {"strategy": "PrefixHash", "prefixHash": {"meanLoadFactor": 100_000}}
    quick = ("--decode-tokens-per-second=0", "--prefill-tokens-per-second=0")
    await first.launch()
    await first.until_ready()
    await fleet.create(
        model("m", args=quick, autoscalingDisabled=True, replicas=2, loadBalancing=hashed)
    )
    await until("two engines are ready", lambda: fleet.settled("m", 2), 30)
    two = await homes(fleet, first)
    await fleet.kube.patch(MODELS, "m", {"spec": {"replicas": 4}}, subresource="scale")
    await second.launch()
    await second.until_ready()
    await until("four engines are ready", lambda: fleet.settled("m", 4), 30)
    four = await homes(fleet, first, second)
    assert not moved_to(two, four) & set(two.values()), "only new ones take keys"
    gone = next(pod for pod in await fleet.pods() if pod["metadata"]["name"] in two.values())
    await fleet.kube.delete(PODS, gone["metadata"]["name"], fleet.namespace)
    await third.launch()
    await third.until_ready()
    await until("it is replaced", lambda: is_replaced(fleet, gone), 30)
    last = await homes(fleet, *fleet.replicas)
    left = gone["metadata"]["name"]
    (came,) = set(last.values()) - (set(four.values()) - {left})
    assert moved_to({key: at for key, at in four.items() if at != left}, last) <= {came}
    print(
        f"of {KEYS} keys {differing(two, four)} moved at 2 → 4 engines, "
        f"{differing(four, last)} when one of 4 was replaced"
    )


def differing(before: dict[str, str], after: dict[str, str]) -> int:
    return sum(before[key] != after[key] for key in before)


def moved_to(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Where the keys are now that were elsewhere before."""
    return {after[key] for key in before if after[key] != before[key]}


async def is_replaced(fleet: Fleet, gone: dict) -> bool:
    uids = {pod["metadata"]["uid"] for pod in await pods(fleet.kube, "m")}
    return gone["metadata"]["uid"] not in uids and await fleet.settled("m", 4)


async def homes(fleet: Fleet, *replicas: Replica) -> dict[str, str]:
    """The endpoint of each of many prompts, which all replicas must agree on."""
    names = {
        f"{pod['status']['podIP']}:8000": pod["metadata"]["name"] for pod in await fleet.pods()
    }
    found = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=16)) as session:
        for replica in replicas:
            await until(f"{replica.name} knows the pods", lambda r=replica: knows(r, names))
            prompts = [f"{number} is the number of this prompt" for number in range(KEYS)]
            asked = [endpoint_of(session, replica, prompt) for prompt in prompts]
            endpoints = await asyncio.gather(*asked)
            found.append(dict(zip(prompts, (names[one] for one in endpoints), strict=True)))
    assert all(one == found[0] for one in found[1:])
    assert set(found[0].values()) == set(names.values()), "all have a part"
    return found[0]


async def endpoint_of(session: aiohttp.ClientSession, replica: Replica, prompt: str) -> str:
    question = {"role": "user", "content": prompt}
    body = {"model": "m", "messages": [question], "max_tokens": 1}
    async with session.post(f"{replica.endpoint}/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return answer.headers["X-Mock-Replica"]


async def knows(replica: Replica, names: dict[str, str]) -> bool:
    """Whether the pods of these names are the endpoints of every worker."""
    series = await replica.series()
    endpoints = {s.split('endpoint="')[1].split('"')[0] for s in series if s.startswith(IN_FLIGHT)}
    version = series["kubeai_routing_table_version"]
    applied = [v for s, v in series.items() if s.startswith("kubeai_worker_routing_table_version{")]
    return endpoints == set(names.values()) and all(one == version for one in applied)
