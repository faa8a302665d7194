"""Several replicas share their loads: no herding, and the caches stay warm."""

import msgspec
import pytest

from kubeai.simulation.engine import EngineConfig
from kubeai.simulation.replicas import Experiment
from kubeai.simulation.traffic import Shape

# 500 requests per second that last 0.2 s: a quarter begin and end between two reports.
FAST = Experiment(
    shape=Shape(prompt_tokens=100, turn_tokens=20, reply_tokens=10, think_s=0.1),
    concurrency=160,
    engine=EngineConfig(cache_blocks=1600, prefill_tokens_per_s=40000.0, decode_tokens_per_s=100.0),
    from_s=2.0,
    until_s=8.0,
)
SLOW = Shape(prompt_tokens=600, turn_tokens=60, reply_tokens=120, think_s=2.0)
MANY = Experiment(shape=SLOW, concurrency=128, from_s=10.0, until_s=40.0)
FEW = Experiment(shape=SLOW, concurrency=24, from_s=10.0, until_s=60.0)


def test_eight_replicas_with_delayed_reports_do_not_herd():
    one, eight = FAST.run(), FAST.run(replicas=8)
    herding = FAST.run(replicas=8, expected=False)
    assert one.imbalance_mean < 1.1
    assert eight.imbalance_mean < 1.25
    assert eight.imbalance_p99 < 1.5
    assert herding.imbalance_mean > 1.4, "otherwise this test shows nothing"


@pytest.mark.parametrize(
    ("replicas", "gained"), [(2, 0.03), pytest.param(8, 0.3, marks=pytest.mark.slow)]
)
def test_replicas_with_shared_loads_balance_nearly_as_well_as_one(replicas, gained):
    # Work is balanced, and requests, which are counted here, only as far as they have equal work.
    one, shared = FEW.run(), FEW.run(replicas=replicas)
    alone = FEW.run(replicas=replicas, shared=False)
    assert shared.imbalance_mean < one.imbalance_mean + 0.2
    assert alone.imbalance_mean > shared.imbalance_mean + gained


@pytest.mark.slow
def test_bounds_on_shared_loads_keep_conversations_on_their_cached_endpoint():
    one, eight = (MANY.run(replicas=n, strategy="PrefixHash") for n in (1, 8))
    alone = MANY.run(replicas=8, strategy="PrefixHash", shared=False)
    assert eight.hit_rate > one.hit_rate - 0.05
    assert alone.hit_rate < eight.hit_rate - 0.1


def test_the_same_seed_gives_the_same_results():
    short = msgspec.structs.replace(MANY, from_s=1.0, until_s=3.0)
    assert short.run(replicas=2, seed=7) == short.run(replicas=2, seed=7)
    assert short.run(replicas=2, seed=7) != short.run(replicas=2, seed=8)
