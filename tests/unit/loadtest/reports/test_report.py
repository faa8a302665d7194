"""The HTML page and the table of ``kubeai bench``: complete for any run, with all text escaped."""

from __future__ import annotations

import csv
import io
import math
import random
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from kubeai.loadtest.reports import compare, output, verdict
from kubeai.loadtest.reports.output import Outputs
from kubeai.loadtest.reports.page import COLOURS
from kubeai.loadtest.reports.report import ENDPOINTS_MAX, report
from kubeai.simulation.results import (
    Gaps,
    Limit,
    Measurement,
    Results,
    Sweep,
    read,
    summarize,
)

EVIL = "<script>alert('1')</script>&\"\x1b[31m\n"


def run(
    name: str = "one",
    *,
    pace: float = 1.0,
    count: int = 300,
    error: str = "",
    endpoints: int = 4,
    warnings: tuple[str, ...] = (),
    setting: dict | None = None,
) -> Results:
    """Made-up requests, ten per second; with ``error``, all of them fail."""
    rng, gaps = random.Random(7), Gaps()
    measurements = []
    for at in range(count):
        due = at / 10
        measurement = Measurement(at, 0, due, due, prompt_tokens=100, cached_tokens=50, error=error)
        if not error:
            measurement.first_s = due + rng.lognormvariate(-2, 1) * pace
            measurement.ended_s = measurement.first_s + 1.9 * pace
            measurement.output_tokens = 20
            measurement.endpoint = f"10.0.0.{at % endpoints}:8000"
            gaps.add(0.1 * pace, 19)
        measurements.append(measurement)
    setting = {"model": "m", "traffic": {"rate": 10}} if setting is None else setting
    return summarize(name, setting, measurements, gaps, warnings=warnings)


class Page(HTMLParser):
    """What a browser would see: tags, their attributes, the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def plots(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def area(plot: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the area within the axes."""
    (rect,) = plot.findall("rect[@class='area']")
    x, y, width, height = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def curve_points(plot: ElementTree.Element) -> list[list[tuple[float, float]]]:
    lines = [line.attrib["points"].split() for line in plot.findall("polyline")]
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line)] for line in lines]


def bars(plot: ElementTree.Element) -> list[ElementTree.Element]:
    return [rect for rect in plot.findall("rect") if rect.attrib["class"] != "area"]


RUNS = {
    "one run": [run()],
    "three runs": [run("a"), run("b", pace=1.5), run("c", pace=30)],
    "five runs": [run(f"run {at}", pace=1 + at) for at in range(5)],
    "more runs than colours": [run(f"run {at}") for at in range(COLOURS + 1)],
    "one request": [run(count=1)],
    "no request": [run(count=0)],
    "all failed": [run(error="status 503")],
    "one of two failed": [run("a", error="status 503"), run("b")],
    "no curves": [msgspec.structs.replace(run(), curves={})],
    "curves of one only": [run("a"), msgspec.structs.replace(run("b"), curves={}, spread={})],
    "times of zero": [run(pace=0.0)],
    "hours": [run(pace=1e6)],
    "no figures": [Results(name="x", setting={}, summary={}, curves={}, spread={}, errors={})],
}


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_any_runs_give_a_page_with_curves_and_bars_within_their_axes(runs):
    page = report(runs)
    assert page.startswith("<!doctype html>")
    for plot in plots(page):
        left, top, right, bottom = area(plot)
        _, _, width, height = map(float, plot.attrib["viewBox"].split())
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        drawn = [point for curve in curve_points(plot) for point in curve]
        for x, y in drawn:
            assert left <= x <= right
            assert top <= y <= bottom
        for bar in bars(plot):
            x, y, wide, high = (float(bar.attrib[key]) for key in ("x", "y", "width", "height"))
            assert x == left
            assert x + wide <= right
            assert top <= y < y + high <= bottom
        assert drawn or bars(plot)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_any_runs_give_a_table_whose_lines_fit_their_columns(runs):
    lines = compare.table(runs).splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert all(run.name in lines[0] for run in runs)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_a_saved_and_reloaded_run_gives_the_same_page(runs):
    read = msgspec.json.decode(msgspec.json.encode(runs), type=list[Results])
    assert report(read) == report(runs)


def test_a_run_has_a_bar_of_each_main_figure_a_curve_in_each_plot_and_a_bar_per_endpoint():
    *first, one, two, three, four, last = plots(report([run("a"), run("b")]))
    assert [plot.attrib["aria-label"] for plot in first] == [
        *("Mean TTFT", "Cache hit rate", "Output tokens"),
    ]
    assert [len(bars(plot)) for plot in first] == [2, 2, 2]
    assert [len(curve_points(plot)) for plot in (one, two, three, four)] == [2, 2, 2, 2]
    assert len(bars(last)) == 2 * 4


