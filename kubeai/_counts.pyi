from typing import final

from kubeai._load import Kind, LoadTable

@final
class Admission:
    def hold(self) -> None: ...
    def unhold(self) -> None: ...
    def count(self, outcome: str) -> None: ...
    def close(self) -> None: ...

@final
class Reservation:
    name: str  # the endpoint's (pod's) name
    target: object  # as passed to Ring.set
    is_probe: bool  # the endpoint is ejected: a good response restores it
    reason: int  # why it was picked, as counted; 0: by least load
    failing: bool  # the endpoint has failed since its last complete response
    iterations: int  # distinct endpoints examined (0 for LeastLoad)
    first: str  # name of the first endpoint on the ring that can serve; == name if not moved
    first_load: float  # load of ``first`` before this pick, in requests of ``REQUEST_TOKENS``
    own_load: float  # what this request would have added there (0 for LeastLoad)
    bound: int  # maximum load per endpoint, including this pick (0: no bound)
    cached: int  # prompt tokens that the endpoint was believed to have cached
    # PrefixCache only: ``first`` is the endpoint that was believed to have the most of the prompt.
    first_cached: int
    cost: float  # in tokens
    first_cost: float
    pending: int  # prompt tokens that the endpoint is believed to have yet to compute

    @property
    def released(self) -> bool: ...
    def prefilled(self, now_s: float) -> None:
        """The first byte of the response's body has come: nothing is pending any more.

        ``now_s``: on the ring's clock; the endpoint's time per token is learned from it.
        """
    def release(self) -> None: ...

def admit(table: LoadTable, row: int, generation: int, kind: Kind = "http") -> Admission: ...
def live() -> tuple[int, int]: ...
