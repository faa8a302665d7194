# cython: language_level=3, nonecheck=True
"""Removes the report of usage from an event stream whose client has not asked for it.

The gateway asks engines to report the tokens of a stream (``openai/_usage_option.pyx``). What they
write because of it is removed, byte for byte:

- the event whose data has an empty list of ``choices`` and an object as ``usage``;
- the member ``"usage":null`` of the other events' data, with the comma and the spaces that separate
  it. Engines that write it without being asked, too, are filtered with ``keeps_null``: it stays.

All else is passed on as it comes. Only members at the top level of an event's data count. Contents
cannot pass for one: quotes in a JSON string are escaped. An event with several lines of data, or
data that is not a JSON object, is not changed.

Sans I/O. Text may be split anywhere; an event is held until it is complete, because its last byte
can decide whether it is passed on. No client could use a part of it. One that is longer than
``EVENT_MAX_BYTES`` is passed on as it is.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memchr, memcmp, memmove

from kubeai.gateway.relay._text cimport Text, text_add, text_free, text_grow
from kubeai.openai._json cimport skip_key, skip_space, skip_value

cdef enum:
    EVENT_MAX_BYTES = 1 << 18
    LINE_BYTES = 256  # that are searched for its end at a time
    FIELD_BYTES = 5  # of "data:"
    USAGE_BYTES = 7  # with quotes, as below
    CHOICES_BYTES = 9


cdef inline bint has_usage(const char *at, Py_ssize_t size) noexcept:
    """Whether a text has ``"usage"``, searched by its rarest letter."""
    cdef const char *begin = at
    cdef const char *end = at + size
    while True:
        at = <const char *> memchr(at, c"g", end - at)
        if at is NULL:
            return False
        if at - begin >= 4 and end - at >= 3 and memcmp(at - 4, b'"usage"', USAGE_BYTES) == 0:
            return True
        at += 1


cdef inline const char *line_end(const char *at, const char *end) noexcept:
    """The next CR or LF; NULL if there is none."""
    cdef const char *stop
    cdef const char *lf
    cdef const char *cr
    while at < end:
        # Not the whole input at once: it may have thousands of CRs before its only LF.
        stop = at + min(end - at, LINE_BYTES)
        lf = <const char *> memchr(at, c"\n", stop - at)
        cr = <const char *> memchr(at, c"\r", (stop if lf is NULL else lf) - at)
        if cr is not NULL or lf is not NULL:
            return lf if cr is NULL else cr
        at = stop
    return NULL


cdef struct Report:
    # The member ``usage``, with what separates it from the others.
    const char *at  # NULL: there is none
    const char *after
    bint is_null
    bint is_object
    bint has_no_choices  # ``choices`` is an empty list


cdef const char *data_of(const char *at, const char *end, const char **found_end) noexcept:
    """The JSON object in an event's only line of data, and the end of the line.

    NULL if the event has no such line, or several.
    """
    cdef const char *found = NULL
    cdef const char *after
    while at < end:
        after = line_end(at, end)
        if after is NULL:
            after = end
        if after - at >= FIELD_BYTES and memcmp(at, b"data:", FIELD_BYTES) == 0:
            if found is not NULL:
                return NULL
            found = at + FIELD_BYTES
            found_end[0] = after
            while found < after and found[0] == c" ":
                found += 1
        elif after - at == FIELD_BYTES - 1 and memcmp(at, b"data", FIELD_BYTES - 1) == 0:
            return NULL  # an empty line of data
        at = after + 1
    return found if found is not NULL and found[0] == c"{" else NULL


cdef bint read_report(const char *at, const char *end, Report *report) noexcept:
    """Read an object from its brace on; False if it is malformed. A line end follows the text."""
    cdef const char *before = at  # the comma, or the brace
    cdef const char *key
    cdef const char *value
    cdef bint is_usage
    report.at = report.after = NULL
    report.is_null = report.is_object = report.has_no_choices = False
    at = skip_space(at + 1)
    while at < end and at[0] != c"}":
        key = at
        value = skip_key(at, end)
        if value is NULL:
            return False
        at = skip_value(value, end)
        if at is NULL or at >= end:
            return False
        is_usage = value - key > USAGE_BYTES and memcmp(key, b'"usage"', USAGE_BYTES) == 0
        if is_usage:
            report.is_null = value[0] == c"n"
            report.is_object = value[0] == c"{"
            report.at = before
            report.after = at
        elif value - key > CHOICES_BYTES and memcmp(key, b'"choices"', CHOICES_BYTES) == 0:
            report.has_no_choices = value[0] == c"[" and skip_space(value + 1)[0] == c"]"
        at = skip_space(at)
        if at[0] == c",":
            if is_usage and before[0] == c"{":  # the first member: the comma after it goes
                report.at = key
                report.after = skip_space(at + 1)
            before = at
            at = skip_space(at + 1)
            if at[0] == c"}":
                return False
        elif at[0] != c"}":
            return False
        elif is_usage and before[0] == c"{":
            report.at = key
    return at < end and skip_space(at + 1) >= end


cdef class UsageFilter:
    """The filter of one response at a time; ``begin`` starts each."""

    def __init__(self, bint keeps_null):
        self.keeps_null = keeps_null

    def __dealloc__(self):
        text_free(&self.held)
        text_free(&self.out)

    cdef void begin(self) noexcept:
        self.held.size = self.out.size = 0
        self.scanned = 0
        self.at_line = True
        self.after_cr = self.passes_on = self.drops_lf = False

    cdef bint passes(self, const char *data, Py_ssize_t size) noexcept:
        """Whether the body's next bytes are whole events that are passed on as they are."""
        return (
            self.held.size == 0
            and not self.passes_on
            and size >= 2
            and data[size - 1] == c"\n"
            and data[size - 2] == c"\n"
            and not has_usage(data, size)
        )

    cdef bytes feed(self, bytes data, bint complete):
        """The text to send for the body's next bytes. ``complete``: they are the last."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t done = 0
        cdef Py_ssize_t end
        cdef bytes text
        if size and self.drops_lf:
            self.drops_lf = False
            if PyBytes_AS_STRING(data)[0] == c"\n":
                data = data[1:]
                size -= 1
        if self.passes(PyBytes_AS_STRING(data), size):
            return data
        text_grow(&self.held, size + 1)
        text_add(&self.held, PyBytes_AS_STRING(data), size)
        self.held.at[self.held.size] = 0  # for the JSON scanner
        while True:
            end = self._event_end(complete)
            if end == 0:
                break
            if self.passes_on or end - done > EVENT_MAX_BYTES:
                self.passes_on = False
                text_add(&self.out, self.held.at + done, end - done)
            elif not self._take_event(self.held.at + done, self.held.at + end):
                self.drops_lf = end == self.held.size and self.held.at[end - 1] == c"\r"
            done = end
        size = self.held.size - done  # of the incomplete event
        if self.passes_on or complete or size > EVENT_MAX_BYTES:
            # Without what has not been scanned: a CR whose LF may follow.
            self.passes_on = not complete
            end = self.held.size if complete else self.scanned
            text_add(&self.out, self.held.at + done, end - done)
            done = end
            size = self.held.size - done
        memmove(self.held.at, self.held.at + done, size)
        self.held.size = size
        self.scanned -= done
        text = PyBytes_FromStringAndSize(self.out.at, self.out.size)
        self.out.size = 0
        return text

    cdef Py_ssize_t _event_end(self, bint complete) noexcept:
        """Where the current event ends in ``held``; 0: its end has not been received."""
        cdef const char *begin = self.held.at
        cdef const char *at = begin + self.scanned
        cdef const char *end = begin + self.held.size
        cdef bint is_empty  # the line
        while at < end:
            is_empty = self.at_line
            if not self.at_line or (at[0] != c"\n" and at[0] != c"\r"):
                is_empty = self.at_line = False
                at = line_end(at, end)
                if at is NULL:
                    at = end
                    break
            if at[0] == c"\r":
                if at + 1 == end and not complete and not (is_empty and self.after_cr):
                    break  # whether LF follows is not known yet
                self.after_cr = at + 1 == end or at[1] != c"\n"
                if not self.after_cr:
                    at += 1
            else:
                self.after_cr = False
            at += 1
            self.at_line = True
            if is_empty:
                self.scanned = at - begin
                return self.scanned
        self.scanned = at - begin
        return 0

    cdef bint _take_event(self, const char *at, const char *end) except -1:
        """Pass an event on, or what is left of it; False if nothing is."""
        cdef const char *data
        cdef const char *data_end = end
        cdef Report report
        if has_usage(at, end - at):
            data = data_of(at, end, &data_end)
            if data is NULL or not read_report(data, data_end, &report):
                report.at = NULL
            if report.at is not NULL:
                if report.is_object and report.has_no_choices:
                    return False
                if report.is_null and not self.keeps_null:
                    text_add(&self.out, at, report.at - at)
                    at = report.after
        text_add(&self.out, at, end - at)
        return True


# -- for tests -------------------------------------------------------------------------------------


def without_usage(bint keeps_null, *pieces):
    """What is sent for each piece of a body. For tests only."""
    cdef UsageFilter usage_filter = UsageFilter(keeps_null)
    cdef Py_ssize_t i
    cdef bytes piece
    cdef list out = []
    usage_filter.begin()
    for i, piece in enumerate(pieces):
        out.append(usage_filter.feed(piece, i == len(pieces) - 1))
    return out
