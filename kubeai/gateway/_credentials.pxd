"""Declarations of ``_credentials.pyx``."""

from cpython.object cimport PyObject

from kubeai._fingerprint cimport Fingerprint
from kubeai._keys cimport Key
from kubeai.gateway.relay._request_head cimport RequestHead


cpdef enum Problem:  # why a request has no valid key
    NO_PROBLEM
    MISSING
    NOT_BEARER  # Authorization has another scheme, and no other header has a key
    DIFFERENT  # headers have different keys
    INVALID
    EXPIRED


cpdef enum Source:  # of a key; bits
    AUTHORIZATION = 1
    X_API_KEY = 2
    API_KEY = 4


cdef struct Credential:
    Problem problem
    int sources  # of the keys that were found
    bint has_cookie  # the request has cookies
    PyObject *key  # the key, to be confirmed before other code runs; borrowed; NULL: none
    Fingerprint fingerprint  # of its text


cdef int take_key(RequestHead head, dict keys, Credential *credential) except -1
cdef Key confirm(dict keys, Credential *credential)
