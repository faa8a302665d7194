"""Engines behind a gateway in virtual time: invariants for any traffic."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest

from kubeai.simulation import results, traffic
from kubeai.simulation.cluster import simulate
from kubeai.simulation.engine import EngineConfig
from kubeai.simulation.presets import PRESETS
from kubeai.simulation.setting import STRATEGIES, Setting
from kubeai.simulation.traffic import Conversation, Shape, Turn

ENGINE = EngineConfig(cache_blocks=1200, decode_tokens_per_s=0.0, weights_s=0.02)
TALKS = Shape(conversations=60, turns=4, reply_tokens=30)


def run(conversations=None, request_times=None, **setting):
    setting = Setting(**({"engine": ENGINE, "engines": 4, "concurrency": 20} | setting))
    conversations = conversations or traffic.generate(TALKS, 1)
    return simulate(setting, conversations, request_times=request_times)


def in_flight_most(result):
    changes = [(one.sent_s, 1) for one in result.measurements]
    changes += [(one.ended_s, -1) for one in result.measurements]
    return max(itertools.accumulate(change for _, change in sorted(changes)))


def figures(result):
    return results.summarize("r", {}, result.measurements, result.gaps).summary


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_turn_is_sent_once_and_completed(strategy):
    result = run(strategy=strategy)
    expected = list(traffic.generate(TALKS, 1))
    asked = {(one.conversation, one.turn): one for one in result.measurements}
    assert len(asked) == len(result.measurements) == 60 * 4
    for (conversation, turn), measurement in asked.items():
        assert not measurement.error
        assert measurement.output_tokens == expected[conversation].turns[turn].reply_tokens
        assert measurement.due_s <= measurement.sent_s < measurement.first_s <= measurement.ended_s
        assert 0 <= measurement.cached_tokens < measurement.prompt_tokens


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_settings_give_the_same_records(strategy):
    assert run(strategy=strategy).measurements == run(strategy=strategy).measurements


def test_a_turn_starts_after_the_previous_response_and_the_think_time():
    shape = Shape(conversations=20, turns=3, think_s=5.0)
    expected = list(traffic.generate(shape, 1))
    turns = defaultdict(dict)
    for measurement in run(traffic.generate(shape, 1)).measurements:
        turns[measurement.conversation][measurement.turn] = measurement
    for number, of in turns.items():
        for turn in (1, 2):
            think_s = expected[number].turns[turn].think_s
            assert of[turn].due_s == pytest.approx(of[turn - 1].ended_s + think_s)


def test_the_configured_number_of_conversations_runs_concurrently():
    result = run(concurrency=7)
    changes = sorted(
        [(r.due_s, 1) for r in result.measurements if r.turn == 0]
        + [(r.ended_s, -1) for r in result.measurements if r.turn == TALKS.turns - 1]
    )
    level, most = 0, 0
    for _, change in sorted(changes, key=lambda pair: (pair[0], pair[1])):
        level += change
        most = max(most, level)
    assert most == 7


def test_conversations_with_start_times_start_on_time():
    times = [0.5 * n for n in range(60)]
    result = run(traffic.timed(traffic.generate(TALKS, 1), times), engines=1)
    first = sorted(
        measurement.due_s for measurement in result.measurements if measurement.turn == 0
    )
    assert first == times


def test_an_overloaded_client_is_late_and_its_send_time_hides_the_delay():
    result = run(client_per_s=5.0, concurrency=60)
    found = figures(result)
    assert found["late_ms"]["p90"] > 3_000
    assert found["ttft_ms"]["mean"] > 3_000 > found["ttft_sent_ms"]["mean"]
    paced = figures(run(paced_per_s=5.0, concurrency=60))
    assert paced["late_ms"]["p99"] == 0.0
    assert paced["ttft_ms"] == paced["ttft_sent_ms"] == found["ttft_sent_ms"]


def test_cache_hits_increase_with_the_routers_information():
    hits = {s: figures(run(strategy=s, concurrency=40))["hit_rate"] for s in STRATEGIES}
    assert hits["Service"] < hits["PrefixHash"] <= hits["Oracle"] + 0.02
    assert hits["LeastLoad"] < hits["PrefixHash"]


def test_a_request_too_large_for_any_engine_is_rejected_and_the_others_continue():
    long = Conversation((Turn("x" * 100_000, 10), Turn("more", 10)))
    short = Conversation((Turn("hello", 10),))
    result = run([long, short], engines=1)
    errors = [(measurement.conversation, measurement.error) for measurement in result.measurements]
    assert sorted(errors) == [(0, "status 400"), (0, "status 400"), (1, "")]


def test_embeddings_generate_no_tokens_and_share_no_cache():
    shape = Shape(conversations=30, turns=1, prompt_tokens=200, reply_tokens=0, kind="embeddings")
    result = run(traffic.generate(shape, 1))
    assert len(result.measurements) == 30
    for measurement in result.measurements:
        assert (measurement.output_tokens, measurement.cached_tokens, measurement.error) == (
            0,
            0,
            "",
        )
        assert math.isnan(measurement.first_s)


def test_gaps_add_up_to_the_time_from_first_to_last_token():
    result = run(engines=1, concurrency=5)
    assert result.preemptions == 0
    between_s = sum(
        measurement.ended_s - measurement.first_s for measurement in result.measurements
    )
    assert result.gaps.total_s == pytest.approx(between_s, rel=1e-6)
    tokens = sum(measurement.output_tokens - 1 for measurement in result.measurements)
    assert sum(result.gaps.counts.values()) == tokens


def test_a_preset_reproduces_the_latencies_of_its_source():
    """NVIDIA's figures for one request at a time: 407 ms to the first token, then 18.6 ms each."""
    shape = Shape(conversations=5, turns=1, prompt_tokens=5000, reply_tokens=500, spread=0.0)
    engine = PRESETS["llama-3.3-70b-fp8-h100x2"]
    found = figures(run(traffic.generate(shape, 1), engine=engine, engines=1, concurrency=1))
    assert found["ttft_ms"]["mean"] == pytest.approx(407, rel=0.1)
    assert found["tpot_ms"]["mean"] == pytest.approx(18.6, rel=0.03)
    assert not math.isnan(found["tokens_per_s"])


