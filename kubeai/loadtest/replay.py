"""``kubeai bench replay``: what each strategy would have done with recorded requests.

The record is KubeAI's access log or a trace file. With an access log, what the gateway measured is
shown beside the simulated results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kubeai.loadtest import simulate
from kubeai.loadtest.arguments import OptionError
from kubeai.loadtest.reports.output import Outputs
from kubeai.loadtest.scenario import OpenLoop, TraceReplay
from kubeai.loadtest.simulate import LogReplay, Simulation
from kubeai.simulation import results
from kubeai.simulation.access_logs import AccessLog, is_access_log, read_access_log
from kubeai.simulation.results import Gaps, Objective, Results, Selection

ENGINES = 8  # of a trace; a log has its own number


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command; None uses the default."""

    path: Path
    model: str | None = None  # of an access log
    output_tokens: int | None = None  # of an access log
    block_tokens: int | None = None  # of a trace
    speed: float = 1.0
    requests_max: int | None = None
    preset: str
    engines: int | None = None
    strategies: str
    objective: Objective = Objective()
    selection: Selection = Selection()
    warm_up_s: float = 0.0
    seed: int = 1
    engine_and_ring: dict[str, Any] = {}  # further arguments of `simulate.settings`


def run(replay: Replay, outputs: Outputs) -> int:
    """Simulate each strategy, then print and write the results.

    TrafficError if the file cannot be used, OptionError if an option does not fit it.
    """
    if replay.speed <= 0:
        raise OptionError("--speed: must be more than 0")
    if is_access_log(replay.path):
        _refuse("a trace", ("--trace-block-tokens", replay.block_tokens))
        _refuse(
            "a trace: the log has the Model's own hash keys",
            ("--prefix-char-length", replay.engine_and_ring.get("prefix_char_length")),
        )
        log = read_access_log(replay.path, replay.model)
        traffic: LogReplay | TraceReplay = LogReplay(
            str(replay.path), log.model, replay.speed, replay.output_tokens
        )
        measured, engines = _measured(replay, log), replay.engines or log.endpoints
    else:
        of_log = (("--model", replay.model), ("--output-len", replay.output_tokens))
        _refuse("an access log", *of_log)
        traffic = TraceReplay(
            str(replay.path), replay.speed, replay.block_tokens, replay.requests_max
        )
        measured, engines = None, replay.engines or ENGINES
    simulation = Simulation(
        traffic=traffic,
        load=OpenLoop(),
        preset=replay.preset,
        settings=simulate.settings(
            preset=replay.preset,
            engines=engines,
            strategies=replay.strategies,
            concurrencies=[1],  # of those without a start time: none
            seed=replay.seed,
            **replay.engine_and_ring,
        ),
        seed=replay.seed,
        warm_up_s=replay.warm_up_s,
        requests_max=replay.requests_max,
        objective=replay.objective,
        selection=replay.selection,
    )
    return simulate.run(simulation, outputs, measured)


def _refuse(what: str, *options: tuple[str, object]) -> None:
    for name, value in options:
        if value is not None:
            raise OptionError(f"{name}: is only for {what}")


def _measured(replay: Replay, log: AccessLog) -> Results:
    """The log's own figures, of the requests that are replayed."""
    requests = log.requests[: replay.requests_max]
    return results.summarize(
        "measured",
        {"access log": str(replay.path), "model": log.model, "endpoints": log.endpoints},
        [request.measurement(number) for number, request in enumerate(requests)],
        Gaps(),
        warm_up_s=replay.warm_up_s,
        objective=replay.objective,
        selection=replay.selection,
        warnings=log.warnings,
    )
