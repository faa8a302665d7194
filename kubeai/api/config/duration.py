"""Parses Go's durations (``1m30s``, ``250ms``) to seconds."""

from __future__ import annotations

import re

from kubeai.errors import quoted

# In nanoseconds, so that sums are exact.
_UNITS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5, micro sign
    "μs": 1_000,  # U+03BC, Greek mu
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_PART = re.compile(r"(?P<whole>\d*)(?:\.(?P<fraction>\d*))?(?P<unit>[a-zµμ]+)", re.ASCII | re.I)
# Durations come in headers too: no pattern may take more than linear time for any text.
_NUMBER = re.compile(r"\d*(\.\d*)?", re.ASCII)
_MAX_NS = 2**63 - 1  # Go's maximum, about 292 years
_DIGITS_MAX = 19  # of _MAX_NS


def parse_duration(text: str) -> float:
    """Parse a duration to seconds, like Go's time.ParseDuration. ValueError if it is invalid."""
    negative = text.startswith("-")
    unsigned = text[1:] if text[:1] in ("-", "+") else text
    if unsigned == "0":
        return 0.0
    if not unsigned:
        raise ValueError(f"{quoted(text)} is not a duration such as 1m30s or 250ms")
    total = 0
    position = 0
    while position < len(unsigned):
        match = _PART.match(unsigned, position)
        if match is None:
            missing = _NUMBER.fullmatch(unsigned, position) is not None
            why = "has no unit" if missing else "is not a duration"
            raise ValueError(f"{quoted(text)} {why}; write it as 1m30s or 250ms")
        total += _part_ns(text, match)
        position = match.end()
    if total > _MAX_NS:
        raise ValueError(f"{quoted(text)} is too long")
    return (-total if negative else total) / 1e9


def _part_ns(text: str, match: re.Match[str]) -> int:
    whole, fraction, unit = match["whole"], match["fraction"] or "", match["unit"]
    if unit not in _UNITS:
        raise ValueError(
            f"{quoted(text)} has the unknown unit {quoted(unit)}; known: ns, us, ms, s, m, h"
        )
    if not whole and not fraction:
        raise ValueError(f"{quoted(text)} has no number before {unit!r}")
    whole, fraction = whole.lstrip("0"), fraction[: 2 * _DIGITS_MAX]  # the rest is less than 1 ns
    if len(whole) > _DIGITS_MAX:
        raise ValueError(f"{quoted(text)} is too long")
    scale = _UNITS[unit]
    divisor: int = 10 ** len(fraction)
    return int(whole or 0) * scale + int(fraction or 0) * scale // divisor
