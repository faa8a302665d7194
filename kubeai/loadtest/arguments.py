"""The options of the commands of ``kubeai bench``, in groups. Imports only typer.

A command names the groups that it has as parameters; `grouped` turns them into options. The names
and meanings of options that vLLM's ``vllm bench serve`` also has are vLLM's. `RENAMED` lists former
names.
"""

# No `from __future__ import annotations`: typer evaluates the annotations.
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import typer
from typer.core import TyperCommand
from typing_extensions import override

from kubeai.errors import KubeAIError

T = TypeVar("T")

TRAFFIC, LOAD, SENDING, JUDGING = "Traffic", "Load", "Requests", "Results"
ENGINES, ROUTING = "Engines", "Routing"
EXACT = "Traffic: random lengths"

RENAMED = {
    "--requests": "--num-prompts",
    "--output-tokens": "--output-len",
    "--slo-ttft": "--goodput ttft:<duration>",
    "--slo-token": "--goodput tpot:<duration>",
    "--slo-total": "--goodput e2el:<duration>",
}

API_KEY_VARIABLES = ["KUBEAI_API_KEY", "OPENAI_API_KEY"]
SEVERAL = ("--goodput", "--slo")
LIMIT = re.compile(r"(ttft|tpot|itl|e2el|client_queue_time|goodput|errors):\S+")


class OptionError(KubeAIError):
    """An option is invalid; the message begins with its name."""


def option(help: str, panel: str, *names: str, **more: Any) -> Any:
    """A command's option, listed in this panel of its help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def group(cls: type[T]) -> type[T]:
    """Make a class of options, whose fields are annotated with `option`."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class Command(TyperCommand):
    """A command that says what a former option is called now.

    Like vLLM's, `--goodput` (and `--slo`) may be followed by several values.
    """

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for argument in args:
            name = argument.partition("=")[0]
            if name in RENAMED:
                raise OptionError(f"{name}: is called {RENAMED[name]} now")
        return super().parse_args(ctx, joined(args))


def joined(args: list[str]) -> list[str]:
    """The arguments, with all values after an option of `SEVERAL` in one."""
    found: list[str] = []
    for argument in args:
        if len(found) > 1 and found[-2] in SEVERAL and LIMIT.fullmatch(argument):
            found[-1] += f" {argument}"
        else:
            found.append(argument)
    return found


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameters whose type is a group by the options of the group."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter)
            continue
        groups[parameter.name] = parameter.annotation
        parameters += [
            inspect.Parameter(
                field.name, parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
            )
            for field in dataclasses.fields(parameter.annotation)
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            fields = dataclasses.fields(kind)
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields})
        command(**given)

    parameters.sort(key=lambda parameter: parameter.kind)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


TraceBlockTokens = Annotated[
    int | None,
    option(
        "Tokens per entry of the trace's hash_ids. Default: 512; 16 in Bailian's format.",
        TRAFFIC,
        min=1,
        max=4096,
    ),
]


@group
class Traffic:
    """What is sent."""

    shape: Annotated[
        str | None,
        option(
            "Synthetic traffic: chat (default), assistant, rag, agent, embeddings (default for "
            "models that only embed) or random.",
            TRAFFIC,
        ),
    ] = None
    conversations: Annotated[
        int | None,
        option(
            "Number of conversations. Default: 1000; unlimited with --duration or --num-prompts.",
            TRAFFIC,
            min=1,
        ),
    ] = None
    turns: Annotated[int | None, option("Turns per conversation.", TRAFFIC, min=1)] = None
    system_tokens: Annotated[
        int | None, option("Length of the shared system prompt, in tokens.", TRAFFIC, min=0)
    ] = None
    systems: Annotated[
        int | None, option("Number of different system prompts.", TRAFFIC, min=1)
    ] = None
    documents: Annotated[
        int | None,
        option("Number of documents, one of which precedes each conversation.", TRAFFIC, min=0),
    ] = None
    document_tokens: Annotated[
        int | None, option("Length of each document, in tokens.", TRAFFIC, min=0)
    ] = None
    prompt_tokens: Annotated[
        int | None, option("Mean length of the first user message, in tokens.", TRAFFIC, min=1)
    ] = None
    turn_tokens: Annotated[
        int | None, option("Mean length of later user messages, in tokens.", TRAFFIC, min=1)
    ] = None
    reply_tokens: Annotated[
        int | None, option("Mean max_tokens; 0 leaves it to the engine.", TRAFFIC, min=0)
    ] = None
    think_time: Annotated[
        str | None, option("Mean pause between a response and the next turn.", TRAFFIC)
    ] = None
    input_len: Annotated[
        int | None,
        option("Length of each prompt as the engine counts it, in tokens. Default: 1024.", EXACT,
               "--input-len", "--random-input-len", min=1),
    ] = None  # fmt: skip
    output_len: Annotated[
        int | None,
        option("Length of each response, in tokens. Default: 128.", EXACT,
               "--output-len", "--random-output-len", min=1),
    ] = None  # fmt: skip
    random_range_ratio: Annotated[
        str | None,
        option(
            "Draw lengths evenly from length × (1 ± ratio). A number from 0 to 1 (excluded), or "
            '{"input": 0.3, "output": 0.5}. Default: 0.',
            EXACT,
        ),
    ] = None
    random_prefix_len: Annotated[
        int | None,
        option(
            "Tokens that all prompts begin with, in addition to --input-len. Default: 0.",
            EXACT,
            min=0,
        ),
    ] = None
    seed: Annotated[
        int, option("Random seed; the same seed gives the same traffic. Default: 1.", TRAFFIC)
    ] = 1
    sharegpt: Annotated[
        Path | None, option("Read conversations from a ShareGPT file.", TRAFFIC)
    ] = None
    messages_min: Annotated[
        int, option("Skip --sharegpt conversations with fewer messages.", TRAFFIC, min=2)
    ] = 2
    trace: Annotated[
        Path | None,
        option("Replay a trace file of timestamped requests (Mooncake's or Bailian's).", TRAFFIC),
    ] = None
    trace_block_tokens: TraceBlockTokens = None
    trace_requests: Annotated[
        int | None, option("Replay only the first requests of the trace.", TRAFFIC, min=1)
    ] = None
    speed: Annotated[float, option("Trace replay speed; 2 replays twice as fast.", TRAFFIC)] = 1.0


