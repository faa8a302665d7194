"""Simulate the benefit of prefix routing.

Writes bench/results/headline.json and docs/explain/benchmarks.md.

    python bench/headline.py               # make bench-headline

Simulates L4 GPUs with Llama 3.1 8B in FP8 behind the gateway's own ring and load table, in virtual
time (kubeai/simulation): the same code writes the same figures on every machine.

- ``headline.json``: the published scenario, a row per strategy and concurrency;
- ``headline.html``: its runs at the highest concurrency, as ``kubeai bench`` reports them;
- ``studies.json``: the limits of the benefit; the effect of replication, load factor and prefix
  length;
- the tables of docs/explain/benchmarks.md, and its plots if matplotlib is installed
  (``pip install -c constraints.txt -e '.[plots]'``).
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from pages import filled, plot

from kubeai.loadtest.reports.report import report
from kubeai.simulation import cluster, results, traffic
from kubeai.simulation.presets import PRESETS
from kubeai.simulation.setting import Setting
from kubeai.simulation.traffic import Conversation, Shape

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs/explain/benchmarks.md"
ENGINE = PRESETS["llama-3.1-8b-fp8-l4"]
SEED = 1

# == the published scenario ========================================================================

REQUESTS = 8_000
# The published benchmark repeated a list of 800 prompts, without those that were too short, in a
# fixed order. With a multiple of the number of engines, round-robin would always send a prompt to
# the same engine.
PROMPTS = 797
PACED_PER_S = {800: 800.0, 1_600: 200.0, 3_200: 200.0, 8_000: 800.0}
CLIENT_PER_S = 76.0  # maximum rate of the published client
# Lengths with the published means (832 tokens in, 76 out), with the spread of ShareGPT's.
CHATS = Shape(
    conversations=80,
    turns=11,
    prompt_tokens=80,
    turn_tokens=75,
    reply_tokens=76,
    spread=1.0,
    replies=True,
)
STRATEGIES = ("Service", "LeastLoad", "PrefixHash", "Oracle")
# Mean time to the first token (ms) and tokens per second, as published by the Go version of KubeAI.
PUBLISHED = {
    ("Service", 800): (1_320, 45_410),
    ("LeastLoad", 800): (817, 45_866),
    ("PrefixHash", 800): (280, 69_408),
    ("Service", 1_600): (10_365, 46_250),
    ("LeastLoad", 1_600): (10_579, 47_476),
    ("PrefixHash", 1_600): (196, 66_043),
    ("Service", 3_200): (27_183, 46_461),
    ("LeastLoad", 3_200): (24_148, 47_659),
    ("PrefixHash", 3_200): (214, 65_234),
    ("Service", 8_000): (48_588, 46_510),
    ("LeastLoad", 8_000): (39_164, 47_610),
    ("PrefixHash", 8_000): (237, 67_334),
}


def prompts() -> Iterator[Conversation]:
    """Each turn of each conversation as an independent request, repeated in a random order."""
    pairs = list(itertools.islice(traffic.unrolled(traffic.generate(CHATS, SEED)), PROMPTS))
    random.Random(SEED).shuffle(pairs)
    return itertools.islice(itertools.cycle(pairs), REQUESTS)


def headline_settings() -> list[Setting]:
    settings = []
    for concurrency, paced_per_s in PACED_PER_S.items():
        common = {"engine": ENGINE, "concurrency": concurrency, "paced_per_s": paced_per_s}
        settings += [Setting(strategy=strategy, **common) for strategy in STRATEGIES]
        settings.append(Setting(strategy="PrefixHash", client_per_s=CLIENT_PER_S, **common))
    return settings


# == studies =======================================================================================

# Without think time, LeastLoad would often send the next turn to the engine that just finished.
TALKS = Shape(turns=10, prompt_tokens=120, turn_tokens=60, reply_tokens=80, think_s=2.0)
THREADS = (100, 200, 400, 800, 1_600, 3_200)
BUSY = 400  # threads of the other studies: engines are busy and their caches are large enough
# All first messages begin with the same 400 characters.
PREAMBLE = msgspec.structs.replace(TALKS, documents=1, document_tokens=100)


def talk(threads: int, shape: Shape = TALKS, **setting: Any) -> tuple[Setting, Shape]:
    """Multi-turn conversations, ``threads`` at a time."""
    return (
        Setting(engine=ENGINE, concurrency=threads, **setting),
        msgspec.structs.replace(shape, conversations=2 * threads),
    )


STUDIES: dict[str, list[tuple[Setting, Shape]]] = {
    "threads": [
        talk(threads, strategy=strategy)
        for threads in THREADS
        for strategy in ("LeastLoad", "PrefixHash", "Oracle")
    ],
    "replication": [
        talk(BUSY, strategy="PrefixHash", replication=replication)
        for replication in (1, 20, 100, 256)
    ],
    "factor": [
        talk(BUSY, strategy="PrefixHash", mean_load_factor=factor)
        for factor in (100, 110, 125, 150, 200, 400)
    ],
    "prefix": [
        talk(BUSY, PREAMBLE, strategy="PrefixHash", prefix_char_length=length)
        for length in (50, 100, 400, 500, 1_000)
    ]
    + [talk(BUSY, PREAMBLE, strategy="LeastLoad")],
    "system prompt": [
        talk(
            BUSY,
            msgspec.structs.replace(TALKS, system_tokens=1_000, systems=systems),
            strategy=strategy,
        )
        for systems in (1, 20)
        for strategy in ("LeastLoad", "PrefixHash")
    ],
}

# Llama 3.3 70B, FP8, on two H100s, as NVIDIA publishes it for NIM 1.8.0: concurrency, mean time to
# first token and between tokens in milliseconds, output tokens per second.
H100 = ((1, 407, 18.6, 52), (25, 688, 38.8, 623), (50, 835, 59.7, 814), (100, 7_996, 92.9, 917))
H100_SHAPE = Shape(turns=1, prompt_tokens=5_000, reply_tokens=500, spread=0.0)

# == running =======================================================================================


def played(setting: Setting, conversations: Iterable[Conversation]) -> results.Results:
    run = cluster.simulate(setting, conversations)
    described = {"simulated": True} | msgspec.to_builtins(setting)
    name = setting.name
    if setting.client_per_s:
        name += f", a client of {setting.client_per_s:g} requests a second"
    return results.summarize(name, described, run.measurements, run.gaps)


def play_headline(setting: Setting) -> results.Results:
    return played(setting, prompts())


def play_study(study: tuple[Setting, Shape]) -> results.Results:
    setting, shape = study
    return played(setting, traffic.generate(shape, SEED))


def play_h100(concurrency: int) -> results.Results:
    setting = Setting(
        engines=1,
        engine=PRESETS["llama-3.3-70b-fp8-h100x2"],
        strategy="LeastLoad",
        concurrency=concurrency,
    )
    shape = msgspec.structs.replace(H100_SHAPE, conversations=10 * concurrency)
    return played(setting, traffic.generate(shape, SEED))


def row(setting: Setting, found: results.Results) -> dict[str, Any]:
    summary = found.summary
    one = {
        "strategy": setting.strategy,
        "concurrency": setting.concurrency,
        "ttft_mean_ms": summary["ttft_ms"]["mean"],
        "ttft_p99_ms": summary["ttft_ms"]["p99"],
        "tokens_per_s": summary["tokens_per_s"],
        "hit_rate": summary["hit_rate"],
        "token_mean_ms": summary["tpot_ms"]["mean"],
        "duration_s": summary["duration_s"],
        "ttft_sent_mean_ms": summary["ttft_sent_ms"]["mean"],
        "spread": summary["spread"],
    }
    if setting.client_per_s:
        one |= {
            "strategy": f"{setting.strategy}, slow client",
            "client_requests_per_s": setting.client_per_s,
        }
    return one


def speed() -> float:
    """Requests of the published scenario that one core of this machine simulates per minute."""
    began_s = time.process_time()
    play_headline(headline_settings()[0])
    return REQUESTS / (time.process_time() - began_s) * 60


# == output ========================================================================================


def headline_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| concurrency | strategy | mean TTFT | p99 | tokens/s | time per token | hit rate "
        "| published: mean TTFT, tokens/s |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for one in rows:
        ttft, tokens = PUBLISHED.get(
            (one["strategy"].partition(",")[0], one["concurrency"]), (None, None)
        )
        slow = "client_requests_per_s" in one
        published = f"{ttft:,} ms, {tokens:,}" if ttft and one["strategy"] != "PrefixHash" else ""
        mean = one["ttft_sent_mean_ms"] if slow else one["ttft_mean_ms"]
        lines.append(
            f"| {one['concurrency']:,} | {one['strategy']} | {mean:,.0f} ms{' ¹' if slow else ''} "
            f"| {'' if slow else format(one['ttft_p99_ms'], ',.0f') + ' ms'} "
            f"| {one['tokens_per_s']:,.0f} | {one['token_mean_ms']:.0f} ms "
            f"| {one['hit_rate']:.0%} | {published} |"
        )
    return lines


def study_table(rows: list[dict[str, Any]], key: str, label: str) -> list[str]:
    lines = [
        f"| {label} | strategy | mean TTFT | p99 | tokens/s | hit rate | busiest engine |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {one[key]} | {one['strategy']} | {one['ttft_mean_ms']:,.0f} ms "
        f"| {one['ttft_p99_ms']:,.0f} ms | {one['tokens_per_s']:,.0f} | {one['hit_rate']:.0%} "
        f"| {one['spread']:.2f} × |"
        for one in rows
    ]
    return lines


def h100_table(found: list[results.Results]) -> list[str]:
    lines = [
        "| concurrency | TTFT | published | time per token | published "
        "| output tokens/s | published |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (concurrency, ttft, token, tokens), one in zip(H100, found, strict=True):
        summary = one.summary
        lines.append(
            f"| {concurrency} | {summary['ttft_ms']['mean']:,.0f} ms | {ttft:,} ms "
            f"| {summary['tpot_ms']['mean']:.1f} ms | {token} ms "
            f"| {summary['output_tokens_per_s']:,.0f} | {tokens} |"
        )
    return lines


LABELS = {
    "threads": ("concurrency", "concurrent conversations"),
    "replication": ("replication", "replication"),
    "factor": ("mean_load_factor", "meanLoadFactor"),
    "prefix": ("prefix_char_length", "prefixCharLength"),
    "system prompt": ("systems", "system prompts"),
}


def plot_levels(
    name: str, title: str, x: list[int], curves: dict[str, list[float]], unit: str
) -> None:
    with plot(f"benchmarks/{name}", (6.4, 3.4)) as axes:
        for label, values in curves.items():
            axes.plot(x, values, marker="o", ms=3, lw=1.2, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("concurrent conversations")
        axes.set_ylabel(unit)
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False)


def plots(rows: list[dict[str, Any]], threads: list[dict[str, Any]]) -> None:
    def curves(found: list[dict[str, Any]], key: str, scale: float = 1.0) -> dict[str, list[float]]:
        strategies = dict.fromkeys(one["strategy"] for one in found)
        return {s: [one[key] * scale for one in found if one["strategy"] == s] for s in strategies}

    levels = list(PACED_PER_S)
    plot_levels(
        "ttft", "Published scenario", levels, curves(rows, "ttft_mean_ms", 1e-3), "mean TTFT, s"
    )
    plot_levels(
        "tokens", "Published scenario", levels, curves(rows, "tokens_per_s"), "tokens a second"
    )
    title = "Conversations of ten turns"
    x = list(THREADS)
    plot_levels("edge-ttft", title, x, curves(threads, "ttft_mean_ms", 1e-3), "mean TTFT, s")
    plot_levels("edge-hits", title, x, curves(threads, "hit_rate", 100), "hit rate, %")


def main() -> int:
    began_s = time.monotonic()
    settings = headline_settings()
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(play_headline, settings))
        h100 = list(pool.map(play_h100, [concurrency for concurrency, *_ in H100]))
        studies = {name: list(pool.map(play_study, runs)) for name, runs in STUDIES.items()}
    rows = [row(*pair) for pair in zip(settings, found, strict=True)]
    tables = {
        name: [
            msgspec.to_builtins(setting) | {"systems": shape.systems} | row(setting, one)
            for (setting, shape), one in zip(STUDIES[name], results, strict=True)
        ]
        for name, results in studies.items()
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "headline.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "studies.json").write_text(json.dumps(tables, indent=1) + "\n")
    largest = max(PACED_PER_S)
    pairs = zip(settings, found, strict=True)
    shown = [one for setting, one in pairs if setting.concurrency == largest]
    (RESULTS / "headline.html").write_text(report(shown))
    page = filled(PAGE.read_text(), "headline", headline_table(rows))
    page = filled(page, "h100", h100_table(h100))
    for name, studied in tables.items():
        page = filled(page, name, study_table(studied, *LABELS[name]))
    PAGE.write_text(page)
    try:
        plots(rows, tables["threads"])
    except ImportError:
        print("no pictures: matplotlib is not installed", file=sys.stderr)
    print("\n".join(headline_table(rows)))
    took_s = time.monotonic() - began_s
    print(f"{took_s:.0f} s; {speed():,.0f} requests a minute of one core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