def test_a_distribution_curve_rises_from_the_bottom_to_the_top():
    plot = plots(report([run()]))[0]
    _, top, _, bottom = area(plot)
    (curve,) = curve_points(plot)
    assert curve[0][1] == bottom
    assert curve[-1][1] == top
    assert curve == sorted(curve, key=lambda point: (point[0], -point[1]))


def test_a_factor_of_ten_has_the_same_length_anywhere_on_the_logarithmic_axis():
    shown = run()
    shown.curves = {"ttft_ms": [[1.0, 0.3], [10.0, 0.6], [100.0, 1.0]]}
    (curve,) = curve_points(plots(report([shown]))[0])
    _, first, second, third = (x for x, _ in curve)
    assert second - first == pytest.approx(third - second, abs=0.11)


def test_tick_labels_do_not_overlap():
    for runs in RUNS.values():
        for plot in plots(report(runs)):
            labels = [text for text in plot.findall("text") if text.get("text-anchor") == "middle"]
            ends = [
                (float(text.attrib["x"]) + side * 3 * len(text.text or ""))
                for text in labels
                for side in (-1, 1)
            ]
            assert ends == sorted(ends)


def test_bars_are_proportional_to_their_counts_and_only_the_busiest_are_drawn():
    shown = run()
    shown.spread = {f"engine-{at:02}": 10 * at for at in range(1, ENDPOINTS_MAX + 3)}
    page = report([shown])
    drawn = bars(plots(page)[-1])
    assert len(drawn) == ENDPOINTS_MAX
    assert f"the busiest {ENDPOINTS_MAX} of {ENDPOINTS_MAX + 2}" in page
    widths = [float(bar.attrib["width"]) for bar in drawn]
    assert widths[-1] / widths[0] == pytest.approx((ENDPOINTS_MAX + 2) / 3, rel=0.02)


def test_a_long_endpoint_name_is_truncated_with_the_full_name_in_its_tooltip():
    shown = run()
    name = "model-with-a-long-name-7c9f8d-x2x4z"
    shown.spread = {name: 3}
    plot = plots(report([shown]))[-1]
    assert any((text.text or "").startswith("…") for text in plot.findall("text"))
    assert name in (bars(plot)[0].findtext("title") or "")


def test_external_text_is_escaped():
    evil = run(EVIL, warnings=(EVIL,), setting={EVIL: EVIL, "deep": {EVIL: [EVIL]}})
    evil.spread, evil.errors = {EVIL: 3, EVIL * 2: 4}, {EVIL: 2}
    calm = run("calm")
    page = report([evil, calm])
    seen, plain = Page(page), Page(report([run("calm"), calm]))
    assert "script" not in seen.tags
    assert {name for name, _ in seen.attributes} - {"open"} == {
        name for name, _ in plain.attributes
    }
    assert set(seen.tags) <= set(plain.tags) | {"ul", "li", "p"}
    assert "<script>alert('1')</script>" in "".join(seen.text)
    assert "\x1b" not in page + compare.table([evil, calm])
    assert plots(page)


def test_the_page_loads_no_resources_and_runs_no_scripts():
    page = report(RUNS["three runs"])
    seen = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(seen.tags)
    names = {name for name, _ in seen.attributes}
    assert not {name for name in names if name in ("src", "href") or name.startswith("on")}
    assert not re.search(r"url\(|@import|https?:", page)
    assert "default-src 'none'" in page


def test_settings_that_differ_are_shown_and_those_of_all_runs_are_folded_away_as_one():
    page = report(
        [run("a", setting={"rate": 1, "x": {"y": 2}}), run("b", setting={"rate": 3, "x": {"y": 2}})]
    )
    assert '<th scope="row">rate</th><td>1</td><td>3</td>' in page
    assert '<th scope="row">x.y</th><td colspan="2">2</td>' in page
    shown, _, folded = page.partition("<details>")
    assert "What differed" in shown
    assert '<th scope="row">rate</th>' in shown
    assert '<th scope="row">x.y</th>' in folded


def test_warnings_are_above_the_pages_figures_and_below_the_table():
    runs = [run("a", warnings=("the client was late",)), run("b", error="timeout")]
    page = report(runs)
    assert page.index("the client was late") < page.index('<div class="tiles">')
    assert "none of 300 requests succeeded" in page
    assert "! a: the client was late" in compare.table(runs)
    assert "! b: none of 300 requests succeeded" in compare.table(runs)


