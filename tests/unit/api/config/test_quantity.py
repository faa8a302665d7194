"""Quantities and durations: exact; quantities are formatted as Kubernetes does."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.api.config.duration import parse_duration
from kubeai.api.config.quantity import parse_quantity
from kubeai.api.config.schema import _UNITS
from kubeai.gateway.openapi.headers import MAX_WAIT, PARAMETERS

MAX_WAIT_SCHEMA = PARAMETERS[MAX_WAIT]["schema"]


@pytest.mark.parametrize(
    ("text", "count", "product"),
    [
        ("500m", 3, "1500m"),
        ("500m", 2, "1"),
        ("1Gi", 2, "2Gi"),
        ("512Mi", 2, "1Gi"),
        ("1000Mi", 2, "2000Mi"),
        ("1.5Gi", 1, "1536Mi"),
        ("0.5Gi", 1, "512Mi"),
        ("0.5Ki", 1, "512"),
        ("1.3Ki", 1, "1331200m"),
        ("1", 8, "8"),
        ("1", 1000, "1k"),
        ("1500", 1, "1500"),
        ("2e3", 1, "2e3"),
        ("2E3", 4, "8e3"),
        ("1E", 1, "1E"),
        ("100n", 3, "300n"),
        ("0.1n", 1, "1n"),
        ("0", 5, "0"),
        ("-1.5", 2, "-3"),
        ("+2", 1, "2"),
        (".5", 1, "500m"),
        ("24Gi", 8, "192Gi"),
        (1, 4, "4"),
        (0.1, 3, "300m"),
    ],
)
def test_a_quantity_is_multiplied_exactly_and_formatted_as_in_kubernetes(text, count, product):
    assert str(parse_quantity(text) * count) == product


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "not a quantity"),
        ("Gi", "not a quantity"),
        ("1 Gi", "not a quantity"),
        ("1.2.3", "not a quantity"),
        ("inf", "not a quantity"),
        ("10KB", "unknown suffix 'KB'"),
        ("5gi", "unknown suffix 'gi'"),
        ("1e99", "more than Kubernetes can hold"),
        ("9Ei", "more than Kubernetes can hold"),
        ("٣", "not a quantity"),
    ],
)
def test_an_invalid_quantity_is_rejected_with_a_reason(text, wrong):
    with pytest.raises(ValueError, match=wrong):
        parse_quantity(text)


@given(
    st.integers(0, 10**7),
    st.sampled_from(["", "n", "u", "m", "k", "M", "G", "Ki", "Mi", "Gi", "e3", "e-3", "E0"]),
    st.integers(0, 64),
)
def test_a_formatted_quantity_parses_to_the_same_value(number, suffix, count):
    product = parse_quantity(f"{number}{suffix}") * count
    again = parse_quantity(str(product))
    assert again.nanos == product.nanos
    assert str(again) == str(product)


@given(st.fractions(0, 10**6, max_denominator=1000), st.integers(1, 100))
def test_a_product_equals_repeated_addition(amount, count):
    nanos = Fraction(amount) * 10**9
    millis = -(-(amount * 1000).numerator // (amount * 1000).denominator)
    assert (parse_quantity(f"{millis}m") * count).nanos == millis * 10**6 * count
    assert millis * 10**6 >= nanos


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("10s", 10),
        ("1m30s", 90),
        ("1h15m30.918273645s", 4530.918273645),
        ("250ms", 0.25),
        ("1.5h", 5400),
        (".5m", 30),
        ("5.s", 5),
        ("3us", 3e-6),
        ("3µs", 3e-6),
        ("3μs", 3e-6),
        ("7ns", 7e-9),
        ("-2s", -2),
        ("+2s", 2),
    ],
)
def test_a_duration_is_parsed_as_in_go(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "is not a duration"),
        ("-", "is not a duration"),
        ("10", "has no unit"),
        ("1m30", "has no unit"),
        ("1d", "unknown unit 'd'"),
        ("10S", "unknown unit 'S'"),
        ("s", "no number before 's'"),
        (".s", "no number before 's'"),
        ("1m 30s", "is not a duration"),
        ("10000000h", "too long"),
    ],
)
def test_an_invalid_duration_is_rejected_with_a_reason(text, wrong):
    with pytest.raises(ValueError, match=wrong):
        parse_duration(text)


@pytest.mark.parametrize("parse", [parse_duration, parse_quantity])
@pytest.mark.parametrize("end", ["", "!", ".", ".1!", "s", "x", "1m!"])
def test_a_text_as_long_as_a_file_is_rejected_in_linear_time(parse, end):
    """In quadratic time, each of these takes hours."""
    with pytest.raises(ValueError, match="111"):
        parse("1" * 1_000_000 + end)


@pytest.mark.parametrize("schema", [MAX_WAIT_SCHEMA, _UNITS["duration"], _UNITS["quantity"]])
def test_patterns_of_schemas_reject_a_long_text_in_linear_time(schema):
    pattern = re.compile(schema["pattern"])
    assert pattern.search("1" * 100_000 + "!") is None
    assert pattern.search("123456789ms.5s" * 10_000 + "!") is None


@pytest.mark.parametrize("zeros", ["0" * 5000, ""])
def test_digits_beyond_a_nanosecond_are_ignored(zeros):
    assert parse_duration(f"{zeros}1.5{zeros}1s") == pytest.approx(1.5, abs=0.02)


def format_duration(seconds: float) -> str:
    """Format seconds as Go does: ``90`` is ``1m30s``, ``0.25`` is ``250ms``."""
    ns = round(seconds * 1e9)
    if ns == 0:
        return "0s"
    sign, ns = ("-", -ns) if ns < 0 else ("", ns)
    for unit, scale in (("ns", 1), ("µs", 1_000), ("ms", 1_000_000)):
        if ns < scale * 1_000:
            return f"{sign}{decimal(ns, scale)}{unit}"
    minutes, remainder = divmod(ns, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{decimal(remainder, 1_000_000_000)}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    if hours:
        text = f"{hours}h{text}"
    return sign + text


def decimal(value: int, scale: int) -> str:
    whole, remainder = divmod(value, scale)
    if not remainder:
        return str(whole)
    digits = len(str(scale)) - 1
    return f"{whole}.{remainder:0{digits}d}".rstrip("0")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (90, "1m30s"),
        (600, "10m0s"),
        (3600, "1h0m0s"),
        (0.25, "250ms"),
        (1.5e-3, "1.5ms"),
        (2e-6, "2µs"),
        (5e-9, "5ns"),
        (3600.5, "1h0m0.5s"),
        (-3, "-3s"),
    ],
)
def test_a_duration_as_go_formats_it_is_parsed(seconds, text):
    assert format_duration(seconds) == text
    assert parse_duration(text) == pytest.approx(seconds)


@given(st.integers(0, 10**15))
def test_a_formatted_duration_parses_to_the_same_value(microseconds):
    seconds = microseconds / 1e6
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-6)
