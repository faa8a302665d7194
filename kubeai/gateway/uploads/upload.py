"""One multipart form on its way from a client to an engine.

:class:`Upload` receives the form through the request's Exchange and spools it (spool.py), so that
``model`` may be anywhere in it and an attempt can be repeated. For each attempt it writes the form
to the engine, under flow control. Everything else about the request (admission, holding, attempts,
retries) is the business of the Proxy, which creates the Upload. A form is limited to
``multipart_max_bytes`` and 100 parts (multipart.py), its ``model`` to ``MODEL_MAX_BYTES``, and all
forms of a worker together to ``spool_max_bytes``.

``model`` is replaced by the engine's name of the model, and removed if its one model has none there
(faster-whisper-server).
The content of every other part reaches the engine unchanged, in a form with a new boundary
(multipart.py says why).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kubeai.gateway.uploads.multipart import boundary_of
from kubeai.gateway.uploads.spool import SpooledForm, no_room
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.routes import Kind

if TYPE_CHECKING:
    from kubeai.gateway.context import Context
    from kubeai.gateway.relay._exchange import Exchange
    from kubeai.openai.request import InferenceRequest
    from kubeai.routing.routes import Route


def is_form(exchange: Exchange, kind: Kind) -> bool:
    """Whether a request's body is a form. Edits of images come as JSON too, with URLs of images."""
    if kind is Kind.IMAGE_EDITS:
        types = exchange.headers(b"content-type")
        return len(types) != 1 or b"json" not in types[0].partition(b";")[0].lower()
    return kind.is_form


class Upload:
    """The form of one request; see the module. Call :meth:`close` at its end."""

    def __init__(self, exchange: Exchange, context: Context) -> None:
        """ErrorResponse if the request's headers rule the form out."""
        types = exchange.headers(b"content-type")
        if len(types) > 1:
            raise ErrorResponse("The request has more than one Content-Type.")
        boundary = boundary_of(types[0].decode("latin-1") if types else "")
        if not context.has_spool_room(exchange.announced_bytes):
            raise no_room("gateway.spoolMaxBytes is used up")
        self._exchange = exchange
        self._form = SpooledForm(boundary, context)
        self._ready = asyncio.Event()  # a piece can be received or written
        self._sender: asyncio.Task[None] | None = None

    @property
    def model(self) -> str:
        """The ``model`` part's value, once the form is received."""
        return self._form.model

    @property
    def content_type(self) -> bytes:
        """The Content-Type of the form to send."""
        return self._form.content_type.encode()

    def wake(self) -> None:
        """Call when a piece of the form has been received, or can be written."""
        self._ready.set()

    async def receive(self) -> None:
        """Receive and spool the whole form; ErrorResponse if it is malformed or too long."""
        exchange = self._exchange
        while not exchange.received:
            self._ready.clear()
            piece = exchange.next_piece()
            if piece is None:
                await self._ready.wait()
            else:
                await self._form.feed(piece)
        self._form.finish()

    def length_bytes(self, request: InferenceRequest, route: Route) -> int:
        """The length of the form to send."""
        return self._form.length_bytes(_engines_model(request, route))

    def send(self, request: InferenceRequest, route: Route) -> None:
        """Write the form from its beginning, in a task, until :meth:`stop_sending`."""
        self.stop_sending()
        sending = self._send(_engines_model(request, route))
        self._sender = asyncio.get_running_loop().create_task(sending)

    def stop_sending(self) -> None:
        """Stop writing: the attempt is over."""
        if self._sender is not None:
            self._sender.cancel()
            self._sender = None

    def close(self) -> None:
        """Stop writing, and delete the spooled form."""
        self.stop_sending()
        self._form.close()

    async def _send(self, model: str | None) -> None:
        try:
            async for chunk in self._form.chunks(model):
                self._ready.clear()
                if not self._exchange.write(chunk):
                    await self._ready.wait()
        except OSError as error:  # of the disk
            self._exchange.fail(error)


def _engines_model(request: InferenceRequest, route: Route) -> str | None:
    """The name by which the engine knows the model; None if the form must not have one.

    faster-whisper-server serves a single model, and rejects any other name for it. speaches knows
    its model by another name than clients do.
    """
    if route.engine == "FasterWhisper":
        return route.form_model or None
    return request.engines_name