def test_failures_and_an_empty_run_cause_a_warning():
    assert compare.warnings(run()) == []
    assert compare.warnings(run(count=0)) == ["no requests were measured"]
    some = run()
    some.summary |= {"failed": 2}
    assert compare.warnings(some) == ["2 of 300 requests failed: latencies exclude them"]


# -- the verdict -----------------------------------------------------------------------------------


def test_the_page_opens_with_the_verdict_and_tiles_then_charts_then_what_differed():
    page = report([run("a", setting={"x": 1}), run("b", pace=0.5, setting={"x": 2})])
    parts = ["<h1>", 'class="verdict"', 'class="tiles"', ">Charts<", ">What differed<", "<details>"]
    assert [page.index(part) for part in parts] == sorted(page.index(part) for part in parts)
    for title in ("All figures", "Environment"):
        assert f"<summary>{title}</summary>" in page.partition("<details>")[2]


def test_the_verdict_names_the_best_run_and_compares_it_to_the_first():
    runs = [
        with_summary(requests=9, ttft_ms={"mean": 200.0}, hit_rate=0.25, output_tokens_per_s=50.0),
        with_summary(requests=9, ttft_ms={"mean": 50.0}, hit_rate=0.75, output_tokens_per_s=100.0),
    ]
    runs[0].name, runs[1].name = "Service", "PrefixCache"
    assert verdict.sentences(runs) == [
        "PrefixCache has the lowest mean TTFT: 50 ms, 25 % of that of Service (200 ms). Its "
        "engines found 75 % of the prompt tokens in their caches, instead of 25 %.",
        "PrefixCache generates the most output tokens: 100/s, 2 times those of Service.",
    ]
    tiles = {tile.label: tile for tile in verdict.tiles(runs)}
    assert tiles["Mean TTFT"] == ("Mean TTFT", "50 ms", "PrefixCache, ×0.25", 1)
    assert tiles["Cache hit rate"].value == "75 %"
    assert verdict.sentences(runs[::-1])[0].startswith(
        "PrefixCache has the lowest mean TTFT: 50 ms."
    )


def test_runs_that_hardly_differ_are_called_alike():
    runs = [with_summary(requests=9, ttft_ms={"mean": value}) for value in (100.0, 103.0)]
    assert verdict.sentences(runs) == ["All runs have about the same mean TTFT: 100 ms."]


def test_the_verdict_on_one_run_is_its_rate_and_its_last_percentile():
    one = with_summary(
        requests=100,
        failed=4,
        requests_per_s=12.5,
        good_share=0.9,
        ttft_ms={"mean": 80.0, "p50": 70.0, "p99": 1234.0},
        good_requests_per_s=11.0,
    )
    assert verdict.sentences([one]) == [
        "96 requests succeeded, 12.5 per second.",
        "The first token came within 1.23 s for 99 % of them.",
        "90 % of all requests count towards goodput.",
    ]
    assert ("TTFT mean", "80 ms", "p50 70 ms, p99 1.23 s", None) in verdict.tiles([one])
    assert verdict.sentences([run(error="cut")]) == ["No request succeeded."]


def swept() -> tuple[list[Results], Sweep]:
    runs = [
        with_summary(requests=9, failed=0, ttft_ms={"p99": value}) for value in (100.0, 900.0, 50.0)
    ]
    return runs, Sweep(
        limits=[Limit("ttft", "p99", most=500.0)],
        rates={"LeastLoad": [4.0, 8.0], EVIL: [8.0]},
        runs={"LeastLoad": [0, 1], EVIL: [2]},
        held={"LeastLoad": 4.0, EVIL: 8.0},
        broke={"LeastLoad": 8.0, EVIL: None},
    )


def test_a_sweeps_page_has_the_highest_rates_and_each_slo_over_the_rate():
    runs, sweep = swept()
    first, second = verdict.sentences(runs, sweep)
    assert first == (
        "LeastLoad holds TTFT p99 ≤ 500 ms up to 4 requests/s. At 8 requests/s, TTFT p99 is 900 ms."
    )
    assert second.endswith("up to 8 requests/s, the highest rate that was tried.")
    page = report(runs, sweep)
    assert "script" not in Page(page).tags
    (plot,) = plots(page)
    assert [len(curve) for curve in curve_points(plot)] == [2, 2], "a point is drawn as a line"
    (limit,) = plot.findall("path[@class='limit']")
    lower, upper = (y for _, y in curve_points(plot)[0])
    assert upper < float(re.search(r"M50 ([\d.]+)h", limit.attrib["d"])[1]) < lower
    assert "4 requests/s" in page
    assert verdict.tiles(runs, sweep)[0] == ("LeastLoad", "4/s", "requests; breaks at 8/s", 0)
    sweep.held["LeastLoad"] = None
    assert "does not hold TTFT p99 ≤ 500 ms at any rate" in verdict.sentences(runs, sweep)[0]


