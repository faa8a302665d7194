"""Several replicas share their loads: no herd, and the caches stay warm."""

import pytest

from kubeai.simulation.engine import EngineConfig
from kubeai.simulation.replicas import Setting, play

# 500 requests a second that last 0.2 s: a fourth of them begin and end between two tellings.
FAST = {
    "conversations": 160,
    "duration_s": 8.0,
    "warm_up_s": 2.0,
    "think_s": 0.1,
    "prompt_tokens": 100,
    "turn_tokens": 20,
    "reply_tokens": 10,
    "engine": EngineConfig(
        cache_blocks=1600, prefill_tokens_per_s=40000.0, decode_tokens_per_s=100.0
    ),
}
MANY = {"duration_s": 40.0, "warm_up_s": 10.0}
FEW = {"conversations": 24, "duration_s": 100.0, "warm_up_s": 10.0}


def test_eight_replicas_that_see_each_other_late_do_not_herd():
    one, eight = play(Setting(**FAST)), play(Setting(replicas=8, **FAST))
    herding = play(Setting(replicas=8, expected=False, **FAST))
    assert one.imbalance_mean < 1.1
    assert eight.imbalance_mean < 1.25
    assert eight.imbalance_p99 < 1.5
    assert herding.imbalance_mean > 1.4, "else this shows nothing"


@pytest.mark.parametrize(("replicas", "gained"), [(2, 0.1), (8, 0.4)])
def test_replicas_with_one_view_balance_nearly_as_one_does(replicas, gained):
    one, shared = play(Setting(**FEW)), play(Setting(replicas=replicas, **FEW))
    alone = play(Setting(replicas=replicas, shared=False, **FEW))
    assert shared.imbalance_mean < one.imbalance_mean + 0.15
    assert alone.imbalance_mean > shared.imbalance_mean + gained


def test_bounds_for_all_together_keep_conversations_where_their_cache_is():
    one, eight = (play(Setting(replicas=n, strategy="PrefixHash", **MANY)) for n in (1, 8))
    alone = play(Setting(replicas=8, strategy="PrefixHash", shared=False, **MANY))
    assert eight.hit_rate > one.hit_rate - 0.05
    assert alone.hit_rate < eight.hit_rate - 0.1


def test_the_same_seed_gives_the_same_figures():
    setting = Setting(replicas=2, duration_s=5.0, warm_up_s=1.0, seed=7)
    assert play(setting) == play(setting)
    assert play(setting) != play(Setting(replicas=2, duration_s=5.0, warm_up_s=1.0, seed=8))
