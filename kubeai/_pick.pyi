"""The pick of an endpoint for a request, by the strategy of its Model."""

from collections.abc import Iterable
from typing import Any, Literal, final

from kubeai._counts import Reservation
from kubeai._prefix import PrefixIndex
from kubeai._prompt import Prompt
from kubeai._queue_table import QueueTable
from kubeai._ring import Ring
from kubeai.routing.routes import Route

Strategy = Literal["LeastLoad", "PrefixHash", "PrefixCache"]
STRATEGIES: tuple[Strategy, ...]

@final
class Picker:
    """Picks among one model's endpoints. Single-threaded, like its ring."""

    ring: Ring
    prefix_char_length: int
    capacity: int  # requests in flight per endpoint; 0: not limited
    tokens_per_byte: float  # of prompts' text: 1/4 until engines have reported numbers of tokens

    def __init__(self, ring: Ring, index: PrefixIndex | None = None) -> None:
        """Picks by LeastLoad until configured. Without an index every prompt is new."""
    def configure(
        self, strategy: Strategy, prefix_char_length: int = 0, load_factor: int = 0
    ) -> None:
        """Change the strategy; applies from the next pick on.

        ``load_factor``: PrefixCache avoids endpoints whose load would exceed this percentage of
        the mean, if others can serve; 0: it does not.
        """
    def limit(self, capacity: int, queues: QueueTable | None) -> None:
        """Pick no endpoint that has ``capacity`` requests in flight; 0: endpoints are never full.

        ``queues``: where requests wait until one has room. ValueError if there is none.
        """
    def pick_new(
        self, prompt: Prompt, adapter: str | None = None, tenant: str = ""
    ) -> Reservation | None:
        """Like ``pick`` for a request that has not waited; None also if others wait.

        If requests wait at a peer, room for one of them is left free. With a capacity, the
        request's work is charged to the tenant's account.
        """
    def settle(self, tenant: str, output_tokens: int) -> int:
        """Charge a tenant for the output of a request, beyond what every request is charged.

        Without a capacity there are no accounts.
        """
    def pick_beyond_capacity(
        self, prompt: Prompt, adapter: str | None = None, exclude: Iterable[str] = ()
    ) -> Reservation | None:
        """Like ``pick``, but full endpoints can be picked too."""
    def has_room(self, adapter: str | None = None, requests: int = 1) -> bool:
        """Whether the endpoints that serve the adapter have room for ``requests`` more.

        Ejected endpoints count too.
        """
    def pick(
        self, prompt: Prompt, adapter: str | None = None, exclude: Iterable[str] = ()
    ) -> Reservation | None:
        """Pick an endpoint and count the request there; None if no endpoint can serve it.

        With a capacity, an endpoint with that many requests in flight is never picked.

        ``exclude``: names of endpoints already tried.
        """
    def explain(
        self, prompt: Prompt, adapter: str | None = None, exclude: Iterable[str] = ()
    ) -> list[dict[str, Any]]:
        """Each endpoint that could serve now, with what a pick by PrefixCache compares.

        Keys: ``endpoint``, ``cached``, ``pending`` (tokens), ``in_flight`` (requests), ``slowness``
        (1: as the model's others), ``cost`` (tokens). Counts nothing.
        """
    def expire(self) -> int:
        """Stop counting the prompts that are believed to be computed by now as pending."""

class RoutedFields:
    """The fields of RoutedModel (routing/table.py) that the fast path reads for each request."""

    model: str
    route: Route
    picker: Picker
