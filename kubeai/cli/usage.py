"""``kubeai usage``: what API keys have used."""

# No postponed annotations: typer evaluates those of the command.
import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kubeai.cli.cluster import Kubeconfig, Namespace, connected
from kubeai.errors import KubeAIError

if TYPE_CHECKING:
    from kubeai.api.usage import KeyUsage


def usage(
    by: Annotated[
        str,
        typer.Option(
            help="Aggregate by key, tenant or model (default: one line for each key and Model).",
            metavar="GROUP",
            show_default=False,
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    kubeconfig: Kubeconfig = None,
    namespace: Namespace = "",
) -> None:
    """Show what API keys have used: requests and tokens, by key, tenant or Model.

    Reads what KubeAI stores in ConfigMaps every 30 seconds.
    """
    from kubeai.api.usage import GROUPS, grouped
    from kubeai.client import usage as client

    if by not in ("", *GROUPS):
        raise KubeAIError(f"--by: {by!r} is not one of {', '.join(GROUPS)}")
    if as_json and as_csv:
        raise KubeAIError("--json and --csv exclude each other")

    async def read() -> "dict[str, KeyUsage]":
        async with connected(kubeconfig) as kube:
            return await client.read_usage(kube, namespace or kube.namespace)

    usages = grouped(asyncio.run(read()), by)
    if as_json:
        client.write_json(usages, sys.stdout)
    elif as_csv:
        client.write_csv(usages, by, sys.stdout)
    elif usages:
        client.write_table(usages, by, sys.stdout)
    else:
        print(
            "no usage is stored yet; requests with an API key are counted, and stored every 30 s",
            file=sys.stderr,
        )
