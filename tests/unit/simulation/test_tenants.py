"""Tenants that share a Model, in virtual time, with the gateway's own queue and picks."""

from __future__ import annotations

import math

import pytest

from kubeai.simulation.engine import EngineConfig
from kubeai.simulation.tenants import Mix, Tenant, simulate

# Each request takes a second: a token of the output takes 0.1 s, the prompt next to nothing.
ENGINE = EngineConfig(prefill_tokens_per_s=0.0, decode_tokens_per_s=10.0)
SERVICE_S = 1.0


def tenant(name, **values):
    return Tenant(name=name, output_tokens=10, spread=0.0, **values)


def mix(*tenants, engines=1, capacity=4, **values):
    return Mix(tenants=tenants, engines=engines, capacity=capacity, engine=ENGINE, **values)


def waits(asks, name):
    return [ask.sent_s - ask.came_s for ask in asks if ask.tenant == name]


def test_ten_thousand_requests_delay_another_tenants_by_at_most_one_service():
    asks = simulate(
        mix(tenant("many", at_once=10_000), tenant("one", per_s=0.5, from_s=5.0), until_s=60.0),
        "fair",
    )
    assert max(waits(asks, "one")) <= SERVICE_S + 1e-6
    late = simulate(mix(tenant("many", at_once=1000), tenant("one", at_once=1, from_s=5.0)), "fifo")
    assert max(waits(late, "one")) > 100 * SERVICE_S


def test_a_cold_model_serves_each_tenant_from_the_start():
    asks = simulate(
        mix(
            tenant("many", at_once=500),
            tenant("one", at_once=1, from_s=10.0),
            tenant("first", at_once=1, from_s=20.0, priority=1),
            ready_s=30.0,
        ),
        "fair",
    )
    assert waits(asks, "one") == [pytest.approx(20.0)]
    assert waits(asks, "first") == [pytest.approx(10.0)]


def test_no_engine_has_more_requests_than_its_capacity():
    asks = simulate(mix(tenant("a", at_once=100), tenant("b", at_once=100), engines=2), "fair")
    changes = sorted([(ask.sent_s, 1) for ask in asks] + [(ask.done_s, -1) for ask in asks])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    assert most == 8


def test_tenants_get_equal_work_whatever_their_requests_are_like():
    """A tenant with long prompts gets fewer requests served, not more of the engines."""
    asks = simulate(
        mix(
            tenant("short", at_once=3000, prompt_tokens=100),
            tenant("long", at_once=3000, prompt_tokens=1000),
        ),
        "fair",
    )
    work = {
        name: sum(
            ask.prompt_tokens + 256 for ask in asks if ask.tenant == name and ask.sent_s < 200
        )
        for name in ("short", "long")
    }
    assert work["short"] == pytest.approx(work["long"], rel=0.02)


def test_a_queue_wastes_no_time_of_the_engines():
    both = mix(tenant("a", at_once=400), tenant("b", per_s=2.0), until_s=60.0)
    ends = {
        policy: max(ask.done_s for ask in simulate(both, policy)) for policy in ("fifo", "fair")
    }
    assert ends["fair"] == pytest.approx(ends["fifo"], rel=0.01)
    assert not any(math.isnan(ask.done_s) for ask in simulate(both, "engine"))
