# cython: language_level=3, nonecheck=True
"""Counts what each API key uses of each Model, between two reports to the supervisor.

A worker has one :class:`Meter` if requests need a key. The fast path counts each request in it when
the request ends. ``take`` returns the counts and forgets them, so that memory is bounded by what is
used between two calls, and each request is reported once. A key keeps the counts of one Model, so
that most requests need no look-up and allocate nothing: with thousands of keys, each request would
otherwise be the first of its key since the last report.

If an engine does not report a response's tokens, or the client disconnects before the end, they are
estimated from the response's size. The bytes per token of a Model's streams are learned from the
streams that report their tokens.
"""

cimport cython
from libc.stdint cimport int64_t

from kubeai._keys cimport Key
from kubeai.openai._usage cimport Usage

from kubeai.routing.usage import UsageRow

cdef enum:
    LEARNED_MIN_TOKENS = 16  # in a shorter stream, the bytes that are no tokens weigh too much
    MODELS_MAX_COUNT = 10_000  # whose bytes per token are kept
    # Of a response that is not streamed:
    HEAD_BYTES = 200  # JSON around its text
    BYTES_PER_TOKEN = 5  # of its text
cdef double STREAM_BYTES_PER_TOKEN = 220  # until one has been learned
cdef double LEARNING_RATE = 0.05


cdef int64_t tokens_in_bytes(int64_t size_bytes, bint streams) noexcept:
    """Estimate the tokens in a response of a Model of which nothing has been learned."""
    if not streams:
        return max(<int64_t> 0, size_bytes - HEAD_BYTES) // BYTES_PER_TOKEN
    return <int64_t> (size_bytes / STREAM_BYTES_PER_TOKEN)


@cython.final
@cython.freelist(64)
cdef class Counts:
    """The sums over a key's requests to one Model since the last report."""

    cdef tuple taken(self):
        """Return the sums as the values of a UsageRow, and reset them to 0."""
        cdef tuple row = (
            self.key.name,
            self.key.tenant,
            self.model,
            self.requests,
            self.estimated_requests,
            self.prompt_tokens,
            self.cached_tokens,
            self.completion_tokens,
        )
        self.key = None
        self.requests = self.estimated_requests = 0
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        return row


@cython.final
cdef class Meter:
    """See the stub."""

    def __cinit__(self):
        self.counts = []
        self.others = {}
        self.bytes_per_token = {}

    cdef int count(self, Key key, str model, const Usage *usage, bint is_estimated) except -1:
        """Count a request. ``usage`` has no UNKNOWN_TOKENS; ``is_estimated``: not reported."""
        cdef Counts counts = <Counts> key.counts
        if counts is None or counts.model is not model:
            counts = self.counts_of(key, model)
        if counts.key is None:
            counts.key = key
            self.counts.append(counts)
        counts.requests += 1
        counts.estimated_requests += is_estimated
        counts.prompt_tokens += usage.prompt_tokens
        counts.cached_tokens += usage.cached_tokens
        counts.completion_tokens += usage.output_tokens
        return 0

    cdef Counts counts_of(self, Key key, str model):
        """The Counts of a key and Model, where ``key.counts`` is not already that one.

        ``key.counts`` belongs to the first Model that the key uses after a report. Until the next
        one, those of its other Models are in ``others``.
        """
        cdef Counts counts = <Counts> key.counts
        if counts is not None and counts.model == model:
            return counts
        if counts is not None and counts.key is not None:
            counts = self.others.get((key, model))
            if counts is None:
                counts = self.others[key, model] = Counts.__new__(Counts)
                counts.model = model
            return counts
        key.counts = counts = Counts.__new__(Counts)
        counts.model = model
        return counts

    cdef int learn(self, str model, int64_t size_bytes, int64_t tokens) except -1:
        """Update a Model's bytes per token from a stream that reported its tokens."""
        cdef double known
        cdef double seen
        if tokens < LEARNED_MIN_TOKENS or size_bytes <= 0:
            return 0
        seen = <double> size_bytes / tokens
        if model in self.bytes_per_token:
            known = self.bytes_per_token[model]
            self.bytes_per_token[model] = known + LEARNING_RATE * (seen - known)
        else:
            if len(self.bytes_per_token) >= MODELS_MAX_COUNT:
                self.bytes_per_token.clear()
            self.bytes_per_token[model] = seen
        return 0

    cdef int64_t tokens_in(self, str model, int64_t size_bytes, bint streams) except -1:
        """Estimate the tokens in a response of ``size_bytes``."""
        if not streams or model not in self.bytes_per_token:
            return tokens_in_bytes(size_bytes, streams)
        cdef double known = self.bytes_per_token[model]
        return <int64_t> (size_bytes / known)

    def take(self):
        """See the stub."""
        cdef list taken = self.counts
        cdef Counts counts
        self.counts = []
        self.others = {}
        return tuple([UsageRow._make(counts.taken()) for counts in taken])


def counted(
    Meter meter not None, Key key not None, str model not None,
    prompt, cached, completion, bint is_estimated=False
):
    """See the stub."""
    cdef Usage usage
    usage.prompt_tokens = prompt
    usage.cached_tokens = cached
    usage.output_tokens = completion
    meter.count(key, model, &usage, is_estimated)
