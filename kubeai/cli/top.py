"""``kubeai top``: the Models of a gateway, in a table."""

# No postponed annotations: typer evaluates those of the command.
import asyncio
import contextlib
import os
import sys
from typing import Annotated

import typer

from kubeai.cli.options import ApiKey, BaseUrl, Output, check_output


def top(
    base_url: BaseUrl = "http://127.0.0.1:8000/openai/v1",
    api_key: ApiKey = "",
    interval: Annotated[
        float, typer.Option(help="Seconds between two updates.", min=0.2, max=3600)
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one plain table and exit.")] = False,
    output: Output = "table",
) -> None:
    """Show the Models of a gateway: state, replicas, requests, rates and times to first token.

    Updates continuously on a terminal, otherwise prints once. Reads the console's API. Without API
    keys, it is served to loopback addresses only; on a cluster, set gateway.ui.enabled and use
    kubectl port-forward. If keys are required, pass an admin's key (--api-key).
    """
    from kubeai.client.gateway import Gateway
    from kubeai.client.top import print_once, show_live

    as_json = check_output(output)
    gateway = Gateway(base_url, api_key)
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if once or as_json or not is_terminal:
        asyncio.run(print_once(gateway, as_json=as_json, out=sys.stdout))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(show_live(gateway, interval))
