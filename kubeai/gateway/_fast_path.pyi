import asyncio
from typing import Any

from kubeai._counts import Admission, Reservation
from kubeai._keys import Key
from kubeai._limits import Charge
from kubeai._prompt import Prompt
from kubeai.gateway.access_log import Observers
from kubeai.gateway.context import Context
from kubeai.gateway.cors import CorsPolicy
from kubeai.gateway.fallback import Fallbacks
from kubeai.gateway.realtime import Session
from kubeai.gateway.relay._early import EarlyStream
from kubeai.gateway.relay._exchange import Pool
from kubeai.gateway.relay._relay import Relay
from kubeai.gateway.retries import Retries
from kubeai.gateway.uploads.upload import Upload
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.request import InferenceRequest
from kubeai.openai.routes import Kind
from kubeai.routing import table as routing

class FastPath(EarlyStream):
    _kind: Kind
    _path: bytes  # the engine's
    _payload: bytes | None  # the body sent to the engine; None: an upload, or no body
    _upload: Upload | None  # of a request with a multipart form
    _request: InferenceRequest  # None until the body is read
    _routed: routing.RoutedModel
    _asked: routing.RoutedModel | None  # the Model that was asked for; None: _routed
    _fallbacks: Fallbacks | None  # None: the request has had no reason to leave its Model
    _session: Session | None  # of a WebSocket whose events name the model
    _prompt: Prompt  # None until the body is read
    _admission: Admission | None
    _reservation: Reservation | None
    _candidates: list[dict[str, Any]] | None  # None: the pick is not explained
    _task: asyncio.Task[None] | None  # while the request waits
    _retries: Retries | None  # set once an attempt has failed
    _is_pinned: bool  # to its endpoint: no other can serve it
    _lost: bool  # the last failed attempt lost its connection
    _is_unanswered: bool  # the last attempt was given up after it had been sent
    _observed: object  # None: this request is not observed
    _max_wait_s: float | None  # the client's limit on the wait for an endpoint
    _waited_s: float  # for an endpoint so far
    _number: int  # in the order in which requests began to wait; 0: it has not
    _key: Key | None  # the client's; None: it has none, and needs none
    _needs_admin: bool  # only an administrator's key may have it answered
    _charge: Charge | None  # to the key; None: it has no limits
    _response_id: str | None  # of a response that the engine may store; None: not known
    _metered: bytes | None  # the payload that asks for usage where the client does not
    _unmetered: bytes | None  # the same without; None once it has been sent
    # The Model whose engine has rejected ``_metered``; None: none
    _refusing: routing.RoutedModel | None

    @property
    def context(self) -> Context: ...
    def set_cors_headers(self, lines: bytes | None) -> None: ...
    def set_target(self, target: bytes) -> None:
        """Replace the request target, before the request is handled."""

    def close_after(self) -> None:
        """Close the client's connection after the response."""

    def _place(self, reservation: Reservation | None) -> None: ...
    def _attempt(self, reservation: Reservation) -> None: ...
    def _charge_key(self) -> None: ...
    def _name_response(self, request: InferenceRequest) -> None: ...
    # implemented by the subclass
    def _refuse(self, error: ErrorResponse) -> None: ...
    def wait_for_endpoint(self) -> None: ...
    def send_other(self, pool: Pool) -> None: ...
    def payload_with_id(self) -> bytes: ...
    def moved(self, reservation: Reservation, suppressed: int) -> None: ...
    def check_key(self, problem: int, sources: int) -> bool:
        """Check a request that has no valid key in a header, or that has cookies.

        True: it may proceed. False: an error response was sent. ``problem``: a Problem;
        ``sources``: the headers with keys.
        """
    def is_followed(self, prompt_tokens: int, sent_tokens: int) -> bool: ...
    def revoked(self) -> None: ...
    def split(
        self, request: InferenceRequest, routed: routing.RoutedModel
    ) -> routing.RoutedModel: ...
    def allow_origin(self, policy: CorsPolicy) -> None: ...
    def note_candidates(self) -> None: ...
    def explain(self, reservation: Reservation) -> None: ...
    def observe(self, observers: Observers) -> None: ...
    def observed(self) -> None: ...

def end_revoked(relay: Relay) -> None:
    """End the requests whose keys have been revoked, or are no longer an administrator's.

    A request that has not been answered gets 401, or the error as the end of its event stream; the
    connection of any other is cut, so that the response does not look complete.
    """
