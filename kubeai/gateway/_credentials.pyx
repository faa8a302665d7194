# cython: language_level=3, nonecheck=True
"""The API key in a request's headers, in C.

A key is accepted as ``Authorization: Bearer``, ``x-api-key`` (Anthropic) and ``api-key`` (Azure).
:func:`take_key` removes these headers, whether or not the key is valid, so that no engine gets one.
It also removes Accept-Encoding, because tokens cannot be counted in a compressed response.
Several headers may have the same key; different ones are rejected, because a proxy in front could
have checked another one than is used here. Empty ones are ignored.

Keys are found by their SHA-256 digests. Which digests exist cannot be learned from the time that a
lookup takes: a client cannot choose the digest of what it sends. The comparison that decides takes
constant time nevertheless. Called by ``_fast_path.pyx`` for requests, by keys.py for other places.

Most requests have a key that this process has seen before. It is recognised by a fingerprint of its
text (_fingerprint.pxd), which takes a tenth of the time, with a random secret of this process. Only
valid keys have one, so wrong keys take no memory. A key that leaves the dictionary is forgotten.
The keys that have been seen are in sets of four, one cache line each. If a set is full, one of its
keys makes room, and is looked up by its digest the next time. With 10,000 keys, this happens to one
in a hundred.

With thousands of keys, a request's key is rarely in the CPU's cache. So :func:`take_key` locates it
by a tag in the set and begins to load it, and :func:`confirm` verifies it a little later.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.stdint cimport uint64_t
from libc.string cimport memchr, memcpy, memmove, memset

import os

from kubeai._cache_line cimport LINE_BYTES, prefetch
from kubeai._clock cimport wall_s
from kubeai._fingerprint cimport Fingerprint, fingerprint_of, is_same_fingerprint
from kubeai._keys cimport Key
from kubeai.gateway.relay._request_head cimport RequestHead
from kubeai.gateway.relay._text cimport Bytes, Text, is_name, strip, text_add, view

# CPython's own SHA-256: OpenSSL's takes 0.8 µs for 48 bytes, most of it to set up; this one 0.3 µs.
try:
    from _sha2 import sha256 as _sha256
except ImportError:
    from _sha256 import sha256 as _sha256  # until Python 3.11

cdef enum:
    DIGEST_BYTES = 32
    NO_KEY = 8  # a Source: removed without being a key


cdef extern from *:
    """
    #define KB_SETS (1 << 13) /* with places for twice as many keys as there may be */
    #define KB_PLACES 4
    typedef struct {
        uint64_t tag;  /* see tag_of */
        PyObject *key; /* with a reference; NULL: free */
    } kb_place;
    static _Alignas(64) kb_place kb_seen[KB_SETS][KB_PLACES]; /* takes no memory until it is used */
    """
    enum: SETS "KB_SETS"
    enum: PLACES "KB_PLACES"
    ctypedef struct Place "kb_place":
        uint64_t tag
        PyObject *key
    Place seen "kb_seen"[1][4]


cdef Fingerprint secret_in(bytes text) except *:
    cdef Fingerprint secret
    if PyBytes_GET_SIZE(text) != sizeof(Fingerprint):
        raise ValueError(f"a secret has {sizeof(Fingerprint)} bytes, not {len(text)}")
    memcpy(&secret, PyBytes_AS_STRING(text), sizeof(Fingerprint))
    return secret


cdef Fingerprint _secret = secret_in(os.urandom(sizeof(Fingerprint)))


cdef inline int source_of(const char *line, Py_ssize_t size) noexcept:
    """Which header with a key a header line is; 0: one that the engine gets."""
    if size > 15 and line[15] == c":" and is_name(line, b"accept-encoding", 15):
        return NO_KEY
    if size > 13 and line[13] == c":" and is_name(line, b"authorization", 13):
        return AUTHORIZATION
    if size > 9 and line[9] == c":" and is_name(line, b"x-api-key", 9):
        return X_API_KEY
    if size > 7 and line[7] == c":" and is_name(line, b"api-key", 7):
        return API_KEY
    return 0


cdef bint take_scheme(Bytes *value) noexcept:
    """Remove "Bearer" from the value of an Authorization header; False: it has another scheme."""
    if value.size < 6 or not is_name(value.at, b"bearer", 6):
        return value.size == 0
    if value.size > 6 and value.at[6] != c" " and value.at[6] != c"\t":
        return False
    value.at += 6
    value.size -= 6
    strip(value)
    return True


cdef int take_lines(Text *text, dict keys, Credential *credential) except -1:
    """Remove the headers with keys from header lines, and find the key that they have."""
    cdef const char *at = text.at
    cdef const char *end = text.at + text.size
    cdef const char *line_end
    cdef char *to = text.at  # what is kept moves here
    cdef Fingerprint other
    cdef Bytes value
    cdef Py_ssize_t name_size
    cdef int source
    credential.problem = MISSING
    credential.sources = 0
    credential.has_cookie = False
    credential.key = NULL
    while at < end:
        line_end = <const char *> memchr(at, c"\r", end - at)
        source = source_of(at, line_end - at)
        if source == NO_KEY:
            pass
        elif source:
            name_size = 13 if source == AUTHORIZATION else 9 if source == X_API_KEY else 7
            value.at = at + name_size + 1
            value.size = line_end - value.at
            strip(&value)
            if source == AUTHORIZATION and not take_scheme(&value):
                if credential.problem == MISSING:
                    credential.problem = NOT_BEARER
            elif value.size and not credential.sources:
                credential.sources = source
                find(keys, value, credential)
            elif value.size:
                credential.sources |= source
                other = fingerprint_of(&_secret, value.at, value.size)
                if not is_same_fingerprint(&credential.fingerprint, &other):
                    credential.problem = DIFFERENT
                    credential.key = NULL
        else:
            if line_end - at > 6 and at[6] == c":" and is_name(at, b"cookie", 6):
                credential.has_cookie = True
            if to != at:
                memmove(to, at, line_end + 2 - at)
            to += line_end + 2 - at
        at = line_end + 2
    memset(to, 0, end - to)  # so that no key is left behind the text
    text.size = to - text.at
    return 0


cdef bint is_equal(const char *one, const char *other, Py_ssize_t size) noexcept:
    """Compare in a time that depends on the size only."""
    cdef unsigned char differences = 0
    cdef Py_ssize_t i
    for i in range(size):
        differences |= <unsigned char> (one[i] ^ other[i])
    return differences == 0


cdef int find(dict keys, Bytes text, Credential *credential) except -1:
    """Find the key with a text: it is still to be confirmed."""
    cdef Key key
    credential.fingerprint = fingerprint_of(&_secret, text.at, text.size)
    credential.key = recall(keys, &credential.fingerprint)
    if credential.key is NULL:
        key = look_up(keys, text)
        if key is None:
            credential.problem = INVALID
            return 0
        remember(keys, key, &credential.fingerprint)
        credential.key = <PyObject *> key  # which is in ``keys``
    credential.problem = NO_PROBLEM
    return 0


cdef Key confirm(dict keys, Credential *credential):
    """The key that was found; None: ``credential`` says why. An expired key is returned as well."""
    cdef Key key
    if credential.key is NULL:
        return None
    key = <Key> credential.key
    if (
        not is_same_fingerprint(&key.fingerprint, &credential.fingerprint)
        or key.is_revoked
        or key.seen_in is not keys
    ):
        credential.problem = INVALID
        return None
    if 0 < key.expires_s <= wall_s():
        credential.problem = EXPIRED
    return key


cdef Key look_up(dict keys, Bytes text):
    """The key with a text, by its digest."""
    cdef bytes digest = _sha256(PyBytes_FromStringAndSize(text.at, text.size)).digest()
    cdef Key key = keys.get(digest)
    if (
        key is None
        or key.is_revoked
        or PyBytes_GET_SIZE(key.digest) != DIGEST_BYTES
        or not is_equal(PyBytes_AS_STRING(key.digest), PyBytes_AS_STRING(digest), DIGEST_BYTES)
    ):
        return None
    return key


cdef inline Place *set_of(const Fingerprint *fingerprint) noexcept:
    return seen[<size_t> (fingerprint.low % SETS)]


cdef inline uint64_t tag_of(dict keys, const Fingerprint *fingerprint) noexcept:
    """Half of the fingerprint: the other one selects the set.

    Other dictionaries have other tags. A key that has a place refers to its dictionary, so no other
    one can have its address.
    """
    return fingerprint.high ^ <uint64_t> <size_t> <PyObject *> keys


cdef PyObject *recall(dict keys, const Fingerprint *fingerprint) noexcept:
    """The key that has probably been seen with a fingerprint in ``keys``; begins to load it."""
    cdef Place *places = set_of(fingerprint)
    cdef uint64_t tag = tag_of(keys, fingerprint)
    cdef const char *at
    cdef int i
    for i in range(PLACES):
        if places[i].tag == tag and places[i].key is not NULL:
            at = <const char *> places[i].key
            prefetch(at)
            prefetch(at + LINE_BYTES)
            prefetch(at + 2 * LINE_BYTES)
            return places[i].key
    return NULL


cdef void put(Place *place, uint64_t tag, PyObject *key) noexcept:
    cdef PyObject *old = place.key
    place.tag = tag
    place.key = key
    Py_XDECREF(old)


cdef int remember(dict keys, Key key, const Fingerprint *fingerprint) except -1:
    cdef Place *places = set_of(fingerprint)
    cdef Place *place = &places[(fingerprint.high >> 32) % PLACES]  # if none is free
    cdef int i
    forget(key)
    for i in range(PLACES):
        if places[i].key is NULL:
            place = &places[i]
            break
    key.fingerprint = fingerprint[0]
    key.seen_in = keys
    Py_INCREF(key)
    put(place, tag_of(keys, fingerprint), <PyObject *> key)
    return 0


def forget(Key key not None):
    """See the stub."""
    cdef Place *places = set_of(&key.fingerprint)
    cdef int i
    key.seen_in = None
    for i in range(PLACES):
        if places[i].key is <PyObject *> key:
            put(&places[i], 0, NULL)


cdef int take_key(RequestHead head, dict keys, Credential *credential) except -1:
    """Remove the headers with keys from a head, and find the key of the request.

    Whether it has a problem is known once it is confirmed.
    """
    return take_lines(&head.text, keys, credential)


def check(dict keys not None, bytes credential not None):
    """See the stub."""
    cdef Credential found
    cdef Bytes text = view(credential)
    if not text.size:
        return None, INVALID
    find(keys, text, &found)
    cdef Key key = confirm(keys, &found)
    return key, found.problem


# -- for tests -------------------------------------------------------------------------------------


def read(dict keys not None, bytes lines not None):
    """See the stub. For tests only."""
    cdef Credential credential
    cdef RequestHead head = RequestHead.__new__(RequestHead)
    cdef Key key
    text_add(&head.text, PyBytes_AS_STRING(lines), PyBytes_GET_SIZE(lines))
    take_key(head, keys, &credential)
    key = confirm(keys, &credential)
    left = head.text.at[:head.text.size] if head.text.size else b""
    return key, credential.problem, credential.sources, bool(credential.has_cookie), left


def fingerprint(bytes secret not None, bytes text not None):
    """See the stub. For tests only."""
    cdef Fingerprint its_secret = secret_in(secret)
    cdef Fingerprint found
    found = fingerprint_of(&its_secret, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    return (<const char *> &found)[:sizeof(Fingerprint)]
