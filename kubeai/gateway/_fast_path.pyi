"""The fast path of a request in C: read, count, pick an endpoint, send."""

import asyncio
from typing import final

from kubeai.openai.request import InferenceRequest
from kubeai.openai._body_scan import Shape
from kubeai.openai.routes import Kind
from kubeai.routing import table as routing
from kubeai._load import Admission, Reservation
from kubeai.gateway.relay._relay import Exchange
from kubeai.gateway.retries import Retries
from kubeai.gateway.access_log import Observers

@final
class Plan:
    """How to handle requests for one path."""

    kind: Kind
    path: bytes  # the engine's
    shape: Shape

    def __init__(self, kind: Kind, path: bytes, shape: Shape) -> None: ...

class Straight(Exchange):
    """See the module docstring. The owner's ``plans`` map JSON POST targets to Plans."""

    _kind: Kind
    _path: bytes  # the engine's
    _payload: bytes  # the body sent to the engine
    _ask: InferenceRequest  # None until the body is read
    _routed: routing.RoutedModel
    _key: int | None
    _admission: Admission | None
    _reservation: Reservation | None
    _task: asyncio.Task[None] | None  # while the request waits
    _retries: Retries | None  # set once an attempt has failed
    _lost: bool  # the last failed attempt lost its connection
    _observed: object  # None: this request is not observed

    def _place(self, reservation: Reservation | None) -> None:
        """Start an attempt, or hold the request if no endpoint can serve it."""
    def _attempt(self, reservation: Reservation) -> None: ...
    # implemented by the subclass
    def wait_for_endpoint(self) -> None:
        """Hold the request."""
    def moved(self, reservation: Reservation) -> None:
        """Log that a request goes to another endpoint than the one its key maps to."""
    def observe(self, observers: Observers) -> None:
        """Notify observers of a new request; keep their observation in ``_observed``."""
    def observed(self) -> None:
        """Notify observers that the request has ended."""
