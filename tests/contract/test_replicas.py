"""Three `kubeai serve` at once, and what goes wrong around them, under load.

Clients see them as through a Kubernetes Service (fleets.py), and every request that fails is a
failure: none is tried again.
"""

from __future__ import annotations

import asyncio
import time

import pytest
from fleets import Fleet, Service, Traffic, Watched
from harness import model, until
from machines import machine
from servers import CONTROL_PLANE, ApiServer, assets, cluster, install_models

pytestmark = pytest.mark.timeout(150)
ENGINES = 3
SLOW = ("--decode-tokens-per-second=10", "--max-batch=256")
STREAMS = 50
STREAM_TOKENS = 70  # 7 s
PER_S = 100


@pytest.fixture(scope="module")
def real_api(tmp_path_factory) -> ApiServer:
    if assets(*CONTROL_PLANE) is None:
        pytest.skip("KUBEBUILDER_ASSETS holds no whole control plane")
    with cluster(tmp_path_factory.mktemp("cluster") / "servers") as server:
        install_models(server)
        yield server


@pytest.fixture
async def fleet(real_api, tmp_path) -> Fleet:
    async with machine(real_api, tmp_path, Fleet) as fleet:
        yield fleet


def chat_model(**spec):
    """It has its engines from the start, and keeps them."""
    return model("chat", args=SLOW, minReplicas=ENGINES, maxReplicas=ENGINES, **spec)


def load(fleet: Fleet, service: Service) -> Traffic:
    return Traffic(
        service,
        fleet.port,
        "chat",
        streams=STREAMS,
        stream_tokens=STREAM_TOKENS,
        per_s=PER_S,
    )


@pytest.mark.cluster
async def test_a_rolling_restart_under_load_fails_nothing(fleet):
    await fleet.launch()
    await fleet.create(chat_model())
    await until("the engines are ready", lambda: fleet.settled("chat", ENGINES), 40)
    async with Service(fleet.replicas) as service, load(fleet, service) as traffic:
        await until("all streams have begun", lambda: traffic.asked > PER_S)
        for replica in fleet.replicas:
            began_s = time.monotonic()
            assert await replica.stop() == 0
            stopped_s = time.monotonic()
            await replica.launch()
            await replica.until_ready()
            print(f"{replica.name}: {stopped_s - began_s:.1f} s to stop, "
                  f"{time.monotonic() - stopped_s:.1f} s to be ready again")
    print(traffic.figures())
    print(*traffic.failures, sep="\n")
    assert traffic.failures == []
