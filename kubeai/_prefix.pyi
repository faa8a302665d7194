"""The prefix index: which endpoint's cache holds which beginnings of prompts, in shared memory."""

from collections.abc import Sequence
from typing import final

from kubeai._shared_memory import SharedMemory

CACHE_UNITS: int  # parts of a cache in which the age of an entry is counted
ENTRIES_MAX: int
ROWS_MAX: int

@final
class PrefixIndex(SharedMemory):
    """Hashes of a prompt's blocks → the endpoints that it was sent to, in one memfd of fixed size.

    Rows are the endpoints' rows in the load table. A hash has 64 bits and covers the prompt from
    its beginning to the end of the block. Any process may write; no lock is taken.
    """

    rows: int
    entries: int  # 8 bytes each
    silent: int  # number of other KubeAI replicas that do not report the prompts they send

    @staticmethod
    def create(rows: int, entries: int, workers: int = 1) -> PrefixIndex:
        """Create an empty index with room for at least ``entries``, rounded up to 8 × 2ⁿ.

        ``workers``: number of logs, at most 64.
        """
    @staticmethod
    def attach(fd: int, column: int = -1) -> PrefixIndex:
        """Map an existing index; ValueError if its header does not match.

        ``column``: of the worker whose log this process writes; -1: none.

        The caller keeps ownership of the descriptor: ``close`` only unmaps.
        """
    # -- endpoints -----------------------------------------------------------------------------
    def set_cache(self, row: int, tokens: int) -> None:
        """Set how many tokens an endpoint's cache holds; a change forgets what it holds.

        0: it keeps nothing, so it is never found. Until it is set, nothing counts as evicted.
        """
    def forget(self, row: int) -> None:
        """The endpoint has lost its cache, or the row has another endpoint."""

    # -- blocks --------------------------------------------------------------------------------
    def note(self, row: int, blocks: Sequence[int] | bytes, new_tokens: int) -> None:
        """Note that a prompt is sent to an endpoint.

        ``blocks``: hashes of its blocks, or of some of them, in order; at most ``BLOCKS_MAX``. As
        bytes, 8 for each, as ``take_log`` returns them; further ones are ignored.
        ``new_tokens``: of the prompt, those that the endpoint's cache did not hold.
        """
    def find(self, blocks: Sequence[int]) -> dict[int, int]:
        """The endpoints that hold a beginning of a prompt: row → how many of ``blocks``.

        The 64 with the longest beginnings, if there are more.
        """
    # -- logs ----------------------------------------------------------------------------------
    def take_log(self, limit: int) -> tuple[list[tuple[int, int, bytes]], int]:
        """What the workers have sent since the last call, and how much of it is left out.

        A list of (row, new tokens, blocks): of each worker the newest ``limit``. A worker's log has
        room for 512 prompts.
        """
