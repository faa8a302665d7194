"""Declarations of ``_keys.pyx``."""

from libc.stdint cimport int64_t, uint32_t

from kubeai._fingerprint cimport Fingerprint


cdef class Selection:
    cdef readonly str text
    cdef object selector
    cdef dict answers  # Model -> (its labels, whether it is selected)
    cdef object __weakref__
    cdef bint selects_route(self, object route) except -1


cdef class Key:
    # What every request reads comes first, in two cache lines: with thousands of keys, each request
    # finds its key in the main memory. The first line is what decides whether a key is accepted.
    cdef Fingerprint fingerprint  # of the key, once a request has had it; see _credentials.pyx
    cdef dict seen_in  # the dictionary that it was found in then
    cdef readonly double expires_s  # Unix time; 0: never
    cdef public bint is_revoked  # its Secret is gone, or has another key
    cdef readonly int row  # in the key table
    cdef readonly uint32_t generation
    cdef readonly bint is_admin
    cdef readonly Selection selection  # of the Models that it may use; None: all
    cdef readonly str fairness_id  # whose account in the fair queue its requests are charged to
    cdef readonly int64_t requests_per_minute  # 0: no limit, as below
    cdef readonly int64_t tokens_per_minute
    cdef readonly int64_t in_flight_max
    cdef object counts  # of the Model that it has used; see gateway/_metering.pyx
    cdef public double mean_output_tokens  # of responses to this worker's requests; 0: none yet
    cdef readonly int priority
    cdef readonly str name  # of the Secret
    cdef readonly bytes digest
    cdef readonly str tenant
    cdef readonly object record  # the KeyRecord
    cdef int _copy_record(self, record) except -1
    cpdef bint allows(self, object route) except -1
