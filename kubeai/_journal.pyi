"""The journal: the last requests of each worker, in memory that all processes share."""

from typing import Literal, NamedTuple, final

from kubeai._shared_memory import SharedMemory

ID_BYTES: int  # of a request ID that are kept
ENDS: tuple[str, ...]  # "left" (the client disconnected), "whole", "broken" (by the engine)
PICKS: tuple[str | None, ...]  # why an endpoint was picked; None: none was

class Entry(NamedTuple):
    """One request that has ended."""

    began_s: float  # when its head was complete (CLOCK_MONOTONIC)
    waited_s: float  # for an endpoint
    first_s: float | None  # from began_s to the first byte of the response's body; None: none came
    duration_s: float
    model_row: int  # in the load table
    model_generation: int
    row: int  # of the last attempt's endpoint; -1: none
    generation: int
    status: int  # of the response; 0: the client disconnected before it began
    end: Literal["left", "whole", "broken"]
    pick: Literal["cached", "away", "new", "least", "hashed", "bounded"] | None
    retries: int  # at most 255
    streamed: bool
    estimated_tokens: int  # of the prompt
    expected_tokens: int  # of these, believed to be in the endpoint's cache
    prompt_tokens: int | None  # these three as the engine reported
    cached_tokens: int | None
    output_tokens: int | None
    id: str  # its first ``ID_BYTES`` bytes, ASCII

@final
class Journal(SharedMemory):
    """Rings of entries, one for each worker."""

    columns: int
    entries: int  # of each worker

    @staticmethod
    def create(workers: int, entries: int = 4096) -> Journal:
        """Create an empty journal, 128 bytes per entry; ``workers`` ≤ 64, ``entries`` ≤ 2^20."""
    @staticmethod
    def attach(fd: int, column: int) -> Journal:
        """Map an existing journal, to write a column; ValueError if its header does not match.

        The caller keeps ownership of the descriptor: ``close`` only unmaps.
        """
    def write(self, entry: Entry) -> None:
        """Write an entry to this process's column. The gateway writes from compiled code."""
    def read(self, column: int, after: int = 0) -> tuple[list[Entry], int, int]:
        """The whole entries of a column after the first ``after`` that were written to it.

        Returns them, oldest first; how many were written so far, for the next call; and how many
        of those after ``after`` have been overwritten.
        """
