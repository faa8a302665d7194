"""The compiled search for a request's key agrees with a plain one, whatever the headers are."""

import sys
import time
from hashlib import sha256

from fakes.api_keys import ALICE, BOB, record
from hypothesis import given
from hypothesis import strategies as st

from kubeai._keys import Key
from kubeai.gateway._credentials import Problem, Source, check, fingerprint, forget, read
from kubeai.gateway.event_counts import EventCounter
from kubeai.gateway.keys import Keys
from kubeai.routing.keys import KeyDelta, KeySnapshot

EXPIRED = "sk-expired"
RECORDS = [record("a", ALICE), record("b", BOB), record("e", EXPIRED, expires_s=time.time() - 9)]
KEYS = {key.digest: key for key in map(Key, RECORDS)}
SOURCES = {
    "authorization": Source.AUTHORIZATION,
    "x-api-key": Source.X_API_KEY,
    "api-key": Source.API_KEY,
}
NAMES = [
    *SOURCES,
    *("cookie", "accept-encoding", "accept", "x-api-keys", "api_key", "api-ke", "authorization2"),
    *("a", "xauthorization", "x-api-ke", "cookies", "accept-encodings", "proxy-authorization"),
]
# As the relay writes them: a name, a colon, a space, and a value without white space at its ends.
values = st.tuples(
    st.sampled_from(("", "Bearer ", "bearer\t ", "BEARER", "Bearer", "Basic ", "Bearers ")),
    st.sampled_from((ALICE, BOB, EXPIRED, "", "x", ALICE + " ", f"{ALICE},{BOB}")),
).map(lambda parts: "".join(parts).strip(" \t"))
spelled = st.sampled_from(NAMES).flatmap(
    lambda name: st.sampled_from((name, name.upper(), name.title()))
)
headers = st.lists(st.tuples(spelled, values), max_size=6)


def token_in(value: str) -> str | None:
    """The key in an Authorization header; None: it has another scheme."""
    if not value:
        return ""
    if value[:6].lower() != "bearer" or value[6:7] not in ("", " ", "\t"):
        return None
    return value[6:].strip(" \t")


def oracle(lines: list[tuple[str, str]]):
    found, sources, other_scheme = [], 0, False
    for name, value in lines:
        source = SOURCES.get(name.lower())
        if source is None:
            continue
        token = token_in(value) if source is Source.AUTHORIZATION else value
        if token is None:
            other_scheme = True
        elif token:
            found.append(token)
            sources |= source
    if not found:
        return None, Problem.NOT_BEARER if other_scheme else Problem.MISSING, sources
    if len(set(found)) > 1:
        return None, Problem.DIFFERENT, sources
    key = KEYS.get(sha256(found[0].encode()).digest())
    if key is None:
        return None, Problem.INVALID, sources
    return key, Problem.EXPIRED if found[0] == EXPIRED else Problem.NO_PROBLEM, sources


def text(lines: list[tuple[str, str]]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in lines).encode()


@given(headers)
def test_the_key_and_the_remaining_headers_are_those_of_the_oracle(lines):
    key, problem, sources, has_cookie, left = read(KEYS, text(lines))
    assert (key, problem, sources) == oracle(lines)
    names = [name.lower() for name, _ in lines]
    assert has_cookie is ("cookie" in names)
    dropped = {*SOURCES, "accept-encoding"}
    assert left == text([line for line in lines if line[0].lower() not in dropped])


@given(st.binary(max_size=200))
def test_any_other_text_is_no_key(credential):
    assert check(KEYS, credential) == (None, Problem.INVALID)


def test_an_empty_text_is_no_key_even_if_a_secret_has_its_digest():
    key = Key(record("a", ""))
    assert check({key.digest: key}, b"") == (None, Problem.INVALID)


def test_a_revoked_key_is_none_even_while_it_is_in_the_table():
    key = Key(record("a", ALICE))
    key.is_revoked = True
    assert check({key.digest: key}, ALICE.encode()) == (None, Problem.INVALID)


