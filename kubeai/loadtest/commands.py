"""The commands of ``kubeai bench``. Each command imports its dependencies when it runs."""

# No `from __future__ import annotations`: typer evaluates the annotations.
import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from kubeai.loadtest import arguments
from kubeai.loadtest.arguments import (
    ENGINES,
    JUDGING,
    LOAD,
    TRAFFIC,
    Command,
    NumPrompts,
    OptionError,
    TraceBlockTokens,
    WarmUp,
    grouped,
    option,
)
from kubeai.terminal.help import help_of

SIMULATED_ENGINES = 8
EndpointUrl = Annotated[
    str,
    typer.Argument(
        help="Base URL of the endpoint, such as http://host:port/openai/v1. Required without "
        "--via.",
        show_default=False,
    ),
]
OptionalUrl = Annotated[
    str,
    typer.Argument(
        help="Base URL of the endpoint. Without one, each strategy on simulated engines."
    ),
]
Duration = Annotated[
    str | None,
    option(
        "Start no request later than this after the warm-up; in-flight requests complete.",
        LOAD,
    ),
]


def app() -> typer.Typer:
    """The ``kubeai bench`` command group."""
    bench = typer.Typer(help="Benchmark an OpenAI-compatible endpoint.", no_args_is_help=True)
    for command in (run, sweep, simulate, replay, compare, demo):
        help = help_of(command)
        bench.command(command.__name__, cls=Command, help=help)(grouped(command))
    return bench


def run(
    traffic: arguments.Traffic,
    load: arguments.Load,
    sending: arguments.Sending,
    judging: arguments.Judging,
    files: arguments.Files,
    url: EndpointUrl = "",
    model: arguments.Model = "",
    duration: Duration = None,
    processes: arguments.Processes = 1,
    name: Annotated[str, option("Name of this run in comparisons.", JUDGING)] = "",
) -> None:
    """Send load to an OpenAI-compatible endpoint and report latency and throughput.

    Options with the names of vLLM's `vllm bench serve` mean the same. Durations are written 500ms,
    60s or 1m30s. Ctrl-C keeps what was measured so far.
    """
    import math

    from kubeai.loadtest import options
    from kubeai.loadtest import run as running
    from kubeai.loadtest.reports import output

    if not url and sending.via is None:
        raise OptionError("URL: required without --via")
    options.check_by_message(sending, judging, processes)
    bounded = duration is not None or traffic.conversations is not None
    exact = options.is_exact(traffic)
    if len(options.counts("--concurrency", load.concurrency)) > 1:
        raise OptionError("--concurrency: a list is only for simulate")
    prompts = options.num_prompts(load, bounded=bounded, exact=exact)
    warm_up_s = options.seconds("--warm-up", load.warm_up)
    scenario = _scenario(url, model, sending)(
        traffic=options.traffic(traffic, endless=duration is not None or prompts is not None),
        load=options.load(load, timed=traffic.trace is not None, exact=exact),
        in_flight_max=load.max_concurrency,
        seed=traffic.seed,
        warm_up_s=warm_up_s,
        begin_until_s=warm_up_s + options.seconds("--duration", duration, math.inf, positive=True),
        requests_max=prompts,
    )
    options.check_bounds(scenario)
    _run(
        running.run(
            _run_options(traffic, sending, processes, name)(
                scenario=scenario,
                objective=options.objective(judging),
                selection=options.selection(judging, by_message=sending.via is not None),
            ),
            output.outputs(files),
        )
    )


