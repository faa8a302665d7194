"""Requests, rates and percentiles, from what the workers wrote."""

import pytest
from fakes.console import World

from kubeai.supervisor.console import traffic


@pytest.fixture
async def world():
    world = World()
    world.model("m", "pod-a", "pod-b")
    yield world
    await world.console.close()


def newest(world, since=0):
    world.traffic.read()
    return world.traffic.newest(since)


async def test_a_request_says_what_happened_and_why(world):
    world.request("m", "pod-a", id="x", waited_s=0.5, retries=1)
    (request,) = newest(world)
    assert request.time_s == 1e9 + 999.0
    assert (request.id, request.model, request.endpoint) == ("x", "m", "pod-a")
    assert (request.ttft_s, request.duration_s, request.waited_s) == (0.25, 1.0, 0.5)
    assert (request.prompt_tokens, request.cached_tokens, request.output_tokens) == (120, 60, 30)
    assert (request.pick, request.retries) == ("cached", 1)
    assert request.why == (
        "about 50 of 100 prompt tokens were believed to be in its cache; 1 earlier attempt failed; "
        "the request had waited 0.5 s for a replica"
    )


@pytest.mark.parametrize(
    ("pick", "word", "why"),
    [
        ("away", "away", "another replica had more of the prompt in its cache, but was too busy"),
        ("new", "new", "no replica had any of the prompt in its cache"),
        ("least", None, "it had the least work"),
        ("hashed", "hashed", "the hash of its prompt's beginning maps to it"),
        (
            "bounded",
            "bounded",
            "the replica that the hash of its prompt's beginning maps to was too busy",
        ),
        (None, None, "no replica was picked"),
    ],
)
async def test_why_a_replica_was_picked(world, pick, word, why):
    world.request(pick=pick, expected_tokens=0)
    (request,) = newest(world)
    assert (request.pick, request.why) == (word, why)


async def test_what_its_cache_was_believed_to_have_is_said_under_every_strategy(world):
    cached = "about 50 of 100 prompt tokens were believed to be in its cache"
    for pick, why in {
        "cached": cached,
        "hashed": f"the hash of its prompt's beginning maps to it; {cached}",
    }.items():
        world.request(pick=pick)
        assert newest(world)[0].why == why


async def test_what_the_engine_does_not_report_is_estimated_or_unknown(world):
    world.request(prompt_tokens=None, cached_tokens=None, output_tokens=None, streamed=False)
    (request,) = newest(world)
    assert (request.prompt_tokens, request.cached_tokens, request.output_tokens) == (
        100,
        None,
        None,
    )
    assert request.ttft_s is None
    assert world.traffic.times_to_first_token("m").count == 0
    assert world.traffic.cached_share("m", "pod-a") is None


async def test_only_what_is_new_comes_again(world):
    for number in range(3):
        world.request(id=str(number))
    assert [r.id for r in newest(world)] == ["2", "1", "0"]
    count = world.traffic.count
    assert newest(world, count) == []
    world.request(id="3")
    assert [r.id for r in newest(world, count)] == ["3"]
    assert [r.id for r in newest(world)] == ["3", "2", "1", "0"]


async def test_names_of_removed_replicas_and_models_are_remembered_and_reused_rows_are_not_misnamed(
    world,
):
    world.request("m", "pod-a")
    row = world.publisher.endpoint_rows("m")["pod-a"]
    world.model("m", "pod-b")
    world.publisher.reclaim([])
    world.model("m", "pod-b", "pod-new")
    assert world.publisher.endpoint_rows("m")["pod-new"] == row
    world.request("m", "pod-new")
    assert [r.endpoint for r in newest(world)] == ["pod-new", "pod-a"]
    world.request("m", "pod-b", generation=99, model_generation=99)
    request = newest(world)[0]
    assert (request.model, request.endpoint) == (None, None)


async def test_rates_are_over_the_last_minute(world):
    for _ in range(6):
        world.request()
    world.traffic.read()
    rates = world.traffic.rates("m")
    assert (rates.window_s, rates.requests_per_s) == (60, 0.1)
    assert (rates.prompt_tokens_per_s, rates.output_tokens_per_s) == (12.0, 3.0)
    world.now_s += 62
    world.traffic.read()
    assert world.traffic.rates("m").requests_per_s == 0
    assert world.traffic.rates("other").requests_per_s == 0


async def test_output_tokens_that_no_engine_reports_are_unknown_rather_than_zero(world):
    world.request(output_tokens=None)
    world.traffic.read()
    assert world.traffic.rates("m").output_tokens_per_s is None
    world.request(output_tokens=30)
    world.traffic.read()
    assert world.traffic.rates("m").output_tokens_per_s == 0.5


async def test_a_journal_that_was_overrun_shortens_the_window(world):
    for _ in range(2 * world.journal.entries):  # 64 entries, 0.1 s apart
        world.now_s += 0.1
        world.request()
    world.traffic.read()
    rates = world.traffic.rates("m")
    assert 6 < rates.window_s < 7
    assert rates.requests_per_s == pytest.approx(10, rel=0.2)


async def test_percentiles_are_of_the_last_minutes(world):
    for number in range(50):
        world.request(first_s=(number + 1) / 64)
    world.traffic.read()
    times = world.traffic.times_to_first_token("m")
    assert (times.window_s, times.count, times.p50, times.p99) == (300, 50, 25 / 64, 50 / 64)
    world.now_s += 290
    world.request(first_s=0.5)
    world.traffic.read()
    assert world.traffic.times_to_first_token("m").count == 51
    world.now_s += 20
    world.traffic.read()
    assert world.traffic.times_to_first_token("m").p50 == 0.5
    world.now_s += 400
    world.traffic.read()
    assert world.traffic.times_to_first_token("m").count == 0


async def test_the_share_of_cached_tokens_counts_responses_that_leave_out_a_zero(world):
    world.request("m", "pod-a", prompt_tokens=100, cached_tokens=None)
    world.traffic.read()
    assert world.traffic.cached_share("m", "pod-a") is None, "does its engine report them?"
    world.request("m", "pod-a", prompt_tokens=100, cached_tokens=80)
    world.traffic.read()
    assert world.traffic.cached_share("m", "pod-a") == 0.4
    assert world.traffic.cached_share("m", "pod-b") is None


async def test_names_of_current_rows_outlast_all_others(world, monkeypatch):
    monkeypatch.setattr(traffic, "NAMES_MAX", 10)
    world.request("m", "pod-a")
    for number in range(20):
        world.model("other", f"pod-{number}")
        world.publisher.reclaim([])
    (request,) = newest(world)
    assert (request.model, request.endpoint) == ("m", "pod-a")
    assert len(world.traffic.names._names) <= 10
