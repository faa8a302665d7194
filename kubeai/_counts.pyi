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
    failing: bool  # the endpoint has failed since its last complete response
    iterations: int  # distinct endpoints examined (0 for LeastLoad)
    first: str  # name of the first endpoint on the ring that can serve; == name if not moved
    first_load: int  # load of ``first`` before this pick
    bound: int  # maximum load per endpoint, including this pick (0 for LeastLoad: no bound)

    @property
    def released(self) -> bool: ...
    def release(self) -> None: ...

def admit(table: LoadTable, row: int, generation: int, kind: Kind = "http") -> Admission: ...
def live() -> tuple[int, int]: ...
