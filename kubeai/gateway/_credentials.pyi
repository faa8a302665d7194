from enum import IntFlag

from kubeai._keys import Key

class Problem(IntFlag):
    """Why a request has no valid key."""

    NO_PROBLEM = 0
    MISSING = 1
    NOT_BEARER = 2  # Authorization has another scheme, and no other header has a key
    DIFFERENT = 3  # headers have different keys
    INVALID = 4
    EXPIRED = 5

class Source(IntFlag):
    """Headers with keys."""

    AUTHORIZATION = 1
    X_API_KEY = 2
    API_KEY = 4

def check(keys: dict[bytes, Key], credential: bytes) -> tuple[Key | None, Problem]:
    """The key with a text that a client has sent, and what is wrong with it.

    The key is also returned if it has expired.
    """

def forget(key: Key) -> None:
    """Release a key that requests can no longer have."""

def read(keys: dict[bytes, Key], lines: bytes) -> tuple[Key | None, Problem, int, bool, bytes]:
    """The key in header lines, each ending in CRLF, as a request's key is found.

    Also: the problem, the Sources, whether there are cookies, and the lines that engines get. For
    tests only.
    """

def fingerprint(secret: bytes, text: bytes) -> bytes:
    """The fingerprint of a text, 16 bytes, with a secret of as many. For tests only."""
