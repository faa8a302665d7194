"""Options that several commands of ``kubeai bench`` have. Imports only typer."""

# No `from __future__ import annotations`: typer evaluates the annotations.
from pathlib import Path
from typing import Annotated, Any

import typer

TRAFFIC, LOAD, SENDING, JUDGING = "Traffic", "Load", "Requests", "Results"
ENGINES, ROUTING = "Engines", "Routing"


def option(help: str, panel: str, *names: str, **more: Any) -> Any:
    """A command's option, listed in this panel of its help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


# Options of both `run` and `simulate`.
Shape = Annotated[
    str | None,
    option("Synthetic traffic: chat (default), assistant, rag, agent or embeddings.", TRAFFIC),
]
Conversations = Annotated[
    int | None,
    option(
        "Number of conversations. Default: 1000; unlimited with --duration or --requests.",
        TRAFFIC,
        min=1,
    ),
]
Turns = Annotated[int | None, option("Turns per conversation.", TRAFFIC, min=1)]
SystemTokens = Annotated[
    int | None, option("Length of the shared system prompt, in tokens.", TRAFFIC, min=0)
]
Systems = Annotated[int | None, option("Number of different system prompts.", TRAFFIC, min=1)]
Documents = Annotated[
    int | None,
    option("Number of documents, one of which precedes each conversation.", TRAFFIC, min=0),
]
DocumentTokens = Annotated[
    int | None, option("Length of each document, in tokens.", TRAFFIC, min=0)
]
PromptTokens = Annotated[
    int | None, option("Mean length of the first user message, in tokens.", TRAFFIC, min=1)
]
TurnTokens = Annotated[
    int | None, option("Mean length of later user messages, in tokens.", TRAFFIC, min=1)
]
ReplyTokens = Annotated[
    int | None, option("Mean max_tokens; 0 leaves it to the engine.", TRAFFIC, min=0)
]
ThinkTime = Annotated[
    str | None, option("Mean pause between a response and the next turn.", TRAFFIC)
]
Seed = Annotated[
    int, option("Random seed; the same seed gives the same traffic. Default: 1.", TRAFFIC)
]
Sharegpt = Annotated[Path | None, option("Read conversations from a ShareGPT file.", TRAFFIC)]
MessagesMin = Annotated[
    int, option("Skip --sharegpt conversations with fewer messages.", TRAFFIC, min=2)
]
Trace = Annotated[
    Path | None,
    option("Replay a trace file of timestamped requests (Mooncake's or Bailian's).", TRAFFIC),
]
TraceBlockTokens = Annotated[
    int | None,
    option(
        "Tokens per entry of the trace's hash_ids. Default: 512; 16 in Bailian's format.",
        TRAFFIC,
        min=1,
        max=4096,
    ),
]
TraceRequests = Annotated[
    int | None, option("Replay only the first requests of the trace.", TRAFFIC, min=1)
]
Speed = Annotated[float, option("Trace replay speed; 2 replays twice as fast.", TRAFFIC)]
Rate = Annotated[
    float | None,
    option(
        "Open loop: start this many conversations per second, regardless of completions.",
        LOAD,
    ),
]
Arrivals = Annotated[
    str | None, option("Arrivals: poisson (default), constant, bursts or ramp.", LOAD)
]
Burst = Annotated[int | None, option("Conversations per burst. Default: 10.", LOAD, min=1)]
UntilRate = Annotated[float | None, option("Final rate of the ramp.", LOAD)]
RampTime = Annotated[str | None, option("Duration of the ramp. Default: 60s.", LOAD)]
Requests = Annotated[int | None, option("Maximum number of requests.", LOAD, min=1)]
WarmUp = Annotated[str | None, option("Send but do not count requests due within this time.", LOAD)]
SloTtft = Annotated[str | None, option("SLO: maximum time to first token.", JUDGING)]
SloToken = Annotated[str | None, option("SLO: maximum mean time per output token.", JUDGING)]
SloTotal = Annotated[str | None, option("SLO: maximum end-to-end time.", JUDGING)]
Html = Annotated[Path | None, option("Write an HTML report to this file.", JUDGING)]
# Options of both `simulate` and `replay`.
Preset = Annotated[
    str,
    option(
        "Model and GPU whose speed and memory engines have. Default: llama-3.1-8b-fp8-l4.",
        ENGINES,
    ),
]
CacheBlocks = Annotated[
    int | None, option("KV-cache blocks per engine, of 16 tokens each.", ENGINES, min=1)
]
Replication = Annotated[
    int | None,
    option("PrefixHash: virtual nodes per engine. Default: 20.", ROUTING, min=1, max=10_000),
]
MeanLoadFactor = Annotated[
    int | None,
    option("PrefixHash: load limit, in percent of the mean load. Default: 125.", ROUTING, min=100),
]
PrefixCharLength = Annotated[
    int | None,
    option("PrefixHash: prefix length in characters. Default: 100.", ROUTING, min=0),
]
Replicas = Annotated[
    int, option("Number of KubeAI replicas, which share loads. Default: 1.", ROUTING, min=1)
]
JsonFolder = Annotated[
    Path | None, option("Write each run's results as JSON to this folder.", JUDGING)
]
