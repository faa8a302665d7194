"""Load traces for the autoscaler's simulator. Pure.

A load is the concurrency without any queueing, in units of one replica's target: 8 means that eight
replicas are needed. In open traces requests arrive regardless of completions; in closed traces a
number of clients each send the next request when the previous one completes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import msgspec


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """The offered load of a Model over time."""

    name: str
    duration_s: float
    offered: Callable[[float], float]  # time → replicas needed
    most: float  # the largest that `offered` returns
    closed: bool = False


def _noisy(
    offered: Callable[[float], float], duration_s: float, share: float, seed: int
) -> Callable[[float], float]:
    """Multiply the load by a random factor of about 1 ± share that changes every 10 s."""
    rng = random.Random(seed)
    factors = [min(2.0, max(0.0, rng.gauss(1.0, share))) for _ in range(int(duration_s / 10) + 2)]
    return lambda now_s: offered(now_s) * factors[int(now_s / 10)]


def _trace(
    name: str,
    duration_s: float,
    offered: Callable[[float], float],
    *,
    noise: float = 0.1,
    closed: bool = False,
) -> Trace:
    if noise:
        offered = _noisy(offered, duration_s, noise, seed=7)
    most = max(offered(now_s) for now_s in range(int(duration_s)))
    return Trace(name=name, duration_s=duration_s, offered=offered, most=most, closed=closed)


def _diurnal(now_s: float) -> float:
    """A day compressed to two hours: low at night, with two peaks."""
    day = now_s / 7200 * 2 * math.pi
    return 3.2 - 2.6 * math.cos(day) - 1.2 * math.cos(2 * day + 0.6)


def traces() -> list[Trace]:
    """The traces on which the rules are compared."""
    return [
        _trace("steady", 3600, lambda _: 3.95, noise=0.1),
        _trace("step", 3000, lambda t: 0.9 if t < 600 or t >= 2400 else 7.8, noise=0.03),
        _trace("spike", 2400, lambda t: 7.8 if 600 <= t < 690 else 0.9, noise=0.03),
        _trace("ramp", 3000, lambda t: 0.9 + 6.9 * min(1.0, max(0.0, (t - 600) / 900))),
        _trace("sawtooth", 3600, lambda t: 1.0 + 7.0 * (t % 900) / 900),
        _trace("on-off", 3600, lambda t: 6.0 if t % 240 < 120 else 0.5),
        _trace("diurnal", 7200, _diurnal),
        _trace("cold", 2400, lambda t: 0.0 if t < 300 else 2.7),
        _trace("clients", 3000, lambda t: 1.0 if t < 600 else 8.0, noise=0.0, closed=True),
        _trace("clients-ramp", 2400, _climb, noise=0.0, closed=True),
    ]


def _climb(now_s: float) -> float:
    return 1.0 + 7.0 * min(1.0, max(0.0, (now_s - 600) / 60))
