"""The commands of ``kubeai bench``. Imports what they need when they run."""

# No postponed annotations: typer evaluates them.
import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

TRAFFIC, LOAD, SENDING, JUDGING = "Traffic", "Load", "Requests", "Results"
ENGINES, ROUTING = "Engines", "Routing"


def app() -> typer.Typer:
    bench = typer.Typer(
        help="Load on an OpenAI endpoint, and what it came to.", no_args_is_help=True
    )
    bench.command("run")(run)
    bench.command("simulate")(simulate)
    bench.command("compare")(compare)
    return bench


def _option(help: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


# Options of both `run` and `simulate`.
Shape = Annotated[
    str | None,
    _option("chat (the default), assistant, rag, agent or embeddings: made up.", TRAFFIC),
]
Conversations = Annotated[
    int | None,
    _option("How many. Default: 1000; with --duration or --requests no limit.", TRAFFIC, min=1),
]
Turns = Annotated[int | None, _option("Of a conversation.", TRAFFIC, min=1)]
SystemTokens = Annotated[
    int | None, _option("Of the system prompt that conversations share.", TRAFFIC, min=0)
]
PromptTokens = Annotated[int | None, _option("Of the first turn, as a mean.", TRAFFIC, min=1)]
TurnTokens = Annotated[int | None, _option("Of each further turn, as a mean.", TRAFFIC, min=1)]
ReplyTokens = Annotated[
    int | None, _option("max_tokens, as a mean; 0: as the engine likes.", TRAFFIC, min=0)
]
ThinkTime = Annotated[
    str | None, _option("Between an answer and the next turn, as a mean.", TRAFFIC)
]
Seed = Annotated[int, _option("The same seed makes the same traffic. Default: 1.", TRAFFIC)]
Sharegpt = Annotated[
    Path | None, _option("Conversations from a file in ShareGPT's format.", TRAFFIC)
]
MessagesMin = Annotated[
    int, _option("Of a conversation in that file, else it is left out.", TRAFFIC, min=2)
]
Trace = Annotated[Path | None, _option("Requests from a file that says when each is due.", TRAFFIC)]
Speed = Annotated[float, _option("2: a trace's time passes twice as fast.", TRAFFIC)]
Rate = Annotated[
    float | None,
    _option(
        "Open loop: so many conversations begin a second, whether or not others have ended.",
        LOAD,
    ),
]
Arrivals = Annotated[str | None, _option("poisson (the default), constant, bursts or ramp.", LOAD)]
Burst = Annotated[int | None, _option("Conversations of a burst: 10.", LOAD, min=1)]
UntilRate = Annotated[float | None, _option("The rate at a ramp's end.", LOAD)]
RampTime = Annotated[str | None, _option("How long a ramp takes: 60s.", LOAD)]
Requests = Annotated[int | None, _option("No more than so many.", LOAD, min=1)]
WarmUp = Annotated[str | None, _option("What is due in that time is sent, but not counted.", LOAD)]
SloTtft = Annotated[str | None, _option("Most time to the first token of a good answer.", JUDGING)]
SloToken = Annotated[str | None, _option("Most time of each further token, as its mean.", JUDGING)]
SloTotal = Annotated[str | None, _option("Most time to the end of a good answer.", JUDGING)]
Html = Annotated[Path | None, _option("Write a page about them there.", JUDGING)]


def run(
    url: Annotated[str, typer.Argument(help="Of the endpoint, as http://host:port/openai/v1.")],
    model: Annotated[
        str, _option("Whom to ask. Default: the endpoint's only model.", SENDING)
    ] = "",
    # traffic
    shape: Shape = None,
    conversations: Conversations = None,
    turns: Turns = None,
    system_tokens: SystemTokens = None,
    prompt_tokens: PromptTokens = None,
    turn_tokens: TurnTokens = None,
    reply_tokens: ReplyTokens = None,
    think_time: ThinkTime = None,
    seed: Seed = 1,
    sharegpt: Sharegpt = None,
    messages_min: MessagesMin = 2,
    trace: Trace = None,
    speed: Speed = 1.0,
    # load
    concurrency: Annotated[
        int | None,
        _option(
            "Closed loop: so many conversations at a time; the next begins when one ends. "
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
        _option("Nothing begins later than that after the warm-up; what runs is finished.", LOAD),
    ] = None,
    requests: Requests = None,
    warm_up: WarmUp = None,
    processes: Annotated[
        int, _option("That send it. Default: 1; it says when that was too few.", LOAD, min=1)
    ] = 1,
    # requests
    timeout: Annotated[str | None, _option("Of a request: 300s.", SENDING)] = None,
    api_key: Annotated[
        str | None, _option("Sent as a bearer token.", SENDING, envvar="OPENAI_API_KEY")
    ] = None,
    header: Annotated[
        list[str] | None, _option("'Name: value', of each request; may be repeated.", SENDING)
    ] = None,
    body: Annotated[
        str | None,
        _option('Fields that each request has besides, as {"temperature": 0}.', SENDING),
    ] = None,
    stream: Annotated[bool, _option("Answers in pieces (the default), or whole.", SENDING)] = True,
    endpoint_header: Annotated[
        str, _option("Of answers: says who gave it. Default: X-Mock-Replica.", SENDING)
    ] = "X-Mock-Replica",
    # results
    slo_ttft: SloTtft = None,
    slo_token: SloToken = None,
    slo_total: SloTotal = None,
    name: Annotated[str, _option("Of this run, where it is compared.", JUDGING)] = "",
    json: Annotated[Path | None, _option("Write the results there.", JUDGING)] = None,
    html: Html = None,
) -> None:
    """Send load to an OpenAI endpoint: ours, another gateway, an engine.

    Durations are written 500ms, 60s, 1m30s. Ctrl-C keeps what was measured so far.
    """
    import math

    import uvloop

    from kubeai.loadtest import options
    from kubeai.loadtest import run as running
    from kubeai.loadtest.plan import Plan

    warm_up_s = options.seconds("--warm-up", warm_up)
    plan = Plan(
        url=url,
        model=model,
        headers=options.headers(header or [], api_key),
        endpoint_header=endpoint_header,
        stream=stream,
        more=options.fields("--body", body),
        traffic=_traffic(
            shape=shape,
            conversations=conversations,
            turns=turns,
            system_tokens=system_tokens,
            prompt_tokens=prompt_tokens,
            turn_tokens=turn_tokens,
            reply_tokens=reply_tokens,
            think_time=think_time,
            seed=seed,
            endless=duration is not None or requests is not None,
            sharegpt=sharegpt,
            messages_min=messages_min,
            trace=trace,
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
    asked = running.Asked(
        plan=plan,
        processes=processes,
        objective=_objective(slo_ttft, slo_token, slo_total),
        name=name,
        json_path=options.writable("--json", json),
        html_path=options.writable("--html", html),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(running.run(asked))
    raise typer.Exit(status)


def simulate(
    # engines
    preset: Annotated[
        str, _option("Whose speed and memory they have. Default: llama-3.1-8b-fp8-l4.", ENGINES)
    ] = "llama-3.1-8b-fp8-l4",
    engines: Annotated[int, _option("How many. Default: 8.", ENGINES, min=1, max=20_000)] = 8,
    cache_blocks: Annotated[
        int | None, _option("Of 16 tokens, in each engine's memory.", ENGINES, min=1)
    ] = None,
    # routing
    strategies: Annotated[
        str,
        _option(
            "Of Service (a Kubernetes Service: at random), RoundRobin, LeastLoad, PrefixHash, "
            "Oracle (knows every cache). Default: Service,LeastLoad,PrefixHash.",
            ROUTING,
        ),
    ] = "Service,LeastLoad,PrefixHash",
    replication: Annotated[
        int | None, _option("PrefixHash: virtual nodes an engine: 20.", ROUTING, min=1, max=10_000)
    ] = None,
    mean_load_factor: Annotated[
        int | None, _option("PrefixHash: percent of the mean load: 125.", ROUTING, min=100)
    ] = None,
    prefix_char_length: Annotated[
        int | None, _option("PrefixHash: characters of the prefix: 100.", ROUTING, min=0)
    ] = None,
    replicas: Annotated[
        int, _option("Of KubeAI, which tell each other their loads. Default: 1.", ROUTING, min=1)
    ] = 1,
    # traffic
    shape: Shape = None,
    conversations: Conversations = None,
    turns: Turns = None,
    system_tokens: SystemTokens = None,
    prompt_tokens: PromptTokens = None,
    turn_tokens: TurnTokens = None,
    reply_tokens: ReplyTokens = None,
    think_time: ThinkTime = None,
    seed: Seed = 1,
    sharegpt: Sharegpt = None,
    messages_min: MessagesMin = 2,
    trace: Trace = None,
    speed: Speed = 1.0,
    # load
    concurrency: Annotated[
        str | None,
        _option(
            "Closed loop: so many conversations at a time; several, as 100,200,400, are a run "
            "each. Default: 32.",
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
    json: Annotated[
        Path | None, _option("A folder: write the results of each run there.", JUDGING)
    ] = None,
    html: Html = None,
) -> None:
    """Ask the same of simulated engines, by each strategy: no GPU, no waiting.

    The ring and the load table are the gateway's own; times are virtual. The same options give the
    same figures everywhere.
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
            prompt_tokens=prompt_tokens,
            turn_tokens=turn_tokens,
            reply_tokens=reply_tokens,
            think_time=think_time,
            seed=seed,
            endless=requests is not None,
            sharegpt=sharegpt,
            messages_min=messages_min,
            trace=trace,
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


def _traffic(
    *,
    shape: str | None,
    seed: int,
    endless: bool,
    sharegpt: Path | None,
    messages_min: int,
    trace: Path | None,
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
    )


def _objective(ttft: str | None, token: str | None, total: str | None) -> Any:
    from kubeai.loadtest import options
    from kubeai.simulation.records import Objective

    return Objective(
        options.seconds("--slo-ttft", ttft),
        options.seconds("--slo-token", token),
        options.seconds("--slo-total", total),
    )


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="What --json wrote; the first is what others are held to.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write a page about them there.")] = None,
) -> None:
    """Put runs beside each other: in the terminal, and with --html on a page."""
    from kubeai.loadtest import options
    from kubeai.loadtest.compare import table
    from kubeai.simulation.records import read

    options.writable("--html", html)
    found = [read(path) for path in runs]
    print(table(found))
    if html is not None:
        from kubeai.loadtest.report import report

        html.write_text(report(found), encoding="utf-8")