# -- files -----------------------------------------------------------------------------------------


def test_all_files_have_all_runs(tmp_path):
    runs = [run("a"), run("b", error="cut", setting={"x": {"y": [1]}})]
    files = Outputs(tmp_path / "r.json", tmp_path / "r.csv", tmp_path / "r.html")
    files.write(runs)
    assert read(files.json).runs == runs
    assert "kubeai bench: a, b" in files.html.read_text()
    one, other = csv.DictReader(io.StringIO(files.csv.read_text()))
    assert float(one["e2el_ms.p95"]) == runs[0].summary["e2el_ms"]["p95"]
    assert (other["e2el_ms.p95"], other["errors.cut"], other["setting.x.y"]) == ("", "300", "[1]")
    assert one["errors.cut"] == one["setting.x.y"] == ""


def test_a_spreadsheet_takes_no_cell_for_a_formula():
    evil = run('=HYPERLINK("x")', setting={"@x": "-1"})
    (row,) = csv.DictReader(io.StringIO(output.table([evil])))
    assert row["name"] == '\'=HYPERLINK("x")'
    assert row["setting.@x"] == "'-1"


def cells(runs: list[Results], group: str, label: str) -> list[compare.Cell]:
    return next(row.cells for row in compare.figures(runs)[group] if row.label == label)


def with_summary(**summary: Any) -> Results:
    return msgspec.structs.replace(run(), summary=summary)


def test_the_best_run_has_the_lowest_times_and_the_highest_throughput():
    runs = [
        with_summary(ttft_ms={"mean": 100.0}, requests_per_s=5.0, hit_rate=0.5),
        with_summary(ttft_ms={"mean": 50.0}, requests_per_s=4.0, hit_rate=None),
        with_summary(ttft_ms={}, requests_per_s=5.0, hit_rate=0.75),
    ]
    assert cells(runs, "TTFT (time to first token), ms", "mean") == [
        ("100.0", "", False),
        ("50.0", "×0.50", True),
        ("–", "", False),
    ]
    assert cells(runs, "Throughput, per second", "requests") == [
        ("5.00", "", True),
        ("4.00", "×0.80", False),
        ("5.00", "×1.00", True),
    ]
    assert cells(runs, "Cache and balance", "cache hit rate, %") == [
        ("50.0", "", False),
        ("–", "", False),
        ("75.0", "×1.50", True),
    ]


@pytest.mark.parametrize("first", [None, 0, math.nan])
def test_a_ratio_to_zero_is_not_shown(first):
    runs = [with_summary(failed=first), with_summary(failed=3)]
    assert cells(runs, "Requests", "failed")[1].ratio == ""


def test_no_run_is_best_if_all_are_equal_or_the_figure_has_no_better_direction():
    runs = [with_summary(failed=1, requests=3, late_ms={"mean": 1.0}), with_summary(failed=1)]
    runs[1].summary |= {"requests": 4, "late_ms": {"mean": 2.0}}
    for rows in compare.figures(runs).values():
        assert not any(cell.best for row in rows for cell in row.cells)


def test_figures_that_no_run_has_are_omitted():
    assert compare.figures([with_summary(itl_ms={}, hit_rate=None, spread=1.2)]).keys() == {
        "Cache and balance"
    }


def test_a_single_run_has_no_comparison():
    text = compare.table([run()])
    assert "×" not in text
    assert "*" not in text
    assert "<b>Marked" not in report([run()])


def test_the_terminal_table():
    runs = [
        with_summary(requests=1200, failed=0, ttft_ms={"mean": 12.34, "p99": 1234.0}),
        with_summary(requests=600, failed=3, ttft_ms={"mean": 6.17, "p99": 2469.0}),
    ]
    runs[0].name, runs[1].name, runs[1].errors = "PrefixHash", "LeastLoad", {"cut": 1, "late": 2}
    assert compare.table(runs).splitlines() == [
        "          PrefixHash      LeastLoad",
        "Requests",
        "  all          1,200    600   ×0.50",
        "  failed          *0      3",
        "TTFT (time to first token), ms",
        "  mean         12.34  *6.17   ×0.50",
        "  p99         *1,234  2,469   ×2.00",
        "Errors",
        "  late             0      2",
        "  cut              0      1",
        "",
        "* best in its row; ×: ratio to the first run",
        "! LeastLoad: 3 of 600 requests failed: latencies exclude them",
    ]
