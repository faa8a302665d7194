"""Summaries of a run's requests, real or simulated."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.simulation.results import (
    Gaps,
    Limit,
    Measurement,
    Objective,
    ResultsError,
    ResultsFile,
    Selection,
    read,
    summarize,
    write,
)


def measurement(due_s=0.0, ttft_s=0.1, took_s=1.0, tokens=10, **more):
    more = {"prompt_tokens": 100, "cached_tokens": 50} | more
    return Measurement(
        0, 0, due_s, more.pop("sent_s", due_s), due_s + ttft_s, due_s + took_s, **more,
        output_tokens=tokens,
    )  # fmt: skip


def test_the_summary_of_a_run():
    measurements = [
        measurement(due_s=float(n), ttft_s=0.1 * (n + 1), endpoint="ab"[n % 2]) for n in range(10)
    ]
    measurements.append(Measurement(0, 0, 3.0, 3.0, ended_s=4.0, error="status 503", endpoint="a"))
    found = summarize("r", {"x": 1}, measurements, Gaps())
    summary = found.summary
    assert (summary["requests"], summary["failed"]) == (11, 1)
    assert summary["duration_s"] == 10.0
    assert summary["requests_per_s"] == 1.0
    assert (summary["output_tokens"], summary["tokens_per_s"]) == (100, 110.0)
    assert summary["hit_rate"] == 0.5
    assert summary["ttft_ms"] == {
        "mean": 550.0,
        "p50": 600.0,
        "p90": 1000.0,
        "p95": 1000.0,
        "p99": 1000.0,
    }
    assert found.errors == {"status 503": 1}
    assert found.spread == {"a": 6, "b": 5}
    assert summary["spread"] == pytest.approx(12 / 11, abs=1e-3)
    assert found.curves["ttft_ms"][-1] == [1000.0, 1.0]
    assert max(level for _, level in found.curves["in_flight"]) >= 1


def test_latency_is_measured_from_the_time_a_request_was_due():
    found = summarize("r", {}, [measurement(ttft_s=2.0, sent_s=1.5)], Gaps()).summary
    assert found["ttft_ms"]["mean"] == 2000.0
    assert found["ttft_sent_ms"]["mean"] == 500.0
    assert found["late_ms"]["mean"] == 1500.0


def test_requests_due_in_the_warm_up_are_excluded():
    measurements = [measurement(due_s=0.0, ttft_s=9.0, took_s=9.5), measurement(due_s=5.0)]
    found = summarize("r", {}, measurements, Gaps(), warm_up_s=5.0).summary
    assert found["requests"] == 1
    assert found["ttft_ms"]["mean"] == 100.0


def test_goodput_counts_the_requests_that_meet_every_objective():
    measurements = [
        measurement(ttft_s=0.1),
        measurement(ttft_s=0.6),
        measurement(took_s=5.0),
        measurement(error="cut"),
    ]
    for objective, good in (
        (Objective(ttft_s=0.5), 2),
        (Objective(ttft_s=0.5, e2el_s=2.0), 1),
        (Objective(tpot_s=0.2), 2),
    ):
        found = summarize("r", {}, measurements, Gaps(), objective=objective).summary
        assert found["good_requests_per_s"] == pytest.approx(good / 5.0, abs=1e-3)
        assert found["good_share"] == good / 4
    found = summarize("r", {}, measurements, Gaps()).summary
    assert found["good_requests_per_s"] is found["good_share"] is None


def test_a_response_of_one_token_meets_any_limit_on_the_time_per_token():
    found = summarize(
        "r", {}, [measurement(tokens=1, took_s=9.0)], Gaps(), objective=Objective(tpot_s=0.01)
    )
    assert found.summary["good_share"] == 1.0


def test_the_selected_metrics_and_percentiles_are_summarized():
    gaps = Gaps()
    gaps.add(0.02, 100)
    measurements = [measurement(ttft_s=0.01 * n, queued_s=0.1) for n in range(1, 1001)]
    default = summarize("r", {}, measurements, gaps).summary
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"):
        assert list(default[name]) == ["mean", "p50", "p90", "p95", "p99"]
    assert "client_queue_time_ms" not in default
    selection = Selection(("itl", "client_queue_time"), (25.0, 99.9))
    found = summarize("r", {}, measurements, gaps, selection=selection).summary
    assert not {"ttft_ms", "tpot_ms", "e2el_ms"} & found.keys()
    assert list(found["itl_ms"]) == ["mean", "p25", "p99.9"]
    assert found["client_queue_time_ms"] == {"mean": 100.0, "p25": 100.0, "p99.9": 100.0}


@pytest.mark.parametrize(
    ("limit", "met", "name"),
    [
        (Limit("ttft", "p99", most=1000.0), True, "TTFT p99 ≤ 1000 ms"),
        (Limit("ttft", "mean", most=499.0), False, "TTFT mean ≤ 499 ms"),
        (Limit("ttft", "p75", most=9e9), False, "TTFT p75 ≤ 9e+09 ms"),
        (Limit("errors", most=9.0), False, "errors ≤ 9 %"),
        (Limit("errors", most=10.0), True, "errors ≤ 10 %"),
        (Limit("goodput", least=50.0), True, "goodput ≥ 50 %"),
        (Limit("goodput", least=51.0), False, "goodput ≥ 51 %"),
    ],
)
def test_a_limit_holds_for_a_run_that_has_the_figure_and_keeps_it(limit, met, name):
    measurements = [measurement(ttft_s=0.1 * n) for n in range(1, 10)]
    measurements.append(Measurement(0, 0, 0.0, 0.0, ended_s=4.0, error="cut"))
    objective = Objective(ttft_s=0.501)
    found = summarize("r", {}, measurements, Gaps(), objective=objective).summary
    assert (limit.met(found), limit.name) == (met, name)


def test_a_run_without_responses_has_a_summary(tmp_path):
    failed = [Measurement(0, 0, 0.0, 0.0, ended_s=1.0, error="connection refused")]
    for measurements in ([], failed):
        found = summarize("r", {}, measurements, Gaps())
        assert found.summary["ttft_ms"] == {}
        assert found.summary["hit_rate"] is None
        file = ResultsFile(runs=[found])
        write(file, tmp_path / "r.json")
        assert read(tmp_path / "r.json") == file


@given(st.lists(st.floats(1e-5, 100), min_size=1, max_size=200))
def test_gap_quantiles_are_accurate_within_two_percent(values_s):
    gaps = Gaps()
    for value_s in values_s:
        gaps.add(value_s)
    figures = gaps.figures_ms()
    exact = sorted(values_s)[math.ceil(0.5 * len(values_s)) - 1] * 1e3
    assert figures["p50"] == pytest.approx(exact, rel=0.021, abs=0.006)
    assert figures["mean"] == pytest.approx(1e3 * sum(values_s) / len(values_s), abs=0.006)


@given(st.lists(st.lists(st.floats(0, 5000), max_size=20).map(sorted), max_size=4))
def test_adding_gaps_per_stream_gives_the_same_histogram(streams):
    found, oracle = Gaps(), Gaps()
    for times_s in streams:
        found.add_stream(times_s)
        for before_s, after_s in itertools.pairwise(times_s):
            oracle.add(after_s - before_s)
    assert found.total_s == pytest.approx(oracle.total_s)
    assert found.counts == oracle.counts


def test_gaps_of_several_processes_are_merged():
    one, other, both = Gaps(), Gaps(), Gaps()
    for value_s, gaps in ((0.01, one), (0.02, other), (0.3, other)):
        gaps.add(value_s)
        both.add(value_s)
    one.merge(other)
    assert one.counts == both.counts
    assert one.total_s == pytest.approx(both.total_s)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), ("{}", "is not a results file"), ("x", "is not a results file")],
)
def test_a_file_without_results_is_reported(tmp_path, content, words):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultsError, match=words):
        read(path)


def test_results_in_another_format_are_rejected(tmp_path):
    path = tmp_path / "r.json"
    write(ResultsFile(format=1, runs=[]), path)
    with pytest.raises(ResultsError, match="has format 1, this version reads 2: run"):
        read(path)
