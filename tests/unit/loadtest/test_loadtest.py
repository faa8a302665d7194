"""The decisions of `kubeai bench` that need no traffic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kubeai.loadtest import options, saturation
from kubeai.loadtest.messages import Batch, Go, Stop, frame
from kubeai.loadtest.options import OptionError
from kubeai.loadtest.progress import Progress
from kubeai.loadtest.run import client_line
from kubeai.loadtest.saturation import Usage
from kubeai.loadtest.scenario import (
    ENDLESS,
    ClosedLoop,
    OpenLoop,
    Scenario,
    ShareGpt,
    Synthetic,
    TraceReplay,
)
from kubeai.simulation.results import Gaps, Measurement
from kubeai.simulation.traffic import SHAPES, Arrivals, Shape

SMALL = Shape(conversations=11, turns=2, prompt_tokens=5, turn_tokens=5)


def scenario(**fields: Any) -> Scenario:
    defaults = {"url": "http://x", "model": "m", "traffic": Synthetic("chat", SMALL, 3)}
    return Scenario(**(defaults | {"load": ClosedLoop(5)} | fields))


# -- whether the client was the bottleneck ---------------------------------------------------------


def usage(*shares: float, late_s: float = 0.001) -> Usage:
    """The usage of a generator that used these shares of a core, second by second."""
    one, cpu_s = Usage(), 0.0
    for second, share in enumerate(shares, 1):
        cpu_s += share
        one.note(batch(float(second), [], 1000 * second, cpu_s, [late_s] * 10))
    return one


def batch(
    at_s: float,
    measurements: list[Measurement],
    tokens: int,
    cpu_s: float = 0.1,
    late_s: list[float] = (),
) -> Batch:
    return Batch(at_s, measurements, Gaps(), 7, tokens, tokens, cpu_s, cpu_s / 2, list(late_s), {})


def test_an_idle_client_causes_no_warning():
    assert saturation.warnings([usage(*[0.8] * 20), usage(*[0.1] * 20)], [0.001] * 100) == []


def test_a_process_that_saturates_its_core_causes_a_warning():
    (warning,) = saturation.warnings([usage(*[0.2] * 20), usage(*[0.99] * 20)], [0.001])
    assert warning.startswith("process 1 used over 85% of a core in 20 of 20 seconds")
    assert "--processes" in warning


def test_saturation_at_the_end_of_a_ramp_is_noticed():
    assert saturation.warnings([usage(*[0.3] * 16, *[0.95] * 4)], [])


def test_a_second_of_new_connections_is_not_saturation():
    assert saturation.warnings([usage(1.0, *[0.3] * 19)], []) == []


def test_the_warm_up_does_not_count():
    shares = [*[1.0] * 5, *[0.3] * 10]
    assert saturation.warnings([usage(*shares)], [])
    assert saturation.warnings([usage(*shares)], [], warm_up_s=5.0) == []


def test_requests_sent_late_cause_a_warning():
    late_s = [0.0] * 98 + [0.07] * 2
    (warning,) = saturation.warnings([usage(0.3)], late_s)
    assert warning.startswith("requests were sent 70 ms late (p99)")
    assert saturation.warnings([usage(0.3)], [0.0] * 199 + [9.0]) == []


def test_a_late_event_loop_causes_a_warning():
    (warning,) = saturation.warnings([usage(*[0.3] * 5, late_s=0.2)], [])
    assert warning.startswith("timers ran 200 ms late")


def test_the_cpu_cost_sums_all_processes_and_the_share_is_the_busiest_ones():
    cost = saturation.cost([usage(*[0.2] * 10), usage(*[0.6] * 10)])
    assert cost == {
        "cpu_us_per_chunk": 400.0,
        "kernel_us_per_chunk": 200.0,
        "cpu_share": 0.6,
        "processes": 2,
        "chunks": 20_000,
    }
    assert client_line(cost) == (
        "client: 400.0 µs of CPU per chunk (200.0 in the kernel), 60 % of a core, 2 processes"
    )
    nothing = saturation.cost([Usage()])
    assert client_line(nothing) == "client: 0 % of a core, 1 process"


# -- scenarios -------------------------------------------------------------------------------------


@pytest.mark.parametrize("generators", [1, 2, 3])
@pytest.mark.parametrize("load", [ClosedLoop(5), OpenLoop(Arrivals(per_s=9.0))])
def test_several_generators_together_send_the_same_load_as_one(generators, load):
    alone = dict(scenario(load=load).conversations())
    shares = [scenario(load=load, generator=n, generators=generators) for n in range(generators)]
    together = [pair for share in shares for pair in share.conversations()]
    assert len(together) == len(alone) == SMALL.conversations
    assert dict(together) == alone
    assert all((one.at_s is None) == isinstance(load, ClosedLoop) for one in alone.values())
    assert sum(share.share(7) for share in shares) == 7


def test_a_trace_starts_at_once_and_is_replayed_at_the_given_speed(tmp_path):
    file = tmp_path / "trace"
    lines = [{"timestamp": 7000 + 500 * at, "input_length": 9} for at in range(5)]
    file.write_text("\n".join(map(json.dumps, lines)))
    traced = scenario(
        traffic=TraceReplay(str(file), 2.0), load=OpenLoop(), generator=1, generators=2
    )
    assert [(number, one.at_s) for number, one in traced.conversations()] == [(1, 0.25), (3, 0.75)]


def test_a_traces_limit_on_requests_holds_for_all_generators_together(tmp_path):
    file = tmp_path / "trace"
    lines = [{"timestamp": at, "input_length": 3, "hash_ids": [at, 1]} for at in range(5)]
    file.write_text("\n".join(map(json.dumps, lines)))
    traffic = options.traffic(**TRAFFIC, trace=file, trace_requests=3, trace_block_tokens=2)
    found = [
        pair
        for number in range(2)
        for pair in scenario(
            traffic=traffic, load=OpenLoop(), generator=number, generators=2
        ).conversations()
    ]
    assert sorted(number for number, _ in found) == [0, 1, 2]
    assert len({one.turns[0].text for _, one in found}) == 3
    assert len({one.turns[0].text[8:] for _, one in found}) == 1, "the second block"


def test_messages_pass_through_a_pipe_unchanged():
    first = scenario(traffic=ShareGpt("/x", 2), load=OpenLoop(Arrivals(per_s=1.0)))
    for message, kind in ((first, Scenario), (Go(5.0), Go | Stop), (Stop(), Go | Stop)):
        framed = frame(message)
        assert int.from_bytes(framed[:4], "big") == len(framed) - 4
        assert msgspec.msgpack.decode(framed[4:], type=kind) == message


# -- options ---------------------------------------------------------------------------------------


TRAFFIC: dict[str, Any] = {
    "shape": None,
    "changes": {},
    "seed": 1,
    "endless": False,
    "sharegpt": None,
    "messages_min": 2,
    "speed": 1.0,
}


def made(**fields: Any) -> Synthetic | ShareGpt | TraceReplay:
    return options.traffic(**(TRAFFIC | {"trace": None} | fields))


def test_options_override_the_preset_shape():
    found = made(shape="rag", changes={"turns": 3, "system_tokens": None})
    assert found == Synthetic("rag", msgspec.structs.replace(SHAPES["rag"], turns=3), 1)


def test_a_load_with_its_own_end_has_unlimited_conversations():
    assert made(endless=True).shape.conversations == ENDLESS
    assert made(endless=True, changes={"conversations": 5}).shape.conversations == 5


def test_only_one_source_of_traffic_may_be_given():
    with pytest.raises(OptionError, match="--trace: cannot be combined with --sharegpt"):
        made(sharegpt=Path("a"), trace=Path("b"))
    with pytest.raises(OptionError, match="--speed: must be more than 0"):
        made(trace=Path("b"), speed=0.0)


@pytest.mark.parametrize("option", ["trace_block_tokens", "trace_requests"])
def test_options_of_a_trace_require_one(option):
    assert made(trace=Path("b"), **{option: 3}).path == "b"
    with pytest.raises(OptionError, match=f"--{option.replace('_', '-')}: requires --trace"):
        made(**{option: 3})


def load(**fields: Any) -> ClosedLoop | OpenLoop:
    names = ("concurrency", "rate", "arrivals", "burst", "until_rate", "ramp_time")
    return options.load(**(dict.fromkeys(names) | {"timed": False} | fields))


def test_the_load_is_closed_unless_a_rate_or_times_are_given():
    assert load() == ClosedLoop(32)
    assert load(timed=True) == OpenLoop()
    assert load(timed=True, concurrency=4) == ClosedLoop(4)
    assert load(rate=4.0) == OpenLoop(Arrivals(per_s=4.0))
    ramp = load(rate=4.0, arrivals="ramp", until_rate=8.0, ramp_time="2m")
    assert ramp == OpenLoop(Arrivals(per_s=4.0, kind="ramp", until_per_s=8.0, ramp_s=120.0))


@pytest.mark.parametrize(
    "fields", [{"rate": 0.0}, {"burst": 3}, {"rate": 1.0, "arrivals": "x"}, {"ramp_time": "1s"}]
)
def test_an_invalid_load_is_rejected(fields):
    with pytest.raises(OptionError, match=r"^--"):
        load(**fields)


def test_a_key_is_sent_as_a_bearer_token_unless_a_header_is_given():
    assert options.headers([], "k") == (("Authorization", "Bearer k"),)
    assert options.headers(["authorization: Basic x"], "k") == (("authorization", "Basic x"),)
    for line in ("x", ": y", "a: b\r\nc: d"):
        with pytest.raises(OptionError, match="--header"):
            options.headers([line], None)


# -- progress --------------------------------------------------------------------------------------


def test_progress_shows_total_counts_and_recent_rates():
    progress = Progress()
    good = Measurement(0, 0, 0.0, 0.0, first_s=0.2, ended_s=1.0)
    progress.note(0, batch(1.0, [good, Measurement(1, 0, 0.0, 0.0, error="cut")], 1000))
    progress.note(1, batch(1.0, [], 1000))
    line = progress.line(2.0)
    assert line == ("2 s, 2 done, 1 failed, 14 in flight, 1,000 tokens/s, first token after 200 ms")
    progress.gone(1)
    assert progress.line(60.0) == "60 s, 2 done, 1 failed, 7 in flight, 0 tokens/s"
