from typing import final

from kubeai.routing.keys import KeyRecord

@final
class Key:
    """A worker's view of an API key; see :class:`.KeyRecord`."""

    name: str
    digest: bytes
    tenant: str
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
    mean_output_tokens: float  # of responses to this worker's requests; 0: none yet

    def __init__(self, record: KeyRecord) -> None: ...