def test_a_key_that_was_seen_is_found_only_while_it_is_in_the_table():
    """A fingerprint that finds a key again is no right of its own."""
    table = {}
    keys = Keys(table, 1, EventCounter())
    lines = text([("x-api-key", ALICE)])

    def found():
        answers = [read(table, lines)[:2] for _ in range(2)]
        assert answers[0] == answers[1], "seen before or not"
        return answers[0]

    keys.apply(KeyDelta(1, "a", record("a", ALICE)))
    first = keys.by_name["a"]
    assert found() == (first, Problem.NO_PROBLEM)
    assert read({}, lines)[:2] == (None, Problem.INVALID), "another table"
    keys.apply(KeyDelta(2, "a", record("a", ALICE, row=7)))
    replaced = keys.by_name["a"]
    assert replaced is not first
    assert found() == (replaced, Problem.NO_PROBLEM)
    keys.apply(KeyDelta(3, "b", record("b", ALICE)))  # another Secret with the same key
    assert found() == (keys.by_name["b"], Problem.NO_PROBLEM)
    keys.by_name["b"].is_revoked = True
    assert found() == (None, Problem.INVALID)
    keys.apply(KeySnapshot(4, ()))
    assert found() == (None, Problem.INVALID)


def test_a_key_that_was_seen_is_released_when_it_is_gone():
    table = {}
    keys = Keys(table, 1, EventCounter())
    keys.apply(KeyDelta(1, "a", record("a", ALICE)))
    key = table[sha256(ALICE.encode()).digest()]
    before = sys.getrefcount(key)
    assert read(table, text([("x-api-key", ALICE)]))[0] is key
    assert sys.getrefcount(key) == before + 1
    keys.apply(KeyDelta(2, "a", None))
    assert sys.getrefcount(key) == before - 2  # neither by name nor by digest


def test_keys_are_found_and_released_however_many_were_seen():
    """More than the places for keys that were seen, so that some of them had to make room."""
    texts = [b"sk-%d" % n for n in range(33_000)]
    made = [Key(record("a", text.decode())) for text in texts]
    table = {key.digest: key for key in made}
    before = list(map(sys.getrefcount, made))
    for _ in range(2):
        assert all(check(table, text)[0] is key for text, key in zip(texts, made, strict=True))
    seen = list(map(sys.getrefcount, made))
    assert 0 < sum(seen) - sum(before) < len(made), "some of them have made room"
    list(map(forget, made))
    assert list(map(sys.getrefcount, made)) == before


def test_a_key_that_was_seen_can_expire():
    key = Key(record("a", ALICE))
    lines = text([("x-api-key", ALICE)])
    assert read({key.digest: key}, lines)[1] == Problem.NO_PROBLEM
    assert key.update(record("a", ALICE, expires_s=time.time() - 9))
    assert read({key.digest: key}, lines)[:2] == (key, Problem.EXPIRED)


def siphash(secret: bytes, message: bytes) -> bytes:
    """SipHash-2-4 with 128 bits, as its authors specify it."""
    mask = (1 << 64) - 1
    k0, k1 = (int.from_bytes(secret[at : at + 8], "little") for at in (0, 8))
    v = [k0, k1 ^ 0xEE, k0, k1]
    for i, letters in enumerate((b"somepseu", b"dorandom", b"lygenera", b"tedbytes")):
        v[i] ^= int.from_bytes(letters, "big")

    def rotated(x: int, by: int) -> int:
        return (x << by | x >> (64 - by)) & mask

    def add(to: int, other: int, by: int, *, half: bool) -> None:
        v[to] = v[to] + v[other] & mask
        v[other] = rotated(v[other], by) ^ v[to]
        if half:
            v[to] = rotated(v[to], 32)

    def rounds(count: int) -> None:
        for _ in range(count):
            add(0, 1, 13, half=True)
            add(2, 3, 16, half=False)
            add(0, 3, 21, half=False)
            add(2, 1, 17, half=True)

    whole = len(message) // 8 * 8
    words = [message[at : at + 8] for at in range(0, whole, 8)]
    words.append(message[whole:].ljust(7, b"\0") + bytes([len(message) % 256]))
    for word in (int.from_bytes(each, "little") for each in words):
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    halves = []
    for at, change in ((2, 0xEE), (1, 0xDD)):
        v[at] ^= change
        rounds(4)
        halves.append((v[0] ^ v[1] ^ v[2] ^ v[3]).to_bytes(8, "little"))
    return b"".join(halves)


def test_a_fingerprint_is_the_authors_example():
    expected = "a3817f04ba25a8e66df67214c7550293"
    assert fingerprint(bytes(range(16)), b"").hex() == expected
    assert siphash(bytes(range(16)), b"").hex() == expected


@given(st.binary(min_size=16, max_size=16), st.binary(max_size=600))
def test_a_fingerprint_is_siphash(secret, message):
    assert fingerprint(secret, message) == siphash(secret, message)
