"""Reads JSON bodies that take long to read, large and compressed ones, in threads.

The event loop keeps serving other requests meanwhile. A compressed body is decoded up to the limit
of all bodies, and sent to the engine as it came, with its Content-Encoding. It is sent uncompressed
if it is changed (something in it is replaced, or the engine is asked for a stream's usage), and
with ``gateway.decompressBodies``. Called by proxy.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from kubeai.gateway._names import prompt_id
from kubeai.openai import request as openai
from kubeai.openai._usage_option import asking_for_usage
from kubeai.openai.content_coding import codings_in, compressed_form, content_coding, decompress
from kubeai.openai.errors import ErrorResponse

if TYPE_CHECKING:
    from kubeai._prompt import Prompt
    from kubeai.gateway.context import Context
    from kubeai.gateway.relay._exchange import Exchange
    from kubeai.openai.request import InferenceRequest
    from kubeai.openai.routes import Kind
    from kubeai.routing.table import RoutedModel

# Two threads, so that a slow body does not block all others. Started on demand.
_threads = ThreadPoolExecutor(2, "bodies")


class ReadBody(NamedTuple):
    """The request that a body contains, its prompt, and the bytes to send to the engine."""

    request: InferenceRequest
    prompt: Prompt
    payload: bytes  # the client's, but for the model
    metered: bytes | None = None  # the same that asks for usage; None: nothing is to be added


def check_coding(exchange: Exchange, *, is_form: bool) -> None:
    """ErrorResponse if the content coding of the body is not supported.

    The engine gets the coding's standard name. Engines know few others: neither "identity", which
    RFC 9110 reserves for Accept-Encoding, nor "x-gzip", which it has recipients read as "gzip".
    """
    values = _content_encoding(exchange)
    if not codings_in(values):
        if values:
            exchange.drop_header(b"content-encoding")
        return
    if is_form:
        raise compressed_form()
    coding = content_coding(values)
    if coding is not None and values != [coding]:
        exchange.set_header(b"content-encoding", coding.encode())


def _content_encoding(exchange: Exchange) -> list[str]:
    return [value.decode("latin-1") for value in exchange.headers(b"content-encoding")]


def _reserve(exchange: Exchange, copy: bytes) -> None:
    """Count another copy of the body as buffered. ErrorResponse if there is no room for it."""
    if not exchange.reserve(len(copy)):
        raise ErrorResponse("The buffer for request bodies is full.", status=503)


async def read_body(
    exchange: Exchange,
    context: Context,
    kind: Kind,
    find: Callable[[InferenceRequest], RoutedModel],
    choose: Callable[[InferenceRequest, RoutedModel, bytes | None], RoutedModel],
    *,
    changes: bool = False,
    is_metered: bool = False,
) -> ReadBody:
    """Read the body that an exchange has collected.

    ``find``: looks its model up. ``choose``: replaces it by its canary, if that is to serve the
    client; its last argument identifies the prompt.

    ``changes``: the caller will change the payload, so it must not be compressed. ``is_metered``:
    have the engine report the usage of a stream.

    ErrorResponse if the body is invalid, or too long once it is decompressed. Its decompressed form
    and changed copies count as buffered until the exchange ends. Content-Encoding is removed from
    the request to the engine if it no longer applies.
    """
    run = asyncio.get_running_loop().run_in_executor
    body = exchange.body
    coding = content_coding(_content_encoding(exchange))
    if coding is not None:
        body = await run(_threads, decompress, coding, body, context.body_max_bytes)
        _reserve(exchange, body)
    request = await run(_threads, openai.read, kind, body)
    routed = find(request)
    if routed.route.canary and request.previous_response_id is None:
        routed = choose(request, routed, await run(_threads, prompt_id, request))
    picker = routed.picker
    prompt = await run(_threads, openai.prompt_of, picker, request, context.logs_prompts)
    payload = await run(_threads, openai.body_for, request, body)
    if payload is not body:
        _reserve(exchange, payload)
    metered = await run(_threads, asking_for_usage, request, payload) if is_metered else None
    if metered is not None:
        _reserve(exchange, metered)
    if coding is not None:
        changed = changes or metered is not None or request.is_renamed
        if not changed and not context.config.decompress_bodies:
            return ReadBody(request, prompt, exchange.body)
        exchange.drop_header(b"content-encoding")
    return ReadBody(request, prompt, payload, metered)