def sweep(
    traffic: arguments.Traffic,
    rates: arguments.Rates,
    sending: arguments.Sending,
    engines: arguments.Engines,
    routing: arguments.Routing,
    judging: arguments.Judging,
    files: arguments.Files,
    url: OptionalUrl = "",
    model: arguments.Model = "",
    processes: arguments.Processes = 1,
    name: Annotated[str, option("Name of the endpoint in the results.", JUDGING)] = "",
) -> None:
    """Find the highest request rate at which SLOs hold.

    Doubles the rate until an SLO breaks, then narrows the interval down. Exit status 1 if they hold
    at none.
    """
    from kubeai.loadtest import options
    from kubeai.loadtest import simulate as simulating
    from kubeai.loadtest import sweep as sweeping
    from kubeai.loadtest.reports import output

    objective, limits = options.objective(judging), options.limits(rates.slo or ())
    options.check_by_message(sending, judging, processes, limits)
    if not objective and any(limit.metric == "goodput" for limit in limits):
        raise OptionError("--slo: goodput requires --goodput, which says what counts")
    plan = sweeping.plan(rates, limits)
    by_message = sending.via is not None
    selection = options.with_limits(options.selection(judging, by_message=by_message), limits)
    sent = options.traffic(traffic, endless=traffic.conversations is None)
    warm_up_s = options.seconds("--warm-up", rates.warm_up)
    outputs = output.outputs(files)
    if not url and not by_message:
        simulation = simulating.Simulation(
            traffic=sent,
            load=plan.load(plan.start),
            preset=engines.preset,
            settings=_settings(
                engines, routing, traffic.seed, in_flight_max=rates.max_concurrency or 0
            ),
            seed=traffic.seed,
            warm_up_s=warm_up_s,
            objective=objective,
            selection=selection,
        )
        raise typer.Exit(sweeping.simulate(plan, simulation, outputs))
    scenario = _scenario(url, model, sending)(
        traffic=sent,
        load=plan.load(plan.start),
        in_flight_max=rates.max_concurrency,
        seed=traffic.seed,
        warm_up_s=warm_up_s,
    )
    run_options = _run_options(traffic, sending, processes, name)(
        scenario=scenario, objective=objective, selection=selection
    )
    _run(sweeping.run(plan, run_options, outputs))


def simulate(
    engines: arguments.Engines,
    routing: arguments.Routing,
    traffic: arguments.Traffic,
    load: arguments.Load,
    judging: arguments.Judging,
    files: arguments.Files,
) -> None:
    """Compare routing strategies on simulated engines, without a GPU and in virtual time.

    The hash ring and load table are the gateway's own code. The same options give the same figures
    on every machine.
    """
    from kubeai.loadtest import options
    from kubeai.loadtest import simulate as simulating
    from kubeai.loadtest.reports import output

    levels = options.counts("--concurrency", load.concurrency)
    exact = options.is_exact(traffic)
    prompts = options.num_prompts(load, bounded=traffic.conversations is not None, exact=exact)
    simulation = simulating.Simulation(
        traffic=options.traffic(traffic, endless=prompts is not None),
        load=options.load(load, timed=traffic.trace is not None, exact=exact),
        preset=engines.preset,
        settings=_settings(
            engines,
            routing,
            traffic.seed,
            concurrencies=levels or [options.CONCURRENCY],
            in_flight_max=load.max_concurrency or 0,
        ),
        seed=traffic.seed,
        warm_up_s=options.seconds("--warm-up", load.warm_up),
        requests_max=prompts,
        objective=options.objective(judging),
        selection=options.selection(judging),
    )
    raise typer.Exit(simulating.run(simulation, output.outputs(files)))


