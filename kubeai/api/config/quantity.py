"""Exact Kubernetes quantities (``500m``, ``1.5Gi``, ``2e3``), formatted as Kubernetes does.

Used to multiply a resource profile by its count, to read sizes in the system config, and by the
embedded API and the kubelet for the quantities of pods. The canonical form follows apimachinery's
resource.Quantity: no precision is lost, there are no fractional digits, and the suffix is the
largest for which both hold.
"""

from __future__ import annotations

import re
from enum import Enum
from fractions import Fraction
from typing import NamedTuple

from kubeai.errors import quoted

_NUMBER_MAX_CHARS = 200
_NANO = 10**9
_MAX_NANOS = (2**63 - 1) * _NANO
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}  # powers of 1024
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY_SUFFIX = {power: suffix for suffix, power in _BINARY.items()} | {0: ""}
_DECIMAL_SUFFIX = {exponent: suffix for suffix, exponent in _DECIMAL.items()}
_QUANTITY = re.compile(
    r"(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))"
    r"(?:[eE](?P<exponent>[+-]?\d{1,3})|(?P<suffix>[a-zA-Z]*))",
    re.ASCII,
)


class Format(Enum):
    """The notation of a quantity, which is kept when it is formatted."""

    BINARY = "binary"  # 1Gi
    DECIMAL = "decimal"  # 500m
    EXPONENT = "exponent"  # 2e3


class Quantity(NamedTuple):
    """An exact amount in billionths, Kubernetes' finest unit."""

    nanos: int
    format: Format = Format.DECIMAL

    def __mul__(self, count: object) -> Quantity:
        if not isinstance(count, int):
            return NotImplemented
        return Quantity(self.nanos * count, self.format)

    def whole(self) -> int | None:
        """The amount as an integer, or None if it has a fraction."""
        value, remainder = divmod(self.nanos, _NANO)
        return None if remainder else value

    def __str__(self) -> str:
        if self.nanos == 0:
            return "0"
        sign, nanos = ("-", -self.nanos) if self.nanos < 0 else ("", self.nanos)
        value, remainder = divmod(nanos, _NANO)
        # Below 1024, and for fractions, Kubernetes does not use binary suffixes.
        if self.format is Format.BINARY and value >= 1024 and not remainder:
            return sign + _binary(value)
        return sign + _decimal(nanos, self.format is Format.EXPONENT)


def parse_quantity(text: str | int | float) -> Quantity:
    """Parse a quantity, rounding up to a billionth. ValueError if it is invalid."""
    match, given = _QUANTITY.fullmatch(str(text)), quoted(str(text))
    if match is None:
        raise ValueError(f"{given} is not a quantity such as 500m, 2 or 1.5Gi")
    if len(match["number"]) > _NUMBER_MAX_CHARS:
        raise ValueError(f"{given} has a number of more than {_NUMBER_MAX_CHARS} characters")
    suffix = match["suffix"] or ""
    if match["exponent"] is not None:
        scale, form = Fraction(10) ** int(match["exponent"]), Format.EXPONENT
    elif suffix in _BINARY:
        scale, form = Fraction(1024) ** _BINARY[suffix], Format.BINARY
    elif suffix in _DECIMAL:
        scale, form = Fraction(10) ** _DECIMAL[suffix], Format.DECIMAL
    else:
        known = ", ".join([*(s for s in _DECIMAL if s), *_BINARY])
        raise ValueError(f"{given} has the unknown suffix {quoted(suffix)}; known: {known}")
    exact = Fraction(match["number"]) * scale * _NANO
    nanos = -(-abs(exact.numerator) // exact.denominator)  # away from zero, like Kubernetes
    if nanos > _MAX_NANOS:
        raise ValueError(f"{given} is more than Kubernetes can hold (2^63 - 1)")
    return Quantity(-nanos if exact < 0 else nanos, form)


def _binary(value: int) -> str:
    power = 0
    while power < 6 and value % 1024 == 0:
        value //= 1024
        power += 1
    return f"{value}{_BINARY_SUFFIX[power]}"


def _decimal(nanos: int, exponential: bool) -> str:
    """Format with the largest power of 1000 that leaves an integer: "1500m", "2k" or "2e3"."""
    exponent = -9
    while exponent < 18 and nanos % 1000 == 0:
        nanos //= 1000
        exponent += 3
    if not exponential:
        return f"{nanos}{_DECIMAL_SUFFIX[exponent]}"
    return f"{nanos}e{exponent}" if exponent else str(nanos)