NumPrompts = Annotated[
    int | None,
    option(
        "Number of requests. Default: 1000 with --request-rate, --max-concurrency or --input-len.",
        LOAD,
        min=1,
    ),
]
MaxConcurrency = Annotated[
    int | None, option("Maximum number of requests in flight. Default: unlimited.", LOAD, min=1)
]
Burstiness = Annotated[
    float | None,
    option(
        "Shape of the gamma distribution of the times between arrivals: less than 1 is burstier "
        "than Poisson, more is more even. Default: 1, Poisson.",
        LOAD,
    ),
]
WarmUp = Annotated[str | None, option("Send but do not count requests due within this time.", LOAD)]


@group
class Load:
    """When it is sent."""

    num_prompts: NumPrompts = None
    request_rate: Annotated[
        float | None,
        option(
            "Requests per second, regardless of completions. Default: inf, which starts all at "
            "once, up to --max-concurrency.",
            LOAD,
        ),
    ] = None
    burstiness: Burstiness = None
    max_concurrency: MaxConcurrency = None
    concurrency: Annotated[
        str | None,
        option(
            "Closed loop: number of concurrent conversations; the next starts when one ends. "
            "simulate: a list such as 100,200,400 gives one run each. Default, if no other option "
            "for the load is given: 32.",
            LOAD,
        ),
    ] = None
    rate: Annotated[
        float | None,
        option(
            "Open loop: start this many conversations per second, regardless of completions.", LOAD
        ),
    ] = None
    arrivals: Annotated[
        str | None,
        option("Arrivals at a rate: poisson (default), constant, bursts or ramp.", LOAD),
    ] = None
    burst: Annotated[int | None, option("Arrivals per burst. Default: 10.", LOAD, min=1)] = None
    until_rate: Annotated[float | None, option("Final rate of the ramp.", LOAD)] = None
    ramp_time: Annotated[str | None, option("Duration of the ramp. Default: 60s.", LOAD)] = None
    warm_up: WarmUp = None


@group
class Rates:
    """The rates of a sweep, and when it ends."""

    slo: Annotated[
        list[str] | None,
        option(
            "Service level objective, such as ttft:p99:500ms, tpot:mean:50, goodput:95 (percent "
            "of requests within --goodput) or errors:1; may be repeated. Default: errors:1.",
            LOAD,
        ),
    ] = None
    request_rates: Annotated[
        str | None,
        option("Requests per second to try, such as 1,2,4,8. Default: found by a search.", LOAD),
    ] = None
    start_rate: Annotated[float, option("First rate of the search. Default: 1.", LOAD)] = 1.0
    max_rate: Annotated[float, option("Highest rate of the search. Default: 1024.", LOAD)] = 1024.0
    precision: Annotated[
        float,
        option("Search until the limit is known to this many percent. Default: 10.", LOAD),
    ] = 10.0
    duration: Annotated[
        str | None,
        option("Duration of each rate, without --num-prompts. Default: 30s.", LOAD),
    ] = None
    num_prompts: Annotated[
        int | None,
        option(
            "Number of requests at each rate. Default: what --duration takes, at least 20.",
            LOAD,
            min=1,
        ),
    ] = None
    burstiness: Burstiness = None
    max_concurrency: MaxConcurrency = None
    warm_up: WarmUp = None