# -- rates of requests -----------------------------------------------------------------------------


def test_requests_start_at_their_times_as_the_next_turn_that_waits_or_another_conversation():
    times = [0.5 * number for number in range(100)]
    result = run(request_times=iter(times))
    assert [one.due_s for one in result.measurements] == times
    assert {one.queued_s for one in result.measurements} == {0.0}
    turns = defaultdict(list)
    for one in result.measurements:
        turns[one.conversation].append(one)
    assert max(map(len, turns.values())) == 4
    for ones in turns.values():
        assert [one.turn for one in ones] == list(range(len(ones)))
        for before, after in itertools.pairwise(ones):
            assert before.ended_s <= after.due_s
    # With responses of about a second, each conversation is continued before another one starts.
    assert len(turns) < 40


def test_all_requests_start_at_once_without_a_rate():
    result = run(request_times=itertools.repeat(0.0, 50))
    assert [(one.due_s, one.turn) for one in result.measurements] == [(0.0, 0)] * 50


def test_the_limit_on_requests_in_flight_holds_for_any_load():
    rate = run(request_times=iter([0.01 * n for n in range(200)]), in_flight_max=7)
    at_once = run(request_times=itertools.repeat(0.0, 200), in_flight_max=7)
    closed = run(concurrency=20, in_flight_max=7)
    for result, count in ((rate, 200), (at_once, 200), (closed, 240)):
        assert len(result.measurements) == count
        assert in_flight_most(result) == 7
    waited = [one for one in rate.measurements if one.queued_s]
    assert len(waited) > 100
    for one in waited:  # it is due when a place is free, not before
        assert one.due_s - one.queued_s == pytest.approx(0.01 * rate.measurements.index(one))
        assert one.sent_s == one.due_s


def test_a_rate_of_requests_ends_with_the_conversations():
    result = run(request_times=itertools.repeat(0.0), in_flight_max=5)
    assert len(result.measurements) == 240
    assert in_flight_most(result) == 5


def test_think_time_keeps_a_conversation_from_the_next_request():
    turns = (Turn("a", 1), Turn("b", 1, think_s=10.0))
    result = run(
        [Conversation(turns), Conversation(turns)], request_times=iter([0.0, 5.0, 6.0, 30.0])
    )
    due = [(one.conversation, one.turn, one.due_s) for one in result.measurements]
    assert due[:2] == [(0, 0, 0.0), (1, 0, 5.0)]
    (_, _, third_s), (_, _, fourth_s) = due[2:]
    assert [one[:2] for one in due[2:]] == [(0, 1), (1, 1)]
    assert third_s == pytest.approx(10.0, abs=0.2), "no other conversation is left"
    assert fourth_s == 30.0
