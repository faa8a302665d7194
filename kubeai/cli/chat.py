"""``kubeai chat``: talk to a model in the terminal."""

# No postponed annotations: typer evaluates those of the command.
import sys
from typing import Annotated

import typer

from kubeai.cli.options import ApiKey, BaseUrl


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Name of the Model, or <model>_<adapter>.")
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Ask this, print the answer to stdout, and exit."),
    ] = None,
    base_url: BaseUrl = "http://127.0.0.1:8000/openai/v1",
    api_key: ApiKey = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option(help="Limit of an answer's length in tokens.", min=1)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature (default: the engine's).", min=0)
    ] = None,
) -> None:
    """Chat with a model of a gateway, or of any OpenAI-compatible endpoint.

    Without PROMPT, a conversation on a terminal; elsewhere, stdin is the prompt.
    """
    from kubeai.client.chat import Conversation, ask_once, read_prompt, talk
    from kubeai.client.gateway import Gateway

    gateway = Gateway(base_url, api_key)
    conversation = Conversation(
        gateway, model, system=system, max_tokens=max_tokens, temperature=temperature
    )
    if prompt is None and sys.stdin.isatty() and sys.stdout.isatty():
        talk(gateway, conversation)
    else:
        ask_once(gateway, conversation, read_prompt() if prompt is None else prompt)