Model = Annotated[
    str, option("Model to request. Default: the endpoint's only model.", SENDING, "--model", "-m")
]
Processes = Annotated[
    int,
    option(
        "Number of processes that generate load (default 1). Warns if they are the bottleneck.",
        LOAD,
        min=1,
    ),
]


@group
class Sending:
    """How requests to a real endpoint are sent."""

    via: Annotated[
        str | None,
        option(
            "Send requests as messages to this topic, such as nats://requests; see messaging.md. "
            "Responses are not streamed. The endpoint's URL is then optional, with --model.",
            SENDING,
        ),
    ] = None
    via_responses: Annotated[
        str | None,
        option(
            "Subscription that receives the responses, such as nats://responses; no other consumer "
            "may share it.",
            SENDING,
        ),
    ] = None
    timeout: Annotated[
        str | None,
        option(
            "Request timeout. By message, a request without a response is then lost. "
            "Default: 300s.",
            SENDING,
        ),
    ] = None
    api_key: Annotated[
        str | None, option("API key, sent as a bearer token.", SENDING, envvar=API_KEY_VARIABLES)
    ] = None
    header: Annotated[
        list[str] | None,
        option("'Name: value' to add to each request; may be repeated.", SENDING),
    ] = None
    body: Annotated[
        str | None,
        option('JSON fields to add to each request body, such as {"temperature": 0}.', SENDING,
               "--body", "--extra-body"),
    ] = None  # fmt: skip
    ignore_eos: Annotated[
        bool | None,
        option(
            "Request that the engine goes on until the length is reached. Default: with "
            "--output-len, if the engine knows it.",
            SENDING,
        ),
    ] = None
    stream: Annotated[bool, option("Request streaming responses (default).", SENDING)] = True
    endpoint_header: Annotated[
        str,
        option("Response header that identifies the endpoint. Default: X-Mock-Replica.", SENDING),
    ] = "X-Mock-Replica"


@group
class Files:
    """Where results are written. Each file has all runs of the command."""

    json: Annotated[
        Path | None, option("Write the results to this file as JSON, for compare.", JUDGING)
    ] = None
    csv: Annotated[
        Path | None, option("Write the results to this file as CSV, a row per run.", JUDGING)
    ] = None
    html: Annotated[Path | None, option("Write an HTML report to this file.", JUDGING)] = None


@group
class Judging:
    """Which figures are reported."""

    percentile_metrics: Annotated[
        str | None,
        option(
            "Comma-separated list of ttft, tpot, itl, e2el and client_queue_time. Default: "
            "ttft,tpot,itl,e2el; e2el for embeddings.",
            JUDGING,
        ),
    ] = None
    metric_percentiles: Annotated[
        str | None,
        option("Comma-separated list of percentiles. Default: 50,90,95,99.", JUDGING),
    ] = None
    goodput: Annotated[
        list[str] | None,
        option(
            "Limit for requests that count towards goodput: ttft, tpot or e2el, and milliseconds "
            "or a duration, such as ttft:500 or e2el:2s; may be repeated.",
            JUDGING,
        ),
    ] = None


@group
class Engines:
    """Simulated engines."""

    preset: Annotated[
        str,
        option(
            "Model and GPU to simulate, for speed and memory. Default: llama-3.1-8b-fp8-l4.",
            ENGINES,
        ),
    ] = "llama-3.1-8b-fp8-l4"
    engines: Annotated[
        int | None,
        option(
            "Number of engines. Default: 8; replay: the access log's endpoints.",
            ENGINES,
            min=1,
            max=20_000,
        ),
    ] = None
    cache_blocks: Annotated[
        int | None, option("KV-cache blocks per engine, of 16 tokens each.", ENGINES, min=1)
    ] = None


@group
class Routing:
    """Strategies of simulated gateways."""

    strategies: Annotated[
        str,
        option(
            "Comma-separated list of Service (random, like a Kubernetes Service), RoundRobin, "
            "LeastLoad, PrefixHash, PrefixCache and Oracle (knows every cache). "
            "Default: Service,LeastLoad,PrefixHash,PrefixCache.",
            ROUTING,
        ),
    ] = "Service,LeastLoad,PrefixHash,PrefixCache"
    replication: Annotated[
        int | None,
        option("PrefixHash: virtual nodes per engine. Default: 20.", ROUTING, min=1, max=10_000),
    ] = None
    mean_load_factor: Annotated[
        int | None,
        option(
            "PrefixHash: load limit, in percent of the mean load. Default: 125.", ROUTING, min=100
        ),
    ] = None
    prefix_char_length: Annotated[
        int | None,
        option("PrefixHash: prefix length in characters. Default: 100.", ROUTING, min=0),
    ] = None
    replicas: Annotated[
        int, option("Number of KubeAI replicas, which share loads. Default: 1.", ROUTING, min=1)
    ] = 1
