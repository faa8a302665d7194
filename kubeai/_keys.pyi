from collections.abc import Mapping
from typing import final

from kubeai.routing.keys import KeyRecord
from kubeai.routing.routes import Route

@final
class Selection:
    """The Models that a label selector selects; shared by the keys that have the same selector.

    Answers are cached for up to 64 Models, and forgotten when a Model's route changes. A text that
    is not a label selector selects nothing.
    """

    text: str

    def __init__(self, text: str) -> None: ...
    def selects(self, labels: Mapping[str, str]) -> bool:
        """Whether it selects these labels; not cached."""

@final
class Key:
    """A worker's view of an API key; see :class:`.KeyRecord`.

    The object stays the same while the key has its name, digest, row and generation.
    """

    name: str
    digest: bytes
    tenant: str
    fairness_id: str
    record: KeyRecord
    row: int
    generation: int
    requests_per_minute: int
    tokens_per_minute: int
    in_flight_max: int
    priority: int
    expires_s: float
    is_admin: bool
    is_revoked: bool
    selection: Selection | None
    mean_output_tokens: float  # of responses to this worker's requests; 0: none yet

    def __init__(self, record: KeyRecord) -> None: ...
    def update(self, record: KeyRecord) -> bool:
        """Take over a changed record. False, and no change, if it needs another object."""

    @property
    def restricted(self) -> bool:
        """Whether the key may use only some Models, and must not learn the names of others."""

    def allows(self, route: Route) -> bool:
        """Whether the key may use a Model. Cached, for requests."""

    def allows_labels(self, labels: Mapping[str, str]) -> bool:
        """Like :meth:`allows`, for a Model's labels; not cached, for lists of all Models."""
