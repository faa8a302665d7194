# cython: language_level=3
"""Picks in a loop that is compiled, as the gateway's callers are."""

from libc.stdint cimport uint64_t

from kubeai._ring cimport Ring


def pick_and_release(Ring ring, list keys):
    """Pick an endpoint for each key, and release it at once."""
    cdef uint64_t key
    for key in keys:
        ring.pick_hashed(key)._release()
