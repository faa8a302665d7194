"""The table of Models."""

from io import StringIO

from rich.console import Console

from kubeai.terminal.models import models_table

QUIET = {"name": "a", "state": "Ready", "replicas": {"ready": 1, "desired": 2}}
BUSY = {
    **QUIET,
    "name": "b",
    "in_flight": 3,
    "held": 1,
    "rates": {"requests_per_s": 1.25, "output_tokens_per_s": 1234.5},
    "ttft_s": {"count": 2, "p50": 0.2, "p99": 1.12},
}


def rows(*models, width=120, rows_max=None):
    out = StringIO()
    Console(file=out, width=width).print(models_table(models, rows_max))
    return [line.split("  ") for line in out.getvalue().splitlines()]


def cells(row):
    return [cell.strip() for cell in row if cell.strip()]


def test_columns_without_any_value_are_left_out():
    head, row = rows(QUIET)
    assert cells(head) == ["MODEL", "STATE", "READY", "WHY"]
    assert cells(row) == ["a", "Ready", "1/2"]


def test_rates_and_latencies_are_shown_where_they_are_known():
    head, quiet, busy = rows(QUIET, BUSY)
    columns = ["MODEL", "STATE", "READY", "IN FLIGHT", "HELD", "REQ/S", "TOKENS/S", "TTFT", "P99"]
    assert cells(head)[:-1] == columns
    assert cells(quiet) == ["a", "Ready", "1/2"]
    assert cells(busy) == ["b", "Ready", "1/2", "3", "1", "1.2", "1,234", "200 ms", "1.1 s"]


def test_why_is_shown_for_models_that_are_not_ready_and_is_cut_off_first():
    message = "PullingImage: " + "long " * 40
    _, row = rows(QUIET | {"state": "Starting", "message": message}, width=60)
    assert cells(row)[:3] == ["a", "Starting", "1/2"]
    assert cells(row)[3].startswith("PullingImage")
    assert cells(row)[3].endswith("…")


def test_control_characters_and_markup_are_not_obeyed():
    _, row = rows({"name": "[red]\x1b[2J", "state": "Ready"})
    assert cells(row)[0] == r"[red]\x1b[2J"


def test_with_too_many_models_those_with_requests_or_problems_are_shown():
    models = [QUIET | {"name": f"m{n}"} for n in range(9)]
    _, first, _, last = rows(*models, BUSY | {"name": "z"}, rows_max=3)
    assert cells(first)[0] == "z"
    assert cells(last) == ["… and 8 more"]
