"""``kubeai key``: create, list and revoke API keys."""

# No postponed annotations: typer evaluates those of the commands.
import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kubeai.cli.cluster import Kubeconfig, Namespace, connected
from kubeai.cli.options import Output, check_output
from kubeai.errors import KubeAIError

if TYPE_CHECKING:
    from kubeai.client.keys import ListedKey

LIMIT_MAX, PRIORITY_MIN, PRIORITY_MAX = 1_000_000_000, -1000, 1000
COLUMNS = (
    "NAME", "STATE", "TENANT", "MODELS", "RPM", "TPM", "IN FLIGHT", "PRIORITY", "EXPIRES", "ADMIN",
    "CREATED",
)  # fmt: skip

Name = Annotated[str, typer.Argument(help="Name of the Secret, which is the key's name.")]
Tenant = Annotated[
    str | None,
    typer.Option(
        help="Tenant of the key. Keys of one tenant share a place in the fair queue "
        "(default: NAME)."
    ),
]
Models = Annotated[
    str | None,
    typer.Option(
        help="Label selector for the Models that the key may use (default: all).",
        metavar="SELECTOR",
    ),
]
RequestsPerMinute = Annotated[
    int | None, typer.Option(help="Limit of requests per minute.", min=1, max=LIMIT_MAX)
]
TokensPerMinute = Annotated[
    int | None, typer.Option(help="Limit of tokens per minute.", min=1, max=LIMIT_MAX)
]
MaxInFlight = Annotated[
    int | None, typer.Option(help="Limit of requests in flight.", min=1, max=LIMIT_MAX)
]
Priority = Annotated[
    int | None,
    typer.Option(
        help="Requests with a higher priority are served first (default 0).",
        min=PRIORITY_MIN,
        max=PRIORITY_MAX,
    ),
]
Expires = Annotated[
    str | None,
    typer.Option(
        help="When the key expires: a duration (90d, 12h) or a time "
        "(2027-01-31T00:00:00Z). Default: never.",
    ),
]
Admin = Annotated[
    bool, typer.Option("--admin", help="Allow the key to use the console, which can change Models.")
]
Authorino = Annotated[
    bool,
    typer.Option(
        "--authorino",
        help="Store the key itself, as Authorino reads it, instead of its SHA-256.",
    ),
]


def key() -> typer.Typer:
    """The command group."""
    group = typer.Typer(
        help="Create, list and revoke API keys, which are Secrets of the Kubernetes API.",
        no_args_is_help=True,
    )
    group.command("create")(create)
    group.command("list")(list_keys)
    group.command("revoke")(revoke)
    return group


def create(
    name: Name,
    tenant: Tenant = None,
    models: Models = None,
    rpm: RequestsPerMinute = None,
    tpm: TokensPerMinute = None,
    max_in_flight: MaxInFlight = None,
    priority: Priority = None,
    expires: Expires = None,
    admin: Admin = False,
    authorino: Authorino = False,
    kubeconfig: Kubeconfig = None,
    namespace: Namespace = "",
    output: Output = "table",
) -> None:
    """Create a key and print it. It is shown only once: the Secret stores its SHA-256."""
    import msgspec

    from kubeai.client import keys

    as_json = check_output(output)
    new = keys.NewKey(
        name=name,
        tenant=tenant,
        models=models,
        rpm=rpm,
        tpm=tpm,
        max_in_flight=max_in_flight,
        priority=priority,
        expires=expires,
        admin=admin,
        authorino=authorino,
    )

    async def work() -> tuple[str, str]:
        async with connected(kubeconfig) as kube:
            where = namespace or kube.namespace
            return await keys.create(kube, where, new, keys.now_s()), where

    created, where = asyncio.run(work())
    if as_json:
        print(
            msgspec.json.encode({"name": name, "namespace": where, "key": created}).decode(),
        )
        return
    print(f"Secret {name} created in the namespace {where}. Its key:", file=sys.stderr)
    print(created)
    shown = "" if authorino else " It is not stored and cannot be shown again."
    print(f"Keep it in a safe place.{shown}", file=sys.stderr)


def list_keys(
    kubeconfig: Kubeconfig = None, namespace: Namespace = "", output: Output = "table"
) -> None:
    """List the keys: their rights, their limits, and why a Secret is not usable."""
    import msgspec

    from kubeai.client import keys

    as_json = check_output(output)

    async def work() -> "list[ListedKey]":
        async with connected(kubeconfig) as kube:
            return await keys.keys(kube, namespace or kube.namespace, keys.now_s())

    listed = asyncio.run(work())
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(listed), indent=2).decode())
    else:
        _print(listed)


def revoke(
    names: Annotated[list[str], typer.Argument(help="Names of the Secrets.", metavar="NAME...")],
    kubeconfig: Kubeconfig = None,
    namespace: Namespace = "",
) -> None:
    """Delete the Secrets of keys. Their requests are refused, and those in flight are ended."""
    from kubeai.client import keys

    async def work() -> list[str]:
        problems = []
        async with connected(kubeconfig) as kube:
            for name in names:
                try:
                    await keys.revoke(kube, namespace or kube.namespace, name)
                except KubeAIError as error:  # the others must be revoked nevertheless
                    problems.append(str(error))
                else:
                    print(f"{name} revoked")
        return problems

    if problems := asyncio.run(work()):
        raise KubeAIError("; ".join(problems))


def _print(listed: "list[ListedKey]") -> None:
    from kubeai.logs import printable

    if not listed:
        print("no keys; create one with `kubeai key create NAME`", file=sys.stderr)
        return
    rows = [COLUMNS, *(tuple(map(printable, _cells(each))) for each in listed)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("   ".join(map(str.ljust, row, widths)).rstrip())
    for each in listed:
        if each.problem:
            print(f"{printable(each.name)}: {printable(each.problem)}", file=sys.stderr)


def _cells(row: "ListedKey") -> tuple[str, ...]:
    if row.problem:
        return (row.name, row.state, *[""] * (len(COLUMNS) - 3), row.created)

    def limit(value: int) -> str:
        return str(value) if value else "-"

    return (
        row.name,
        row.state,
        row.tenant,
        row.models or "all",
        limit(row.rpm),
        limit(row.tpm),
        limit(row.max_in_flight),
        str(row.priority),
        row.expires or "never",
        "yes" if row.admin else "no",
        row.created,
    )
