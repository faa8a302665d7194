# cython: language_level=3, nonecheck=True
"""A worker's API keys: :class:`Key` is what a request carries from its head to its end.

gateway/keys.py creates them from the supervisor's messages, ``gateway/_credentials.pyx`` finds them
for requests.
"""

cimport cython

from weakref import WeakValueDictionary

from kubeai.api.labels import label_selector

cdef enum:
    ANSWERS_MAX_COUNT = 64  # that a Selection caches: a key rarely uses more Models

cdef object _selections = WeakValueDictionary()  # by text


cdef Selection selection_of(str text):
    """The Selection with a selector; None for an empty one."""
    cdef Selection selection
    if not text:
        return None
    selection = _selections.get(text)
    if selection is None:
        selection = _selections[text] = Selection(text)
    return selection


@cython.final
cdef class Selection:
    """See the stub."""

    def __init__(self, str text not None):
        self.text = text
        self.answers = {}
        try:
            self.selector = label_selector(text)
        except ValueError:  # the supervisor has checked it
            self.selector = None

    def selects(self, labels):
        return self.selector is not None and self.selector(labels)

    cdef bint selects_route(self, object route) except -1:
        cdef object labels = route.labels
        cdef tuple known = self.answers.get(route.model)
        cdef bint answer
        # A changed route has other labels, even if they are equal. Those that are cached exist, so
        # no others can have their identity.
        if known is not None and known[0] is labels:
            return known[1]
        answer = self.selects(labels)
        if len(self.answers) >= ANSWERS_MAX_COUNT:
            self.answers.clear()
        self.answers[route.model] = (labels, answer)
        return answer


@cython.final
cdef class Key:
    """See the stub."""

    def __init__(self, record not None):
        self.name = record.name
        self.digest = record.digest
        self.row = record.row
        self.generation = record.generation
        self.is_revoked = False
        self._copy_record(record)

    def update(self, record not None):
        """See the stub."""
        if (
            record.name != self.name
            or record.digest != self.digest
            or record.row != self.row
            or record.generation != self.generation
        ):
            return False
        self._copy_record(record)
        return True

    cdef int _copy_record(self, record) except -1:
        self.record = record
        self.tenant = record.tenant
        self.fairness_id = record.tenant or record.name
        self.requests_per_minute = record.requests_per_minute
        self.tokens_per_minute = record.tokens_per_minute
        self.in_flight_max = record.in_flight_max
        self.priority = record.priority
        self.expires_s = record.expires_s
        self.is_admin = record.is_admin
        self.selection = selection_of(record.models)
        return 0

    @property
    def restricted(self):
        """See the stub."""
        return self.selection is not None

    cpdef bint allows(self, object route) except -1:
        return self.selection is None or self.selection.selects_route(route)

    def allows_labels(self, labels):
        return self.selection is None or self.selection.selects(labels)
