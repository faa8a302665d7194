# cython: language_level=3, nonecheck=True
"""The limits of API keys, as the gateway applies them to a request. Called by the fast path.

A request is charged once, before it is admitted: one request, and the tokens that it is expected to
use. The charge is settled when the request has ended, with what is metered (``_metering.pyx``):
what the engine has reported, or else an estimate. Responses to keys with a limit have the
``x-ratelimit-`` headers of OpenAI's API.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.math cimport ceil
from libc.stdint cimport int64_t, uint32_t

from kubeai._key_table cimport KeyTable
from kubeai._keys cimport Key
from kubeai._limits cimport REQUESTS, TOKENS, TOO_LARGE, Charge, Quota, take
from kubeai._prompt cimport Prompt
from kubeai.gateway.relay._text cimport put, put_number
from kubeai.openai._body_scan cimport InferenceRequest
from kubeai.openai._output cimport asked_tokens
from kubeai.openai._usage cimport UNKNOWN_TOKENS, Usage

from kubeai.openai.errors import ErrorResponse

cdef enum:
    OUTPUT_TOKENS_FIRST = 256
    LINES_MAX_BYTES = 512  # six lines of 32 characters and a number of at most 19 digits
    TOO_LARGE_RETRY_S = 60

OUTPUT_TOKENS = OUTPUT_TOKENS_FIRST

cdef double LEARNED_SHARE = 0.05  # of a new response in the mean


cdef int64_t expected(Key key, Prompt prompt, InferenceRequest request) noexcept:
    """See ``expected_tokens`` in the stub."""
    cdef int64_t tokens = 0 if prompt is None else prompt.tokens
    cdef int64_t output
    if not request.generates:
        return tokens
    output = asked_tokens(&request.asked)
    if output >= 0:
        return tokens + output
    output = OUTPUT_TOKENS_FIRST
    if key is not None:
        if key.mean_output_tokens > 0:
            output = <int64_t> ceil(key.mean_output_tokens)
        if key.tokens_per_minute:  # only what the client asks for makes a request too large
            output = min(output, max(<int64_t> 0, key.tokens_per_minute - tokens))
    return tokens + output


def expected_tokens(Key key, Prompt prompt not None, InferenceRequest request not None):
    """See the stub."""
    return expected(key, prompt, request)


cdef Charge charge_for(
    KeyTable table, Key key, Prompt prompt, InferenceRequest request, bint is_stored
):
    """Charge a request to its key; None if the key has no limits for it.

    ``is_stored``: it is for a stored response. It is not refused because of requests in flight,
    which it may be about to cancel.
    """
    cdef Quota quota
    quota.requests = key.requests_per_minute
    quota.tokens = key.tokens_per_minute
    quota.in_flight = 0 if is_stored else key.in_flight_max
    if not (quota.requests or quota.tokens or key.in_flight_max):
        return None
    table._check_row(key.row)
    table._check_writer()
    return take(table, key.row, key.generation, &quota, expected(key, prompt, request))


cdef str requests(int64_t count):
    return "1 request" if count == 1 else f"{count} requests"


def refusal(Key key not None, Charge charge not None):
    """See the stub."""
    cdef int64_t retry_s = max(<int64_t> 1, <int64_t> ceil(charge.retry_after_s))
    cdef str kind = "requests"
    cdef str text
    if charge._excess == TOO_LARGE:
        kind = "tokens"
        retry_s = TOO_LARGE_RETRY_S
        text = (
            f"The request is too large: it may use {charge.tokens} tokens, and this API key may "
            f"use {key.tokens_per_minute} tokens per minute. Send a shorter prompt, or a smaller "
            "limit for the response (max_tokens)."
        )
    elif charge._excess == TOKENS:
        kind = "tokens"
        text = (
            f"Rate limit reached: this API key may use {key.tokens_per_minute} tokens per minute. "
            f"{charge.tokens_left} are left, and the request may use {charge.tokens}. "
            f"Try again in {retry_s} s."
        )
    elif charge._excess == REQUESTS:
        text = (
            "Rate limit reached: this API key may send "
            f"{requests(key.requests_per_minute)} per minute. Try again in {retry_s} s."
        )
    else:
        text = (
            f"Rate limit reached: this API key may have {requests(key.in_flight_max)} in flight. "
            "Try again when one has ended."
        )
    return ErrorResponse(
        text,
        status=429,
        code="rate_limit_exceeded",
        kind=kind,
        retry_after_s=retry_s,
        is_retryable=charge._excess != TOO_LARGE,
    )


cdef inline char *put_lines(
    char *to, const char *of, Py_ssize_t of_size, int64_t limit, int64_t left, int64_t reset_s
) noexcept:
    """Write the headers of one limit. ``of``: the end of their names, with a colon and a space."""
    to = put(put(to, b"x-ratelimit-limit-", 18), of, of_size)
    to = put(put_number(to, limit), b"\r\nx-ratelimit-remaining-", 24)
    to = put_number(put(to, of, of_size), left)
    to = put(put(to, b"\r\nx-ratelimit-reset-", 20), of, of_size)
    to = put(put_number(to, reset_s // 60), b"m", 1)
    return put(put_number(to, reset_s % 60), b"s\r\n", 3)


cdef bytes limit_lines(Key key, Charge charge):
    """The header lines of a response, each ending in CRLF; None: the key has no such limit."""
    cdef char lines[LINES_MAX_BYTES]
    cdef char *to = lines
    cdef int64_t reset_s = <int64_t> ceil(charge.reset_s)
    if key.requests_per_minute:
        to = put_lines(
            to, b"requests: ", 10, key.requests_per_minute, charge.requests_left, reset_s
        )
    if key.tokens_per_minute:
        to = put_lines(to, b"tokens: ", 8, key.tokens_per_minute, charge.tokens_left, reset_s)
    return PyBytes_FromStringAndSize(lines, to - lines) if to != lines else None


cdef inline void learn(Key key, double tokens) noexcept:
    if key.mean_output_tokens <= 0:
        key.mean_output_tokens = tokens
    else:
        key.mean_output_tokens += LEARNED_SHARE * (tokens - key.mean_output_tokens)


def learn_output(Key key not None, int64_t tokens):
    """See the stub."""
    learn(key, <double> tokens)


cdef int settle(
    Charge charge, Key key, InferenceRequest request, const Usage *usage, bint is_reported
) except -1:
    """End a request's charge with the tokens that it has used, as they are metered.

    Unknown: the request was not admitted. ``is_reported``: an engine has reported the output.
    """
    cdef int64_t tokens = 0
    if usage.prompt_tokens != <uint32_t> UNKNOWN_TOKENS:
        tokens = usage.prompt_tokens
    if usage.output_tokens != <uint32_t> UNKNOWN_TOKENS:
        tokens += usage.output_tokens
        # Estimates, such as of a client that has left, say nothing about the key's responses.
        if is_reported and request.generates:
            learn(key, <double> usage.output_tokens)
    charge._end(tokens)
    return 0
