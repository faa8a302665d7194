"""The commands of ``kubeai bench``. Each command imports its dependencies when it runs."""

# No `from __future__ import annotations`: typer evaluates the annotations.
import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from kubeai.loadtest.arguments import (
    ENGINES,
    JUDGING,
    LOAD,
    ROUTING,
    SENDING,
    TRAFFIC,
    Arrivals,
    Burst,
    CacheBlocks,
    Conversations,
    Documents,
    DocumentTokens,
    Html,
    JsonFolder,
    MeanLoadFactor,
    MessagesMin,
    PrefixCharLength,
    Preset,
    PromptTokens,
    RampTime,
    Rate,
    Replicas,
    Replication,
    ReplyTokens,
    Requests,
    Seed,
    Shape,
    Sharegpt,
    SloToken,
    SloTotal,
    SloTtft,
    Speed,
    Systems,
    SystemTokens,
    ThinkTime,
    Trace,
    TraceBlockTokens,
    TraceRequests,
    Turns,
    TurnTokens,
    UntilRate,
    WarmUp,
    option,
)


def app() -> typer.Typer:
    """The ``kubeai bench`` command group."""
    bench = typer.Typer(help="Benchmark an OpenAI-compatible endpoint.", no_args_is_help=True)
    bench.command("run")(run)
    bench.command("simulate")(simulate)
    bench.command("replay")(replay)
    bench.command("compare")(compare)
    return bench


