# cython: language_level=3, nonecheck=True
"""A worker's API keys: :class:`Key` is what a request carries from its head to its end."""

cimport cython


@cython.final
cdef class Key:
    """See the stub."""

    def __init__(self, record not None):
        self.record = record
        self.name = record.name
        self.digest = record.digest
        self.tenant = record.tenant
        self.row = record.row
        self.generation = record.generation
        self.requests_per_minute = record.requests_per_minute
        self.tokens_per_minute = record.tokens_per_minute
        self.in_flight_max = record.in_flight_max
        self.priority = record.priority
        self.expires_s = record.expires_s
        self.is_admin = record.is_admin
        self.is_revoked = False
