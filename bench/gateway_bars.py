"""The gateway's bars, from the benchmarks' results: CPU, latency, memory, picks, the event loop."""

from __future__ import annotations

from typing import Any

from bars import Bar

MICRO = "pytest bench --benchmark-enable --benchmark-only"
VS_NGINX = "python bench/gateway_vs_nginx.py"
SCALE = "python bench/gateway_at_scale.py --only "

# Measure, limit as text, micro-benchmark, limit as number, unit.
MICRO_BARS = (
    (
        "`pick` + `release` of a hashed key, 1,000 endpoints, from Python",
        "≤ 300 ns",
        "test_pick_hashed_and_release",
        300,
        " ns",
    ),
    (
        "the same from compiled code",
        "≤ 150 ns",
        "test_pick_hashed_and_release_from_compiled_code",
        150,
        " ns",
    ),
    (
        "`pick` + `release`, LeastLoad, 1,000 endpoints",
        "≤ 1 µs",
        "test_pick_least_and_release",
        1,
        " µs",
    ),
    (
        "`pick` + `release`, PrefixCache, 800-byte chat, 1,000 endpoints",
        "≤ 5 µs",
        "test_pick_cached_and_release",
        5,
        " µs",
    ),
    ("hashes of a 400 KB prompt", "≤ 60 µs", "test_prompt_of_a_body", 60, " µs"),
    ("build a ring of 1,000 endpoints × 256", "≤ 60 ms", "test_build", 60, " ms"),
    (
        "add and remove one endpoint of that ring",
        "≤ 2 ms",
        "test_add_and_remove_one",
        2,
        " ms",
    ),
)
PER_SECOND = {" ns": 1e9, " µs": 1e6, " ms": 1e3}
# Calls per round of a micro-benchmark, if more than one.
PER_ROUND = dict.fromkeys(
    (
        "test_pick_hashed_and_release",
        "test_pick_hashed_and_release_from_compiled_code",
        "test_pick_least_and_release",
        "test_pick_cached_and_release",
        "test_prompt_of_a_body",
    ),
    1000,
)


def gateway_bars(found: dict[str, Any]) -> list[Bar]:
    """``found``: each file's content by its name; {} for a part that was not measured."""
    benchmarks = found["micro"].get("benchmarks", [])
    return [
        *_compared_to_nginx(found["gateway"], found["keys"]),
        *_at_scale(found["scale"]),
        *_micro(benchmarks),
        _balance(benchmarks),
        _stall(found["stall"]),
    ]


def _compared_to_nginx(gateway: dict[str, Any], keys: dict[str, Any]) -> list[Bar]:
    def bar(what: str, most: float, scenario: str) -> Bar:
        ratio = gateway.get(scenario, {}).get("ratio")
        return Bar(what, f"≤ {most} × nginx", ratio, most, f"{VS_NGINX} --only {scenario}")

    return [
        bar("CPU per chat request of 800 bytes, 32 connections", 1.15, "chat"),
        Bar(
            "the same with one of 10,000 API keys, each with all limits",
            "≤ 1.2 × nginx",
            keys.get("chat", {}).get("ratio"),
            1.2,
            f"{VS_NGINX} --only chat --keys 10000",
        ),
        bar("CPU per stream of 64 chunks back to back", 1.05, "burst"),
        bar("CPU per stream of 64 chunks, one every 20 ms", 1.15, "paced"),
        bar("CPU per request with a 400 KB prompt", 1.5, "prompt"),
    ]


def _at_scale(scale: dict[str, Any]) -> list[Bar]:
    latency, streams, workers = (scale.get(k, {}) for k in ("latency", "streams", "workers"))
    count = streams.get("streams", 9500)
    return [
        Bar(
            "p99 at half of KubeAI's saturation, open loop",
            "≤ 1.5 × nginx",
            latency.get("p99_ratio"),
            1.5,
            SCALE + "latency",
        ),
        Bar(
            f"memory per stream with {count:,} open",
            "≤ 16 KiB",
            streams["kubeai_bytes"] / 1024 if streams else None,
            16,
            SCALE + "streams",
            " KiB",
        ),
        Bar(
            f"time until none of {count:,} streams is counted",
            "0 counted",
            streams.get("to_zero_s"),
            2,
            SCALE + "streams",
            " s",
        ),
        Bar(
            "CPU per request, 2 workers, 256 connections",
            "≤ 1.1 × one",
            workers.get("ratio"),
            1.1,
            SCALE + "workers",
        ),
    ]


def _micro(benchmarks: list[dict[str, Any]]) -> list[Bar]:
    """Of a benchmark with parameters, the last counts."""
    medians_s = {each["name"].split("[")[0]: each["stats"]["median"] for each in benchmarks}
    bars = []
    for what, limit, test, most, unit in MICRO_BARS:
        median_s = medians_s.get(test)
        value = median_s and median_s * PER_SECOND[unit] / PER_ROUND.get(test, 1)
        bars.append(Bar(what, limit, value, most, f"{MICRO} -k {test}", unit))
    return bars


def _balance(benchmarks: list[dict[str, Any]]) -> Bar:
    held = [each for each in benchmarks if "100_000" in each["name"]]
    return Bar(
        "100,000 keys over 100 endpoints, each pick held: highest load divided by the mean",
        "≤ 1.25",
        held[0]["extra_info"]["mean, highest"][1] / 1000 if held else None,
        1.25,
        f"{MICRO} -k 100_000",
        "",
    )


def _stall(blocked_ms: dict[str, float]) -> Bar:
    return Bar(
        "event loop blocked by one body of 64 MiB, worst kind",
        "≤ 50 ms",
        max(blocked_ms.values(), default=None),
        50,
        "python bench/stall.py",
        " ms",
    )
