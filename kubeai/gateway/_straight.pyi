"""The straight way of a request: read, counted, given an endpoint and sent, in C."""

import asyncio
from typing import final

from kubeai import _ask, openai, routing
from kubeai._load import Admission, Reservation
from kubeai._relay import Exchange
from kubeai.gateway.attempts import Retries
from kubeai.gateway.observers import Observers

@final
class Plan:
    """What there is to know about the requests of one path."""

    kind: openai.Kind
    path: bytes  # at the engine
    shape: _ask.Shape

    def __init__(self, kind: openai.Kind, path: bytes, shape: _ask.Shape) -> None: ...

class Straight(Exchange):
    """See the module. The owner has ``plans``: of each target that is a POST of JSON."""

    _kind: openai.Kind
    _path: bytes  # at the engine
    _payload: bytes  # what the engine gets for a body
    _ask: openai.Ask | _ask.Ask  # None until the body is read
    _routed: routing.RoutedModel
    _key: int | None
    _admission: Admission | None
    _reservation: Reservation | None
    _task: asyncio.Task[None] | None  # while it waits
    _retries: Retries | None  # once an attempt has failed
    _lost: bool  # the attempt that failed last lost its connection
    _observed: object  # None: nobody watches this request

    def _place(self, reservation: Reservation | None) -> None:
        """Attempt, or hold the request when nobody can serve it."""
    def _attempt(self, reservation: Reservation) -> None: ...
    # what a subclass does
    def wait_for_endpoint(self) -> None:
        """Hold the request."""
    def moved(self, reservation: Reservation) -> None:
        """Say that a request goes to another endpoint than its own."""
    def observe(self, observers: Observers) -> None:
        """Tell those who watch requests of a new one, and keep in ``_observed`` what they watch."""
    def observed(self) -> None:
        """Tell them that it is over."""