def run(
    url: Annotated[
        str, typer.Argument(help="Base URL of the endpoint, such as http://host:port/openai/v1.")
    ],
    model: Annotated[
        str, option("Model to request. Default: the endpoint's only model.", SENDING)
    ] = "",
    # traffic
    shape: Shape = None,
    conversations: Conversations = None,
    turns: Turns = None,
    system_tokens: SystemTokens = None,
    systems: Systems = None,
    documents: Documents = None,
    document_tokens: DocumentTokens = None,
    prompt_tokens: PromptTokens = None,
    turn_tokens: TurnTokens = None,
    reply_tokens: ReplyTokens = None,
    think_time: ThinkTime = None,
    seed: Seed = 1,
    sharegpt: Sharegpt = None,
    messages_min: MessagesMin = 2,
    trace: Trace = None,
    trace_block_tokens: TraceBlockTokens = None,
    trace_requests: TraceRequests = None,
    speed: Speed = 1.0,
    # load
    concurrency: Annotated[
        int | None,
        option(
            "Closed loop: number of concurrent conversations; the next starts when one ends. "
            "Default: 32.",
            LOAD,
            min=1,
        ),
    ] = None,
    rate: Rate = None,
    arrivals: Arrivals = None,
    burst: Burst = None,
    until_rate: UntilRate = None,
    ramp_time: RampTime = None,
    duration: Annotated[
        str | None,
        option(
            "Start no request later than this after the warm-up; in-flight requests complete.",
            LOAD,
        ),
    ] = None,
    requests: Requests = None,
    warm_up: WarmUp = None,
    processes: Annotated[
        int,
        option(
            "Number of processes that generate load (default 1). Warns if they are the bottleneck.",
            LOAD,
            min=1,
        ),
    ] = 1,
    # requests
    timeout: Annotated[str | None, option("Request timeout. Default: 300s.", SENDING)] = None,
    api_key: Annotated[
        str | None, option("API key, sent as a bearer token.", SENDING, envvar="OPENAI_API_KEY")
    ] = None,
    header: Annotated[
        list[str] | None,
        option("'Name: value' to add to each request; may be repeated.", SENDING),
    ] = None,
    body: Annotated[
        str | None,
        option('JSON fields to add to each request body, such as {"temperature": 0}.', SENDING),
    ] = None,
    stream: Annotated[bool, option("Request streaming responses (default).", SENDING)] = True,
    endpoint_header: Annotated[
        str,
        option("Response header that identifies the endpoint. Default: X-Mock-Replica.", SENDING),
    ] = "X-Mock-Replica",
    # results
    slo_ttft: SloTtft = None,
    slo_token: SloToken = None,
    slo_total: SloTotal = None,
    name: Annotated[str, option("Name of this run in comparisons.", JUDGING)] = "",
    json: Annotated[Path | None, option("Write the results to this file as JSON.", JUDGING)] = None,
    html: Html = None,
) -> None:
    """Send load to an OpenAI-compatible endpoint and report latency and throughput.

    Durations are written 500ms, 60s or 1m30s. Ctrl-C keeps what was measured so far.
    """
    import math

    import uvloop

    from kubeai.loadtest import options
    from kubeai.loadtest import run as running
    from kubeai.loadtest.scenario import Scenario

    warm_up_s = options.seconds("--warm-up", warm_up)
    scenario = Scenario(
        url=url,
        model=model,
        headers=options.headers(header or [], api_key),
        endpoint_header=endpoint_header,
        stream=stream,
        extra_body=options.fields("--body", body),
        traffic=_traffic(
            shape=shape,
            conversations=conversations,
            turns=turns,
            system_tokens=system_tokens,
            systems=systems,
            documents=documents,
            document_tokens=document_tokens,
            prompt_tokens=prompt_tokens,
            turn_tokens=turn_tokens,
            reply_tokens=reply_tokens,
            think_time=think_time,
            seed=seed,
            endless=duration is not None or requests is not None,
            sharegpt=sharegpt,
            messages_min=messages_min,
            trace=trace,
            trace_block_tokens=trace_block_tokens,
            trace_requests=trace_requests,
            speed=speed,
        ),
        load=options.load(
            concurrency=concurrency,
            rate=rate,
            arrivals=arrivals,
            burst=burst,
            until_rate=until_rate,
            ramp_time=ramp_time,
            timed=trace is not None,
        ),
        seed=seed,
        warm_up_s=warm_up_s,
        begin_until_s=warm_up_s + options.seconds("--duration", duration, math.inf, positive=True),
        requests_max=requests,
        timeout_s=options.seconds("--timeout", timeout, 300.0, positive=True),
    )
    run_options = running.RunOptions(
        scenario=scenario,
        processes=processes,
        objective=_objective(slo_ttft, slo_token, slo_total),
        name=name,
        json_path=options.writable("--json", json),
        html_path=options.writable("--html", html),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(running.run(run_options))
    raise typer.Exit(status)


def simulate(
    # engines
    preset: Preset = "llama-3.1-8b-fp8-l4",
    engines: Annotated[
        int, option("Number of engines. Default: 8.", ENGINES, min=1, max=20_000)
    ] = 8,
    cache_blocks: CacheBlocks = None,
    # routing
    strategies: Annotated[
        str,
        option(
            "Comma-separated list of Service (random, like a Kubernetes Service), RoundRobin, "
            "LeastLoad, PrefixHash, PrefixCache and Oracle (knows every cache). "
            "Default: Service,LeastLoad,PrefixHash.",
            ROUTING,
        ),
    ] = "Service,LeastLoad,PrefixHash",
    replication: Replication = None,
    mean_load_factor: MeanLoadFactor = None,
    prefix_char_length: PrefixCharLength = None,
    replicas: Replicas = 1,
    # traffic
    shape: Shape = None,
    conversations: Conversations = None,
    turns: Turns = None,
    system_tokens: SystemTokens = None,
    systems: Systems = None,
    documents: Documents = None,
    document_tokens: DocumentTokens = None,
    prompt_tokens: PromptTokens = None,
    turn_tokens: TurnTokens = None,
    reply_tokens: ReplyTokens = None,
    think_time: ThinkTime = None,
    seed: Seed = 1,
    sharegpt: Sharegpt = None,
    messages_min: MessagesMin = 2,
    trace: Trace = None,
    trace_block_tokens: TraceBlockTokens = None,
    trace_requests: TraceRequests = None,
    speed: Speed = 1.0,
    # load
    concurrency: Annotated[
        str | None,
        option(
            "Closed loop: number of concurrent conversations; a list such as 100,200,400 gives "
            "one run each. Default: 32.",
            LOAD,
        ),
    ] = None,
    rate: Rate = None,
    arrivals: Arrivals = None,
    burst: Burst = None,
    until_rate: UntilRate = None,
    ramp_time: RampTime = None,
    requests: Requests = None,
    warm_up: WarmUp = None,
    # results
    slo_ttft: SloTtft = None,
    slo_token: SloToken = None,
    slo_total: SloTotal = None,
    json: JsonFolder = None,
    html: Html = None,
) -> None:
    """Compare routing strategies on simulated engines, without a GPU and in virtual time.

    The hash ring and load table are the gateway's own code. The same options give the same results
    on every machine.
    """
    from kubeai.loadtest import options
    from kubeai.loadtest import simulate as simulating

    levels = options.counts("--concurrency", concurrency)
    simulation = simulating.Simulation(
        traffic=_traffic(
            shape=shape,
            conversations=conversations,
            turns=turns,
            system_tokens=system_tokens,
            systems=systems,
            documents=documents,
            document_tokens=document_tokens,
            prompt_tokens=prompt_tokens,
            turn_tokens=turn_tokens,
            reply_tokens=reply_tokens,
            think_time=think_time,
            seed=seed,
            endless=requests is not None,
            sharegpt=sharegpt,
            messages_min=messages_min,
            trace=trace,
            trace_block_tokens=trace_block_tokens,
            trace_requests=trace_requests,
            speed=speed,
        ),
        load=options.load(
            concurrency=levels[0] if levels else None,
            rate=rate,
            arrivals=arrivals,
            burst=burst,
            until_rate=until_rate,
            ramp_time=ramp_time,
            timed=trace is not None,
        ),
        settings=simulating.settings(
            preset=preset,
            cache_blocks=cache_blocks,
            engines=engines,
            strategies=strategies,
            concurrencies=levels or [options.CONCURRENCY],
            replication=replication,
            mean_load_factor=mean_load_factor,
            replicas=replicas,
            prefix_char_length=prefix_char_length,
            seed=seed,
        ),
        preset=preset,
        seed=seed,
        warm_up_s=options.seconds("--warm-up", warm_up),
        requests_max=requests,
        objective=_objective(slo_ttft, slo_token, slo_total),
    )
    json_folder = options.folder("--json", json)
    html_path = options.writable("--html", html)
    raise typer.Exit(simulating.run(simulation, json_folder, html_path))


def replay(
    file: Annotated[
        Path,
        typer.Argument(help="KubeAI's access log with accessLogPrompts, or a trace file."),
    ],
    # engines
    preset: Preset = "llama-3.1-8b-fp8-l4",
    engines: Annotated[
        int | None,
        option(
            "Number of engines. Default: the log's endpoints; 8 for a trace.",
            ENGINES,
            min=1,
            max=20_000,
        ),
    ] = None,
    cache_blocks: CacheBlocks = None,
    # routing
    strategies: Annotated[
        str,
        option(
            "Comma-separated list, as for simulate. Default: LeastLoad,PrefixHash,PrefixCache.",
            ROUTING,
        ),
    ] = "LeastLoad,PrefixHash,PrefixCache",
    replication: Replication = None,
    mean_load_factor: MeanLoadFactor = None,
    prefix_char_length: PrefixCharLength = None,
    replicas: Replicas = 1,
    # traffic
    model: Annotated[
        str | None,
        option("The Model whose requests to replay. Default: the log's only one.", TRAFFIC),
    ] = None,
    output_tokens: Annotated[
        int | None,
        option(
            "Length of each response of a log. Default: estimated from its size.", TRAFFIC, min=1
        ),
    ] = None,
    trace_block_tokens: TraceBlockTokens = None,
    speed: Speed = 1.0,
    requests: Annotated[
        int | None, option("Replay only the first requests.", TRAFFIC, min=1)
    ] = None,
    warm_up: WarmUp = None,
    # results
    slo_ttft: SloTtft = None,
    slo_token: SloToken = None,
    slo_total: SloTotal = None,
    json: JsonFolder = None,
    html: Html = None,
) -> None:
    """Replay an access log or a trace on simulated engines, with each routing strategy.

    Shows what each strategy would have done with the same requests at the same times and, for an
    access log, what was measured.
    """
    from kubeai.loadtest import options
    from kubeai.loadtest import replay as replaying

    status = replaying.run(
        replaying.Replay(
            path=file,
            model=model,
            output_tokens=output_tokens,
            block_tokens=trace_block_tokens,
            speed=speed,
            requests_max=requests,
            preset=preset,
            engines=engines,
            strategies=strategies,
            objective=_objective(slo_ttft, slo_token, slo_total),
            warm_up_s=options.seconds("--warm-up", warm_up),
            engine_and_ring={
                "cache_blocks": cache_blocks,
                "replication": replication,
                "mean_load_factor": mean_load_factor,
                "prefix_char_length": prefix_char_length,
                "replicas": replicas,
            },
        ),
        options.folder("--json", json),
        options.writable("--html", html),
    )
    raise typer.Exit(status)


def _traffic(
    *,
    shape: str | None,
    seed: int,
    endless: bool,
    sharegpt: Path | None,
    messages_min: int,
    trace: Path | None,
    trace_block_tokens: int | None,
    trace_requests: int | None,
    speed: float,
    think_time: str | None,
    **lengths: int | None,
) -> Any:
    from kubeai.loadtest import options

    think_s = None if think_time is None else options.seconds("--think-time", think_time)
    return options.traffic(
        shape=shape,
        changes={**lengths, "think_s": think_s},
        seed=seed,
        endless=endless,
        sharegpt=sharegpt,
        messages_min=messages_min,
        trace=trace,
        speed=speed,
        trace_block_tokens=trace_block_tokens,
        trace_requests=trace_requests,
    )


def _objective(ttft: str | None, token: str | None, total: str | None) -> Any:
    from kubeai.loadtest import options
    from kubeai.simulation.results import Objective

    return Objective(
        options.seconds("--slo-ttft", ttft),
        options.seconds("--slo-token", token),
        options.seconds("--slo-total", total),
    )


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Result files written with --json; the first is the baseline."),
    ],
    html: Annotated[Path | None, typer.Option(help="Write an HTML report to this file.")] = None,
) -> None:
    """Compare runs in the terminal and, with --html, in an HTML report."""
    from kubeai.loadtest import options
    from kubeai.loadtest.compare import table
    from kubeai.simulation.results import read

    options.writable("--html", html)
    found = [read(path) for path in runs]
    print(table(found))
    if html is not None:
        from kubeai.loadtest.report import report

        html.write_text(report(found), encoding="utf-8")
