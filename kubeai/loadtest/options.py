"""Converts command-line options to a `Scenario`'s parts; OptionError names the invalid option."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, cast, get_args

import msgspec

from kubeai.api.config.duration import parse_duration
from kubeai.errors import KubeAIError
from kubeai.loadtest.scenario import ENDLESS, ClosedLoop, OpenLoop, ShareGpt, Synthetic, TraceReplay
from kubeai.simulation.traffic import SHAPES, Arrivals

CONCURRENCY = 32
Arrival = Literal["poisson", "constant", "bursts", "ramp"]


class OptionError(KubeAIError):
    """An option is invalid; the message begins with its name."""


def seconds(
    option: str, text: str | None, default: float = 0.0, *, positive: bool = False
) -> float:
    """Parse a duration such as ``1m30s``; ``default`` applies when the option is not given."""
    if text is None:
        return default
    try:
        value = parse_duration(text)
    except ValueError as error:
        raise OptionError(f"{option}: {error}") from None
    if value < 0:
        raise OptionError(f"{option}: {text} is negative")
    if positive and not value:
        raise OptionError(f"{option}: must be more than 0")
    return value


def headers(lines: list[str], api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Parse lines such as ``X-Label-Selector: tier=fast``; add Authorization for the API key."""
    found = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name.strip() or not line.isprintable():
            raise OptionError(f"--header: {line!r} is not 'Name: value'")
        found.append((name.strip(), value.strip()))
    if api_key and "authorization" not in {name.lower() for name, _ in found}:
        found.append(("Authorization", f"Bearer {api_key}"))
    return tuple(found)


def fields(option: str, text: str | None) -> dict[str, Any]:
    """Parse an option that adds fields to requests: a JSON object such as ``{"ignore_eos": true}``.

    None and "" mean no fields. OptionError names the option.
    """
    try:
        found = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError as error:
        raise OptionError(f"{option}: {error}") from None
    if not isinstance(found, dict):
        raise OptionError(f"{option}: {text!r} is not a JSON object")
    return found


def traffic(
    *,
    shape: str | None,
    changes: dict[str, Any],
    seed: int,
    endless: bool,
    sharegpt: Path | None,
    messages_min: int,
    trace: Path | None,
    speed: float,
    trace_block_tokens: int | None = None,
    trace_requests: int | None = None,
) -> Synthetic | ShareGpt | TraceReplay:
    """``changes`` override the shape's fields; None keeps a field. ``endless`` means that the load
    is bounded by other options."""
    given = {name: value for name, value in changes.items() if value is not None}
    sources = {"--shape": shape, "--sharegpt": sharegpt, "--trace": trace}
    if len(named := [name for name, value in sources.items() if value is not None]) > 1:
        raise OptionError(f"{named[1]}: cannot be combined with {named[0]}")
    of_trace = {"trace-block-tokens": trace_block_tokens, "trace-requests": trace_requests}
    for option, value in of_trace.items():
        if value is not None and trace is None:
            raise OptionError(f"--{option}: requires --trace")
    if sharegpt is None and trace is None:
        name = shape or "chat"
        if name not in SHAPES:
            raise OptionError(f"--shape: {name!r} is not one of {', '.join(SHAPES)}")
        if endless:
            given.setdefault("conversations", ENDLESS)
        return Synthetic(name, msgspec.structs.replace(SHAPES[name], **given), seed)
    if given:
        option = {"think_s": "think-time"}.get(next(iter(given)), next(iter(given)))
        raise OptionError(f"--{option.replace('_', '-')}: cannot be combined with {named[0]}")
    if sharegpt is not None:
        return ShareGpt(str(sharegpt), messages_min)
    if speed <= 0:
        raise OptionError("--speed: must be more than 0")
    return TraceReplay(str(trace), speed, trace_block_tokens, trace_requests)


def load(
    *,
    concurrency: int | None,
    rate: float | None,
    arrivals: str | None,
    burst: int | None,
    until_rate: float | None,
    ramp_time: str | None,
    timed: bool,
) -> ClosedLoop | OpenLoop:
    """``timed``: the traffic carries its own start times."""
    of_rate = {"arrivals": arrivals, "burst": burst, "until-rate": until_rate}
    given = [name for name, value in (of_rate | {"ramp-time": ramp_time}).items() if value]
    if rate is None:
        if given:
            raise OptionError(f"--{given[0]}: requires --rate")
        if timed and concurrency is None:
            return OpenLoop()
        return ClosedLoop(concurrency or CONCURRENCY)
    if concurrency is not None:
        raise OptionError("--rate: cannot be combined with --concurrency")
    if rate <= 0:
        raise OptionError("--rate: must be more than 0")
    kind = arrivals or "poisson"
    if kind not in get_args(Arrival):
        raise OptionError(f"--arrivals: {kind!r} is not one of {', '.join(get_args(Arrival))}")
    if kind == "ramp" and not (until_rate and until_rate > 0):
        raise OptionError("--until-rate: a ramp requires a final rate greater than 0")
    return OpenLoop(
        Arrivals(
            per_s=rate,
            kind=cast(Arrival, kind),
            burst=burst or 10,
            until_per_s=until_rate or 0.0,
            ramp_s=seconds("--ramp-time", ramp_time, 60.0, positive=True),
        )
    )


def counts(option: str, text: str | None) -> list[int]:
    """Parse ``100,200,400``; empty if the option is not given."""
    try:
        found = [int(part) for part in (text or "").split(",") if text]
    except ValueError:
        found = [0]
    if any(count < 1 for count in found):
        raise OptionError(f"{option}: {text!r} is not a number or a list such as 100,200,400")
    return found


def folder(option: str, path: Path | None) -> Path | None:
    """Create the output folder if it does not exist."""
    if path is None:
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{option}: {path}: {error.strerror}") from None
    return path


def writable(option: str, path: Path | None) -> Path | None:
    """Check before the run that the output file can be written after it."""
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{option}: {path.parent}: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OptionError(f"{option}: {path} is not writable")
    return path
