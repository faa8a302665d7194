"""The decisions of `kubeai bench` that need no traffic."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from kubeai.errors import KubeAIError
from kubeai.loadtest import arguments, commands, options, saturation
from kubeai.loadtest.arguments import OptionError
from kubeai.loadtest.messages import Batch, Go, Stop, frame
from kubeai.loadtest.progress import Progress
from kubeai.loadtest.reports import output
from kubeai.loadtest.run import client_line
from kubeai.loadtest.saturation import GeneratorUsage
from kubeai.loadtest.scenario import (
    ENDLESS,
    ClosedLoop,
    Exact,
    OpenLoop,
    RequestLoop,
    Scenario,
    ShareGpt,
    Synthetic,
    TraceReplay,
)
from kubeai.simulation.results import Gaps, Limit, Measurement, Objective, Selection
from kubeai.simulation.traffic import SHAPES, Arrivals, RandomLengths, Shape

SMALL = Shape(conversations=11, turns=2, prompt_tokens=5, turn_tokens=5)


def scenario(**fields: Any) -> Scenario:
    defaults = {"url": "http://x", "model": "m", "traffic": Synthetic("chat", SMALL, 3)}
    return Scenario(**(defaults | {"load": ClosedLoop(5)} | fields))


# -- whether the client was the bottleneck ---------------------------------------------------------


def usage(*shares: float, late_s: float = 0.001) -> GeneratorUsage:
    """The usage of a generator that used these shares of a core, second by second."""
    one, cpu_s = GeneratorUsage(), 0.0
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
    nothing = saturation.cost([GeneratorUsage()])
    assert client_line(nothing) == "client: 0 % of a core, 1 process"


# -- scenarios -------------------------------------------------------------------------------------


@pytest.mark.parametrize("generators", [1, 2, 3])
@pytest.mark.parametrize("load", [ClosedLoop(5), OpenLoop(Arrivals(per_s=9.0)), RequestLoop()])
def test_several_generators_together_send_the_same_load_as_one(generators, load):
    alone = dict(scenario(load=load).conversations())
    shares = [scenario(load=load, generator=n, generators=generators) for n in range(generators)]
    together = [pair for share in shares for pair in share.conversations()]
    assert len(together) == len(alone) == SMALL.conversations
    assert dict(together) == alone
    assert all((one.at_s is None) != isinstance(load, OpenLoop) for one in alone.values())
    assert sum(share.share(7) for share in shares) == 7


def test_several_generators_share_the_times_of_requests():
    load = RequestLoop(Arrivals(per_s=4.0))
    alone = list(scenario(load=load, requests_max=11).request_times())
    assert len(alone) == 11
    assert alone[-1] == pytest.approx(11 / 4)
    shares = [
        list(scenario(load=load, requests_max=11, generator=n, generators=3).request_times())
        for n in range(3)
    ]
    assert [len(share) for share in shares] == [4, 4, 3]
    assert sorted(itertools.chain(*shares)) == alone
    assert list(scenario(load=RequestLoop(), requests_max=3).request_times()) == [0.0] * 3


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
    traffic = made(trace=file, trace_requests=3, trace_block_tokens=2)
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


def made(*, endless: bool = False, **fields: Any) -> Any:
    return options.traffic(arguments.Traffic(**fields), endless=endless)


def test_options_override_the_preset_shape():
    found = made(shape="rag", turns=3, think_time="2s")
    shape = msgspec.structs.replace(SHAPES["rag"], turns=3, think_s=2.0)
    assert found == Synthetic("rag", shape, 1)


def test_a_load_with_its_own_end_has_unlimited_conversations():
    assert made(endless=True).shape.conversations == ENDLESS
    assert made(endless=True, conversations=5).shape.conversations == 5


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


def test_lengths_make_the_traffic_one_of_random_lengths():
    assert made(shape="random") == Exact(RandomLengths(), 1)
    assert made(input_len=64, seed=5) == Exact(RandomLengths(input_len=64), 5)
    found = made(output_len=9, random_range_ratio="0.5", random_prefix_len=100)
    assert found.lengths == RandomLengths(
        output_len=9, input_ratio=0.5, output_ratio=0.5, prefix_len=100
    )
    found = made(random_range_ratio='{"input": 0.2}').lengths
    assert (found.input_ratio, found.output_ratio) == (0.2, 0.0)
    assert made(shape="embeddings", input_len=64).lengths.kind == "embeddings"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input_len": 7}, "--input-len: the shortest prompt would have 7 tokens, .* takes 7"),
        ({"input_len": 9, "random_range_ratio": "0.3"}, "--input-len: the shortest .* 6 tokens"),
        ({"input_len": 64, "turns": 2}, "--turns: cannot be combined with --input-len"),
        ({"shape": "random", "turns": 2}, "--turns: cannot be combined with --shape random"),
        ({"output_len": 64, "shape": "rag"}, "--output-len: cannot be combined with --shape rag"),
        ({"output_len": 64, "shape": "embeddings"}, "--output-len: embeddings have no output"),
        ({"input_len": 64, "trace": Path("t")}, "--input-len: cannot be combined with --trace"),
        ({"random_range_ratio": "1"}, "--random-range-ratio: '1' is neither"),
        ({"random_range_ratio": '{"inputs": 0.1}'}, "--random-range-ratio: .* is neither"),
    ],
)
def test_lengths_that_cannot_be_are_refused(fields, words):
    with pytest.raises(OptionError, match=words):
        made(**fields)


def load(*, timed: bool = False, exact: bool = False, **fields: Any) -> Any:
    return options.load(arguments.Load(**fields), timed=timed, exact=exact)


def test_the_load_is_closed_unless_a_rate_or_times_are_given():
    assert load() == ClosedLoop(32)
    assert load(timed=True) == OpenLoop()
    assert load(timed=True, concurrency="4") == ClosedLoop(4)
    assert load(rate=4.0) == OpenLoop(Arrivals(per_s=4.0))
    ramp = load(rate=4.0, arrivals="ramp", until_rate=8.0, ramp_time="2m")
    assert ramp == OpenLoop(Arrivals(per_s=4.0, kind="ramp", until_per_s=8.0, ramp_s=120.0))


def test_options_that_count_requests_make_the_load_one_of_requests():
    assert load(num_prompts=5) == RequestLoop()
    assert load(max_concurrency=5) == RequestLoop()
    assert load(request_rate=math.inf) == RequestLoop()
    assert load(exact=True) == RequestLoop()
    assert load(request_rate=4.0, burstiness=0.5) == RequestLoop(
        Arrivals(per_s=4.0, burstiness=0.5)
    )
    assert load(timed=True, max_concurrency=5) == OpenLoop(), "a trace keeps its times"
    assert load(concurrency="4", num_prompts=9, max_concurrency=2) == ClosedLoop(4)


def prompts(*, bounded: bool = False, exact: bool = False, **fields: Any) -> int | None:
    return options.num_prompts(arguments.Load(**fields), bounded=bounded, exact=exact)


def test_a_load_of_requests_has_a_thousand_unless_something_else_ends_it():
    assert prompts() is None
    assert prompts(exact=True) == prompts(request_rate=3.0) == prompts(max_concurrency=3) == 1000
    assert prompts(request_rate=3.0, bounded=True) is None
    assert prompts(request_rate=3.0, num_prompts=7, bounded=True) == 7
    assert prompts(concurrency="3", max_concurrency=3) is None


def test_an_endless_load_that_starts_at_once_is_refused():
    endless = made(endless=True)
    with pytest.raises(OptionError, match="--duration: requires a finite --request-rate"):
        options.check_bounds(scenario(traffic=endless, load=RequestLoop()))
    options.check_bounds(scenario(traffic=endless, load=RequestLoop(), in_flight_max=3))
    options.check_bounds(scenario(traffic=endless, load=RequestLoop(), requests_max=3))
    options.check_bounds(scenario(load=RequestLoop()))


@pytest.mark.parametrize(
    "fields",
    [
        {"rate": 0.0},
        {"request_rate": -1.0},
        {"request_rate": 1.0, "rate": 1.0},
        {"request_rate": 1.0, "concurrency": "3"},
        {"request_rate": math.inf, "burstiness": 2.0},
        {"request_rate": 1.0, "burstiness": 0.0},
        {"request_rate": 1.0, "burstiness": 2.0, "arrivals": "constant"},
        {"burst": 3},
        {"rate": 1.0, "arrivals": "x"},
        {"ramp_time": "1s"},
        {"concurrency": ""},
    ],
)
def test_an_invalid_load_is_rejected(fields):
    with pytest.raises(OptionError, match=r"^--"):
        load(**fields)


def test_metrics_and_percentiles_can_be_selected():
    assert options.selection(arguments.Judging()) == Selection()
    found = options.selection(
        arguments.Judging(percentile_metrics="itl, e2el", metric_percentiles="99.9,50")
    )
    assert found == Selection(("itl", "e2el"), (50.0, 99.9))
    limits = options.limits(["ttft:p75:500"])
    assert options.with_limits(found, limits) == Selection(
        ("itl", "e2el", "ttft"), (50.0, 75.0, 99.9)
    )
    for fields in ({"percentile_metrics": "latency"}, {"metric_percentiles": "50,100"}):
        with pytest.raises(OptionError, match=r"^--(percentile-metrics|metric-percentiles): '"):
            options.selection(arguments.Judging(**fields))


def test_goodput_limits_are_in_milliseconds_or_have_a_unit():
    found = options.objective(arguments.Judging(goodput=["ttft:500 tpot:50ms", "e2el:2s"]))
    assert found == Objective(0.5, 0.05, 2.0)
    assert not options.objective(arguments.Judging())
    for text in ("500", "itl:5", "ttft:", "ttft:-5", "ttft:5 parsecs"):
        with pytest.raises(OptionError, match="--goodput: "):
            options.objective(arguments.Judging(goodput=[text]))


def test_an_slo_is_a_metric_with_a_figure_or_a_share_of_requests():
    assert options.limits(["ttft:p99.9:500ms", "tpot:mean:50", "e2el:2s", "goodput:95%"]) == [
        Limit("ttft", "p99.9", most=500.0),
        Limit("tpot", "mean", most=50.0),
        Limit("e2el", "p99", most=2000.0),
        Limit("goodput", least=95.0),
        Limit("errors", most=1.0),
    ]
    assert options.limits(["errors:0"]) == [Limit("errors", most=0.0)]
    for text in ("ttft", "ttft:median:5", "cost:p99:5", "goodput:101", "errors:x"):
        with pytest.raises(OptionError, match="--slo: "):
            options.limits([text])


def test_results_do_not_go_to_a_folder_or_where_nothing_can_be_written(tmp_path):
    with pytest.raises(OptionError, match=f"--json: {tmp_path} is a folder: give a file"):
        output.outputs(arguments.Files(json=tmp_path))
    with pytest.raises(OptionError, match="--csv: /proc/x: "):
        output.outputs(arguments.Files(csv=Path("/proc/x/y")))
    output.outputs(arguments.Files(html=tmp_path / "new" / "r.html"))
    assert (tmp_path / "new").is_dir()


def test_a_key_is_sent_as_a_bearer_token_unless_a_header_is_given():
    assert options.headers([], "k") == (("Authorization", "Bearer k"),)
    assert options.headers([], " k\r\n") == (("Authorization", "Bearer k"),)
    assert options.headers([], "\n") == ()
    with pytest.raises(KubeAIError, match=r"the API key has .* KUBEAI_API_KEY"):
        options.headers([], "k\r\nX-Other: y")
    assert options.headers(["authorization: Basic x"], "k") == (("authorization", "Basic x"),)
    for line in ("x", ": y", "a: b\r\nc: d"):
        with pytest.raises(OptionError, match="--header"):
            options.headers([line], None)


# -- commands --------------------------------------------------------------------------------------


def flags() -> dict[str, set[str]]:
    """The options of each command."""
    group: Any = typer.main.get_command(commands.app())
    return {
        name: {flag for parameter in command.params for flag in parameter.opts}
        for name, command in group.commands.items()
    }


def test_all_commands_write_the_same_files():
    found = flags()
    assert found.keys() == {"run", "sweep", "simulate", "replay", "compare", "demo"}
    for options_of in found.values():
        assert {"--json", "--csv", "--html"} <= options_of
    for name in ("run", "sweep", "simulate", "replay"):
        assert {"--percentile-metrics", "--metric-percentiles", "--goodput"} <= found[name]
        assert {"--num-prompts", "--warm-up"} <= found[name]
    assert not any(set(arguments.RENAMED) & options_of for options_of in found.values())


def test_options_have_the_names_of_vllms_benchmark():
    names = ("num-prompts", "request-rate", "burstiness", "max-concurrency", "input-len")
    names += ("output-len", "random-input-len", "random-output-len", "random-range-ratio")
    names += ("random-prefix-len", "percentile-metrics", "metric-percentiles", "goodput", "seed")
    names += ("model", "header", "extra-body", "ignore-eos")
    assert {f"--{name}" for name in names} <= flags()["run"]


def test_several_limits_may_follow_one_option_but_an_argument_stays_one():
    words = ["--goodput", "ttft:500", "tpot:50ms", "http://x/v1", "--name", "ttft:1", "itl:2"]
    assert arguments.joined(words) == [
        *("--goodput", "ttft:500 tpot:50ms", "http://x/v1"),
        *("--name", "ttft:1", "itl:2"),
    ]


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