def replay(
    file: Annotated[
        Path,
        typer.Argument(help="KubeAI's access log with accessLogPrompts, or a trace file."),
    ],
    engines: arguments.Engines,
    routing: arguments.Routing,
    judging: arguments.Judging,
    files: arguments.Files,
    model: Annotated[
        str | None,
        option("The Model whose requests to replay. Default: the log's only one.", TRAFFIC),
    ] = None,
    output_len: Annotated[
        int | None,
        option(
            "Length of each response of a log. Default: estimated from its size.",
            TRAFFIC,
            min=1,
        ),
    ] = None,
    trace_block_tokens: TraceBlockTokens = None,
    speed: Annotated[float, option("2 replays twice as fast.", TRAFFIC)] = 1.0,
    num_prompts: NumPrompts = None,
    warm_up: WarmUp = None,
) -> None:
    """Replay an access log or a trace on simulated engines, with each routing strategy.

    Shows what each strategy would have done with the same requests at the same times and, for an
    access log, what was measured.
    """
    from kubeai.loadtest import options
    from kubeai.loadtest import replay as replaying
    from kubeai.loadtest.reports import output

    status = replaying.run(
        replaying.Replay(
            path=file,
            model=model,
            output_tokens=output_len,
            block_tokens=trace_block_tokens,
            speed=speed,
            requests_max=num_prompts,
            preset=engines.preset,
            engines=engines.engines,
            strategies=routing.strategies,
            objective=options.objective(judging),
            selection=options.selection(judging),
            warm_up_s=options.seconds("--warm-up", warm_up),
            engine_and_ring={
                "cache_blocks": engines.cache_blocks,
                "replication": routing.replication,
                "mean_load_factor": routing.mean_load_factor,
                "prefix_char_length": routing.prefix_char_length,
                "replicas": routing.replicas,
            },
        ),
        output.outputs(files),
    )
    raise typer.Exit(status)


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(help="Result files written with --json; the first run is the baseline."),
    ],
    files: arguments.Files,
) -> None:
    """Compare runs, in the terminal and in files."""
    from kubeai.loadtest.reports import output
    from kubeai.loadtest.reports.compare import table
    from kubeai.simulation.results import read

    outputs = output.outputs(files)
    found = [read(path) for path in results]
    runs = [run for each in found for run in each.runs]
    print(table(runs))
    outputs.write(runs, found[0].sweep if len(found) == 1 else None)


def demo(
    files: arguments.Files,
    engines: Annotated[int, option("Engines per strategy. Default: 4.", ENGINES, min=2)] = 4,
    duration: Annotated[
        str | None, option("How long conversations start, per strategy. Default: 14s.", LOAD)
    ] = None,
    seed: Annotated[int, option("Random seed. Default: 1.", TRAFFIC)] = 1,
) -> None:
    """Show what routing by prefix gains, in two minutes, on mock engines behind a real gateway.

    Starts `kubeai local` with a Model for each strategy and sends the same traffic to all, first
    past the gateway through a Service as kube-proxy implements it. Writes an HTML report, to
    kubeai-demo.html unless --html names another file.
    """
    from kubeai.loadtest import demo as demonstration
    from kubeai.loadtest import options
    from kubeai.loadtest.reports import output

    found = demonstration.Demo(
        engines=engines,
        duration_s=options.seconds("--duration", duration, 14.0, positive=True),
        seed=seed,
    )
    _run(demonstration.run(found, output.outputs(files)))


# -- shared ----------------------------------------------------------------------------------------


def _scenario(url: str, model: str, sending: arguments.Sending) -> Any:
    """A scenario for this endpoint, as a function of its traffic and load."""
    import functools

    from kubeai.loadtest import options
    from kubeai.loadtest.scenario import Scenario

    return functools.partial(
        Scenario,
        url=url,
        model=model,
        via=options.via(url, model, sending),
        headers=options.headers(sending.header or [], sending.api_key),
        endpoint_header=sending.endpoint_header,
        stream=sending.stream and sending.via is None,
        extra_body=options.fields("--body", sending.body),
        timeout_s=options.seconds("--timeout", sending.timeout, 300.0, positive=True),
    )


def _run_options(
    traffic: arguments.Traffic, sending: arguments.Sending, processes: int, name: str
) -> Any:
    """The options of runs, as a function of the scenario and of how its results are judged."""
    import functools

    from kubeai.loadtest import options
    from kubeai.loadtest import run as running

    return functools.partial(
        running.RunOptions,
        processes=processes,
        shape_given=options.is_shape_given(traffic),
        ignore_eos=sending.ignore_eos,
        name=name,
    )


def _settings(
    engines: arguments.Engines, routing: arguments.Routing, seed: int, **more: Any
) -> Any:
    from kubeai.loadtest import simulate as simulating

    return simulating.settings(
        preset=engines.preset,
        cache_blocks=engines.cache_blocks,
        engines=engines.engines or SIMULATED_ENGINES,
        strategies=routing.strategies,
        replication=routing.replication,
        mean_load_factor=routing.mean_load_factor,
        replicas=routing.replicas,
        prefix_char_length=routing.prefix_char_length,
        seed=seed,
        **{"concurrencies": [1], **more},
    )


def _run(work: Coroutine[Any, Any, int]) -> None:
    """Run the coroutine and exit with its status."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(work)
    raise typer.Exit(status)
