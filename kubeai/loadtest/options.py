"""Converts command-line options to a `Scenario`'s parts; OptionError names the invalid option."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import msgspec

from kubeai.api.config.duration import parse_duration
from kubeai.loadtest import arguments
from kubeai.loadtest.arguments import OptionError
from kubeai.loadtest.scenario import (
    ENDLESS,
    ClosedLoop,
    Exact,
    Load,
    MessageStream,
    OpenLoop,
    RequestLoop,
    Scenario,
    ShareGpt,
    Synthetic,
    TraceReplay,
    Traffic,
)
from kubeai.openai.credentials import authorization
from kubeai.simulation.results import DEFAULT_METRICS, METRICS, Limit, Objective, Selection
from kubeai.simulation.traffic import SHAPES, Arrivals, RandomLengths

CONCURRENCY = 32
NUM_PROMPTS = 1000
RANDOM = "random"  # the shape of exact lengths
STREAMED = ("ttft", "tpot", "itl")  # metrics of streamed responses
ERRORS_MAX_PERCENT = 1.0  # of a sweep's runs, unless an SLO says otherwise
Arrival = Literal["poisson", "constant", "bursts", "ramp"]


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
        found.extend(authorization(api_key).items())
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


# Fields of `arguments.Traffic` that change a generated shape, by the name of the shape's field.
_OF_SHAPE = {
    name: name
    for name in (
        *("conversations", "turns", "systems", "system_tokens", "documents", "document_tokens"),
        *("prompt_tokens", "turn_tokens", "reply_tokens"),
    )
} | {"think_time": "think_s"}
_OF_LENGTHS = ("input_len", "output_len", "random_range_ratio", "random_prefix_len")


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def traffic(given: arguments.Traffic, *, endless: bool = False) -> Traffic:
    """What to send. ``endless``: the load is bounded by other options."""
    sources = {"--shape": given.shape, "--sharegpt": given.sharegpt, "--trace": given.trace}
    named = [name for name, value in sources.items() if value is not None]
    if len(named) > 1:
        raise OptionError(f"{named[1]}: cannot be combined with {named[0]}")
    for field in ("trace_block_tokens", "trace_requests"):
        if getattr(given, field) is not None and given.trace is None:
            raise OptionError(f"{_flag(field)}: requires --trace")
    lengths = [name for name in _OF_LENGTHS if getattr(given, name) is not None]
    changes = {
        field: getattr(given, name)
        for name, field in _OF_SHAPE.items()
        if getattr(given, name) is not None
    }
    if changes.get("think_s") is not None:
        changes["think_s"] = seconds("--think-time", changes["think_s"])
    of_shape = [_flag(name) for name in _OF_SHAPE if getattr(given, name) is not None]
    of_files = given.sharegpt is not None or given.trace is not None
    if given.shape == RANDOM or (lengths and given.shape in (None, "embeddings") and not of_files):
        if of_shape:
            why = _flag(lengths[0]) if lengths else f"--shape {RANDOM}"
            raise OptionError(f"{of_shape[0]}: cannot be combined with {why}")
        return Exact(_lengths(given), given.seed)
    if lengths:
        other = named[0] if given.shape is None else f"--shape {given.shape}"
        raise OptionError(f"{_flag(lengths[0])}: cannot be combined with {other}")
    if not of_files:
        return _synthetic(given, changes, endless=endless)
    if of_shape:
        raise OptionError(f"{of_shape[0]}: cannot be combined with {named[0]}")
    if given.sharegpt is not None:
        return ShareGpt(str(given.sharegpt), given.messages_min)
    if given.speed <= 0:
        raise OptionError("--speed: must be more than 0")
    return TraceReplay(
        str(given.trace), given.speed, given.trace_block_tokens, given.trace_requests
    )


def _synthetic(given: arguments.Traffic, changes: dict[str, Any], *, endless: bool) -> Synthetic:
    name = given.shape or "chat"
    if name not in SHAPES:
        raise OptionError(f"--shape: {name!r} is not one of {', '.join((*SHAPES, RANDOM))}")
    if endless:
        changes.setdefault("conversations", ENDLESS)
    return Synthetic(name, msgspec.structs.replace(SHAPES[name], **changes), given.seed)


def _lengths(given: arguments.Traffic) -> RandomLengths:
    ratios = _range_ratio(given.random_range_ratio or "0")
    known: dict[str, Any] = {"input_len": given.input_len, "output_len": given.output_len}
    known["prefix_len"] = given.random_prefix_len
    found = RandomLengths(
        **{name: value for name, value in known.items() if value is not None},
        input_ratio=ratios.input,
        output_ratio=ratios.output,
        kind="embeddings" if given.shape == "embeddings" else "chat",
    )
    if found.kind == "embeddings" and given.output_len is not None:
        raise OptionError("--output-len: embeddings have no output")
    check_lengths(found)
    return found


def check_lengths(lengths: RandomLengths) -> None:
    """OptionError if the shortest input is not longer than what the engine adds to the text."""
    if lengths.shortest <= lengths.added_tokens:
        raise OptionError(
            f"--input-len: the shortest prompt would have {lengths.shortest} tokens, but the "
            f"engine's chat template alone takes {lengths.added_tokens}"
        )


class _Ratios(msgspec.Struct, forbid_unknown_fields=True):
    input: float = 0.0
    output: float = 0.0


def _range_ratio(text: str) -> _Ratios:
    try:
        if text.lstrip().startswith("{"):
            found = msgspec.json.decode(text, type=_Ratios)
        else:
            found = _Ratios(float(text), float(text))
    except ValueError:
        found = _Ratios(-1.0)
    if not (0 <= found.input < 1 and 0 <= found.output < 1):
        raise OptionError(
            f"--random-range-ratio: {text!r} is neither a number from 0 to 1 (excluded) nor an "
            'object such as {"input": 0.3, "output": 0.5}'
        )
    return found


def is_exact(given: arguments.Traffic) -> bool:
    """Whether the traffic has lengths in tokens."""
    return given.shape == RANDOM or any(getattr(given, name) is not None for name in _OF_LENGTHS)


def is_shape_given(given: arguments.Traffic) -> bool:
    """Whether the options say which kind of traffic to send."""
    return any(value is not None for value in (given.shape, given.sharegpt, given.trace))


def check_bounds(scenario: Scenario) -> None:
    """OptionError if the load would start an unlimited number of requests at once."""
    if not isinstance(scenario.load, RequestLoop) or scenario.load.arrivals is not None:
        return
    unlimited = scenario.requests_max is None and scenario.in_flight_max is None
    traffic = scenario.traffic
    endless = isinstance(traffic, Exact) or (
        isinstance(traffic, Synthetic) and traffic.shape.conversations == ENDLESS
    )
    if unlimited and endless:
        raise OptionError(
            "--duration: requires a finite --request-rate, --max-concurrency or --num-prompts"
        )


def num_prompts(given: arguments.Load, *, bounded: bool, exact: bool) -> int | None:
    """The limit on requests. ``bounded``: other options end the run. ``exact``: lengths are given.

    The default is vLLM's if the load is one of requests.
    """
    if given.num_prompts is not None or bounded:
        return given.num_prompts
    of_conversations = given.concurrency is not None or given.rate is not None
    of_requests = given.request_rate is not None or given.max_concurrency is not None
    return NUM_PROMPTS if exact or (of_requests and not of_conversations) else None


def load(given: arguments.Load, *, timed: bool = False, exact: bool = False) -> Load:
    """When to send it. ``timed``: the traffic has start times. ``exact``: lengths are given."""
    rates = {"--request-rate": given.request_rate, "--rate": given.rate}
    named = [name for name, value in rates.items() if value is not None]
    if len(named) > 1:
        raise OptionError("--rate: cannot be combined with --request-rate, which counts requests")
    if named and given.concurrency is not None:
        raise OptionError(f"{named[0]}: cannot be combined with --concurrency")
    if not named or given.request_rate == math.inf:
        fields = ("arrivals", "burst", "until_rate", "ramp_time", "burstiness")
        for name in fields:
            if getattr(given, name) is not None:
                rate = "--request-rate or --rate" if not named else "a finite --request-rate"
                raise OptionError(f"{_flag(name)}: requires {rate}")
    if given.rate is not None:
        return OpenLoop(_arrivals("--rate", given.rate, given))
    if given.concurrency is not None:
        return ClosedLoop(counts("--concurrency", given.concurrency)[0])
    if given.request_rate is not None:
        if given.request_rate == math.inf:
            return RequestLoop()
        return RequestLoop(_arrivals("--request-rate", given.request_rate, given))
    if timed:
        return OpenLoop()
    if exact or given.num_prompts is not None or given.max_concurrency is not None:
        return RequestLoop()
    return ClosedLoop(CONCURRENCY)


def _arrivals(option: str, rate: float, given: arguments.Load) -> Arrivals:
    if not 0 < rate < math.inf:
        raise OptionError(f"{option}: must be more than 0 and finite")
    kind = given.arrivals or "poisson"
    if kind not in get_args(Arrival):
        raise OptionError(f"--arrivals: {kind!r} is not one of {', '.join(get_args(Arrival))}")
    if kind == "ramp" and not (given.until_rate and given.until_rate > 0):
        raise OptionError("--until-rate: a ramp requires a final rate greater than 0")
    burstiness = 1.0 if given.burstiness is None else given.burstiness
    if not burstiness > 0:
        raise OptionError("--burstiness: must be more than 0")
    if given.burstiness is not None and kind != "poisson":
        raise OptionError(f"--burstiness: cannot be combined with --arrivals {kind}")
    return Arrivals(
        per_s=rate,
        kind=cast(Arrival, kind),
        burstiness=burstiness,
        burst=given.burst or 10,
        until_per_s=given.until_rate or 0.0,
        ramp_s=seconds("--ramp-time", given.ramp_time, 60.0, positive=True),
    )


def via(url: str, model: str, given: arguments.Sending) -> MessageStream | None:
    """Where requests are sent by message; None: over HTTP."""
    if given.via is None:
        if given.via_responses is not None:
            raise OptionError("--via-responses: requires --via")
        return None
    if given.via_responses is None:
        raise OptionError("--via: requires --via-responses, which receives the responses")
    if not (url or model):
        raise OptionError("--via: requires --model, or the endpoint's URL to find its model")
    return MessageStream(given.via, given.via_responses)


def check_by_message(
    sending: arguments.Sending,
    judging: arguments.Judging,
    processes: int,
    limits: Sequence[Limit] = (),
) -> None:
    """OptionError if an option needs what messages lack. No effect without ``--via``."""
    if sending.via is None:
        return
    if processes > 1:
        raise OptionError("--processes: must be 1 with --via, whose responses arrive at one place")
    if sending.header:
        raise OptionError("--header: cannot be combined with --via, because messages have none")
    found = objective(judging)
    streamed = {"--goodput": found.ttft_s or found.tpot_s}
    streamed["--slo"] = any(limit.metric in STREAMED for limit in limits)
    streamed["--percentile-metrics"] = judging.percentile_metrics is not None and any(
        name in STREAMED for name in selection(judging).metrics
    )
    for option, is_streamed in streamed.items():
        if is_streamed:
            raise OptionError(
                f"{option}: {', '.join(STREAMED)} cannot be measured with --via, because a message "
                "has the whole response; use e2el"
            )


def selection(given: arguments.Judging, *, by_message: bool = False) -> Selection:
    """The metrics and percentiles to report. A metric that the traffic lacks is left out."""
    metrics: tuple[str, ...] = ("e2el",) if by_message else DEFAULT_METRICS
    if given.percentile_metrics is not None:
        metrics = tuple(part.strip() for part in given.percentile_metrics.split(","))
        for name in metrics:
            if name not in METRICS:
                raise OptionError(
                    f"--percentile-metrics: {name!r} is not one of {', '.join(METRICS)}"
                )
    if given.metric_percentiles is None:
        return Selection(metrics)
    try:
        found = [float(part) for part in given.metric_percentiles.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 < each < 100 for each in found):
        raise OptionError(
            f"--metric-percentiles: {given.metric_percentiles!r} is not a list of numbers between "
            "0 and 100, such as 50,99"
        )
    return Selection(metrics, tuple(sorted(set(found))))


def with_limits(found: Selection, limits: Sequence[Limit]) -> Selection:
    """The selection with all that these SLOs refer to."""
    of_metrics = [limit for limit in limits if limit.metric in METRICS]
    figures = [limit.figure for limit in of_metrics if limit.figure != "mean"]
    metrics = dict.fromkeys((*found.metrics, *(limit.metric for limit in of_metrics)))
    percentiles = {*found.percentiles, *(float(figure[1:]) for figure in figures)}
    return Selection(tuple(metrics), tuple(sorted(percentiles)))


def objective(given: arguments.Judging) -> Objective:
    """The limits for goodput; several may be given in one option, separated by spaces."""
    found: dict[str, float] = {}
    for part in [
        part for text in given.goodput or () for part in re.split(r"[\s,]+", text) if part
    ]:
        name, _, value = part.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise OptionError(
                f"--goodput: {part!r} is not ttft, tpot or e2el with a limit, such as ttft:500ms"
            )
        found[f"{name}_s"] = _milliseconds("--goodput", value) / 1e3
    return Objective(**found)


def limits(texts: Sequence[str]) -> list[Limit]:
    """The SLOs of a sweep: ``ttft:p99:500ms``, ``tpot:mean:50``, ``goodput:95`` or ``errors:1``."""
    found = [_limit(part) for text in texts for part in re.split(r"[\s,]+", text) if part]
    if not any(limit.metric == "errors" for limit in found):
        found.append(Limit("errors", most=ERRORS_MAX_PERCENT))
    return found


def _limit(text: str) -> Limit:
    name, _, rest = text.partition(":")
    if name in ("goodput", "errors"):
        try:
            percent = float(rest.removesuffix("%"))
        except ValueError:
            percent = -1.0
        if not 0 <= percent <= 100:
            raise OptionError(f"--slo: {text!r} is not a percentage of requests, such as {name}:95")
        return Limit(name, least=percent) if name == "goodput" else Limit(name, most=percent)
    figure, _, value = rest.rpartition(":")
    figure = figure or "p99"
    if not (name in METRICS and value and re.fullmatch(r"mean|p\d{1,2}(\.\d+)?", figure)):
        raise OptionError(
            f"--slo: {text!r} is not a metric ({', '.join(METRICS)}), mean or a percentile, and a "
            "limit, such as ttft:p99:500ms"
        )
    return Limit(name, figure, most=_milliseconds("--slo", value))


def _milliseconds(option: str, text: str) -> float:
    """A duration, or a number of milliseconds."""
    try:
        value = float(text)
    except ValueError:
        return seconds(option, text, positive=True) * 1e3
    if not 0 < value < math.inf:
        raise OptionError(f"{option}: {text} must be more than 0 and finite")
    return value


def counts(option: str, text: str | None) -> list[int]:
    """Parse ``100,200,400``; empty if the option is not given."""
    if text is None:
        return []
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if any(count < 1 for count in found):
        raise OptionError(f"{option}: {text!r} is not a number or a list such as 100,200,400")
    return found


def rates(option: str, text: str | None) -> list[float]:
    """Parse ``0.5,1,2``; empty if the option is not given."""
    if text is None:
        return []
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < rate < math.inf for rate in found):
        raise OptionError(f"{option}: {text!r} is not a list of positive numbers such as 1,2,4")
    return found


def writable(option: str, path: Path | None) -> Path | None:
    """Check before the run that the output file can be written after it."""
    if path is None:
        return None
    if path.is_dir():
        raise OptionError(f"{option}: {path} is a folder: give a file, which has all runs")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{option}: {path.parent}: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OptionError(f"{option}: {path} is not writable")
    return path
