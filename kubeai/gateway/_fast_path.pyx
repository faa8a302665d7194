# cython: language_level=3, nonecheck=True
"""The fast path of a request in C: read, count, pick an endpoint, send.

:class:`FastPath` is the base class of AdmittedRequest in attempts.py and so of Proxy in proxy.py.
It handles what nearly every request needs, from its head to the end of its response, and leaves
everything else to its subclasses: other paths and methods, bodies that are large or that ``scan``
rejects, adapters, canaries, stored responses, headers that change how a request is handled, models
without a ready endpoint, and failures. Its decisions are the same as the subclasses'.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from kubeai._cache_line cimport prefetch
from kubeai._clock cimport coarse_now, now
from kubeai._counts cimport Admission, Reservation, admit
from kubeai._journal cimport (
    ID_MAX_BYTES,
    NOT_PICKED,
    PICK_AWAY,
    PICK_BOUNDED,
    PICK_CACHED,
    PICK_HASHED,
    PICK_LEAST,
    PICK_NEW,
    UNKNOWN_TOKENS,
    Journal,
    Slot,
)
from kubeai._key_table cimport KeyTable
from kubeai._keys cimport Key
from kubeai._limits cimport WITHIN, Charge
from kubeai._load cimport (
    ANSWERED_2XX,
    BROKEN,
    LEFT,
    PICKED_AWAY,
    PICKED_CACHED,
    PICKED_NEW,
)
from kubeai._pick cimport Picker, RoutedFields
from kubeai._prompt cimport Prompt
from kubeai.gateway._credentials cimport NO_PROBLEM, Credential, confirm, take_key
from kubeai.gateway._fast_path_context cimport FastPathContext, JsonRoute
from kubeai.gateway._key_limits cimport charge_for, limit_lines, settle
from kubeai.gateway._metering cimport Meter, tokens_in_bytes
from kubeai.gateway._names cimport engines_json, find_model, renaming_of
from kubeai.gateway._special_headers cimport is_special
from kubeai.gateway.relay._early cimport EarlyStream
from kubeai.gateway.relay._exchange cimport DownstreamEnd, Exchange, Pool
from kubeai.gateway.relay._relay cimport Relay
from kubeai.gateway.relay._usage_filter cimport UsageFilter
from kubeai.openai._body_scan cimport LARGE_BYTES, InferenceRequest, Shape, scan
from kubeai.openai._prompt_scan cimport prompt_for
from kubeai.openai._usage cimport Usage, find_usage, forget_usage
from kubeai.openai._usage_option cimport asks_to_stream, with_usage

from kubeai.gateway._key_limits import refusal
from kubeai.gateway.usage_refusals import UsageRefusals
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.routes import Kind

cdef object RESPONSES = Kind.RESPONSES

cdef enum:
    REQUEST_ID_AT = 14  # in the line "X-Request-Id: …\r\n"
    RETRIES_MAX = 255  # that an entry of the journal can say
    TOKENS_MAX = 1 << 30  # of a request, as estimated

# Engines whose events may have ``"usage":null`` also if nobody asks for usage.
cdef frozenset NULL_USAGE_ENGINES = frozenset(("SGLang",))


cdef inline uint32_t known(uint32_t tokens) noexcept:
    """A number of tokens; 0 if it is unknown."""
    return 0 if tokens == <uint32_t> UNKNOWN_TOKENS else tokens


cdef inline str tenant_of(Key key):
    """Whose request it is; the headers that say so without keys are not handled here."""
    return "" if key is None else key.fairness_id


cdef inline uint8_t pick_of(Reservation reservation) noexcept:
    """Why an endpoint was picked, in the journal. Only picks by hash key have a bound."""
    if reservation.bound:
        return PICK_HASHED if reservation.name is reservation.first else PICK_BOUNDED
    if reservation.reason == PICKED_CACHED:
        return PICK_CACHED
    if reservation.reason == PICKED_AWAY:
        return PICK_AWAY
    return PICK_NEW if reservation.reason == PICKED_NEW else PICK_LEAST


cdef class FastPath(EarlyStream):
    """See the module docstring. The relay's context is a FastPathContext."""

    cdef public object _kind
    cdef public bytes _path  # the engine's
    cdef public bytes _payload  # the body sent to the engine; None: an upload, or no body
    cdef public object _upload  # of a request with a multipart form
    cdef public object _request
    cdef public RoutedFields _routed
    cdef public object _asked  # the Model that was asked for; None: _routed
    cdef public object _fallbacks  # None: no attempt has been made to leave _routed
    cdef public object _session  # of a WebSocket whose events name the model
    cdef public Prompt _prompt
    cdef public Admission _admission
    cdef public Reservation _reservation
    cdef public list _candidates  # None: the pick is not explained
    cdef public object _task  # while the request waits
    cdef public object _retries  # set once an attempt has failed
    cdef public bint _is_pinned  # to its endpoint: no other can serve it
    cdef public bint _lost  # the last failed attempt lost its connection
    cdef public bint _is_unanswered  # the last attempt was given up after it had been sent
    cdef public object _observed  # None: this request is not observed
    cdef public object _max_wait_s  # the client's limit on the wait for an endpoint; None: none
    cdef public double _waited_s  # for an endpoint so far
    cdef public int64_t _number  # in the order in which requests began to wait; 0: it has not
    cdef public Key _key  # the client's; None: it has none, and needs none
    cdef public bint _needs_admin  # only an administrator's key may have it answered
    cdef public Charge _charge  # to the key; None: it has no limits
    cdef public str _response_id  # of a response that the engine may store; None: not known
    cdef public bytes _metered  # the payload that asks for usage where the client does not
    cdef public bytes _unmetered  # the same without; None once it has been sent
    cdef public object _refusing  # the Model whose engine has rejected ``_metered``; None: none
    cdef JsonRoute json_route
    # For the journal.
    cdef double began_s  # CLOCK_MONOTONIC; 0: not recorded
    cdef double first_s  # when the first byte of the response's body came; 0: not yet
    cdef Usage usage

    cdef int _begun(self) except -1:
        cdef JsonRoute json_route = None
        cdef FastPathContext context = <FastPathContext?> self.downstream.relay.context
        cdef Credential credential
        cdef bint is_plain
        forget_usage(&self.usage)
        if context.cors is not None:
            self.allow_origin(context.cors)
        if context.keys is not None:
            take_key(self.downstream.head, context.keys, &credential)
        # No Python code may run here: the key is borrowed until it is confirmed.
        is_plain = self.downstream.head.method == b"POST" and not is_special(
            &self.downstream.head.text
        )
        if context.keys is not None and not self._has_key(context, &credential):
            return 0
        if is_plain:
            json_route = context.json_routes.get(self.downstream.head.target)
        if json_route is None:
            self.on_head()
        else:
            self.json_route = json_route
            self._kind = json_route.kind
            self._path = json_route.path
            self.collect(context.body_max_bytes)
        if context.journal is not None:
            self.began_s = now()
        if context.observers is not None:
            self.observe(context.observers)
        return 0

    cdef bint _has_key(self, FastPathContext context, Credential *credential) except -1:
        """Confirm the client's key; False: the request is rejected."""
        self._key = confirm(context.keys, credential)
        if self._key is not None and context.limits is not None:
            context.limits.prefetch(self._key.row)
        if credential.problem == NO_PROBLEM and not credential.has_cookie:
            return True
        return self.check_key(<int> credential.problem, credential.sources)

    cdef int _collected(self) except -1:
        cdef InferenceRequest request = None
        cdef RoutedFields routed = None
        cdef Picker picker
        cdef FastPathContext context = <FastPathContext> self.downstream.relay.context
        if self.json_route is not None and PyBytes_GET_SIZE(self.body) <= LARGE_BYTES:
            request = scan(self.json_route.shape, self.body)
        if request is not None and request.previous.at is NULL:
            routed = find_model(context.models, context.aliases, request)
        if routed is not None and self._key is not None and self._key.selection is not None:
            routed = routed if self._key.allows(routed.route) else None
        self._request = request
        if routed is None or request.adapter is not None:
            self.on_body()
            return 0
        if context.canaried and request.name in context.canaried:
            routed = self.split(request, routed)
        picker = routed.picker
        self._routed = routed
        self._prompt = prompt_for(picker, request, context.logs_prompts)
        self._payload = self.body
        if self._key is not None and not self._is_within_limits():
            return 0
        if request.is_renamed:
            self._payload = request.with_model(engines_json(request))
            self._name_response(request)
        self._admission = admit(
            picker.ring.table, picker.ring.row, picker.ring.generation, context.request_type
        )
        if context.explains:
            self.note_candidates()
        self._place(picker.pick_new(self._prompt, None, tenant_of(self._key)))
        return 0

    cpdef _name_response(self, InferenceRequest request):
        """Have the response name the model as the request does."""
        self.renaming = renaming_of(request)
        if self.renaming is not None:  # a compressed response cannot be read
            self.set_header(b"accept-encoding", b"identity")

    cdef bint _is_within_limits(self) except -1:
        try:
            self._charge_once(False)
        except ErrorResponse as error:
            self._refuse(error)
            return False
        return True

    def _charge_key(self):
        """Count the request for its key, once. ErrorResponse if it exceeds a limit."""
        self._charge_once(self._kind.is_stored)

    cdef int _charge_once(self, bint is_stored) except -1:
        cdef FastPathContext context = <FastPathContext> self.downstream.relay.context
        cdef bytes lines
        if self._key is None or self._charge is not None or context.limits is None:
            return 0
        self._charge = charge_for(context.limits, self._key, self._prompt, self._request, is_stored)
        if self._charge is None:
            return 0
        lines = limit_lines(self._key, self._charge)
        if lines is not None:
            self._add_common_headers(lines)
        if self._charge._excess != WITHIN:
            raise refusal(self._key, self._charge)
        return 0

    @property
    def context(self):
        """The worker's context."""
        return self.downstream.relay.context

    def set_cors_headers(self, bytes lines):
        """Add header lines, each ending in CRLF, to every response to this request; None: none."""
        self.downstream.cors = lines

    def set_target(self, bytes target not None):
        """Replace the request target, before the request is handled."""
        self.downstream.head.target = target

    def close_after(self):
        """Close the client's connection after the response."""
        self.downstream.keep_alive = False

    cdef int _end_revoked(self) except -1:
        if self.answered:
            self.downstream._cut(self.downstream.head.http10)
        else:
            self._is_unanswered = self.upstream is not None
            self._hook(self.revoked)
        return 0

    cpdef _place(self, Reservation reservation):
        """Start an attempt, or hold the request if no endpoint can serve it."""
        if reservation is None:
            self.wait_for_endpoint()
        else:
            self._attempt(reservation)

    cpdef _attempt(self, Reservation reservation):
        self._reservation = reservation
        cdef Pool pool = <Pool?> reservation.target
        if reservation.first is not reservation.name and reservation.first != reservation.name:
            self._moved(reservation)
        if self._candidates is not None:
            self.explain(reservation)
        if reservation.is_probe:
            pool.probing = True
        if reservation.failing:
            pool.failing = True
        if self._payload is None:
            self.send_other(pool)
        elif self._kind is RESPONSES:
            self.send(pool, self._path, self.payload_with_id())
        else:
            if self._key is not None:
                self._ask_for_usage()
            self.send(pool, self._path, self._payload)

    cdef int _moved(self, Reservation reservation) except -1:
        cdef FastPathContext context = <FastPathContext> self.downstream.relay.context
        cdef int64_t suppressed = context.moves._take(coarse_now())
        if suppressed >= 0:
            self.moved(reservation, suppressed)
        return 0

    cdef int _ask_for_usage(self) except -1:
        """Have the engine report the tokens of a stream, and the relay remove the report again."""
        cdef FastPathContext context = <FastPathContext> self.downstream.relay.context
        cdef bytes metered
        if self._refusing is self._routed:
            return 0
        if self._payload is not self._metered:
            self.usage_filter = None
            metered = with_usage(<InferenceRequest?> self._request, self._payload)
            if metered is None:
                return 0
            self._unmetered = self._payload
            self._payload = self._metered = metered
        elif self.usage_filter is not None:
            return 0
        if context.usage_refusals is not None and self._routed in context.usage_refusals:
            self._payload = self._unmetered
            return 0
        self.usage_filter = UsageFilter(self._routed.route.engine in NULL_USAGE_ENGINES)
        return 0

    cdef int _body_came(self, double now_s) except -1:
        if self._reservation is not None and not self._reservation._released:
            self.first_s = now_s
            self._reservation._prefilled(now_s)
        return 0

    cdef int _body_ended(self, const char *tail, Py_ssize_t size) except -1:
        cdef Usage usage
        if self._reservation is None or self.status != 200:
            return 0
        if not find_usage(tail, size, &usage):
            return 0
        if self.upstream.head.is_compressed():  # then it was found by chance
            return 0
        self.usage = usage
        cdef Picker picker = self._routed.picker
        if usage.prompt_tokens != <uint32_t> UNKNOWN_TOKENS:
            picker.learn_tokens(self._prompt, usage.prompt_tokens)
        # A stored response that is read was settled when it was computed.
        if picker.queues is not None and (self.json_route is not None or not self._kind.is_stored):
            picker.settle(self._tenant, known(usage.output_tokens))
        self._reservation._count_reported(
            known(usage.prompt_tokens), known(usage.cached_tokens), known(usage.output_tokens)
        )
        return 0

    cdef int _ended(self) except -1:
        cdef object task = self._task
        cdef Reservation reservation = self._reservation
        cdef bint is_reported = self.usage.output_tokens != <uint32_t> UNKNOWN_TOKENS
        cdef bint is_followed = False
        if self._key is not None:
            prefetch(<void *> self._key.counts)
        if task is not None:
            self._task = None
            task.cancel()
        if self._upload is not None:
            self._upload.close()
        if self._fallbacks is not None:
            self._fallbacks.close()
        if self._admission is not None:
            is_followed = self._count(is_reported)
        if reservation is not None and not reservation._released:
            if is_followed:
                reservation._computed()
            else:
                reservation._release()
        if self._charge is not None and self._charge._open:
            settle(self._charge, self._key, self._request, &self.usage, is_reported)
        if self._observed is not None:
            self.observed()
        return 0

    cdef bint _count(self, bint is_reported) except -1:
        """Count an admitted request that has ended.

        True: its response is computed in the background, and followed. What the request counts in
        is then released when that is done.
        """
        cdef FastPathContext context = <FastPathContext> self.downstream.relay.context
        cdef bint is_followed = False
        self._admission._count(self._outcome())
        if self.began_s and context.journal is not None:
            self._record(context.journal)
        if self._key is not None and context.meter is not None:
            is_followed = self._meter(context.meter, is_reported)
            if self._refusing is self._routed and self.status == 200:
                if context.usage_refusals is None:
                    context.usage_refusals = UsageRefusals()
                context.usage_refusals.add(self._routed)
        elif not is_reported:
            if self._response_id is not None and (self._has_response() or self._is_unanswered):
                is_followed = self.is_followed(0, 0)
            if not is_followed and self._routed.picker.queues is not None:
                self._settle_estimate()
        if self._admission._open and not is_followed:
            self._admission._close()
        return is_followed

    cdef int _settle_estimate(self) except -1:
        """Charge the tenant of a request without a key for output that no engine has reported."""
        cdef InferenceRequest request = <InferenceRequest?> self._request
        cdef bint streams = asks_to_stream(request)
        cdef int64_t tokens
        if (streams or request.generates) and self._has_response():
            tokens = min(<int64_t> TOKENS_MAX, tokens_in_bytes(self.answer_bytes, streams))
            self._routed.picker.settle(self._tenant, <uint32_t> tokens)
        return 0

    cdef int _record(self, Journal journal) except -1:
        """Enter the request in the journal."""
        cdef Reservation reservation = self._reservation
        cdef bytes line = self.downstream.head.request_id
        cdef Py_ssize_t id_size = PyBytes_GET_SIZE(line) - REQUEST_ID_AT - 2
        cdef int retries = 0 if self._retries is None else min(self._retries.count, RETRIES_MAX)
        cdef Slot *slot = journal.begin()
        slot.began_s = self.began_s
        slot.duration_s = <float> (now() - self.began_s)
        slot.waited_s = <float> self._waited_s
        slot.first_s = <float> (self.first_s - self.began_s if self.first_s else -1)
        slot.model_row = self._admission.row
        slot.model_generation = self._admission.generation
        slot.row = -1
        slot.generation = 0
        slot.expected_tokens = 0
        slot.pick = NOT_PICKED
        if reservation is not None:
            slot.row = reservation.row
            slot.generation = reservation.generation
            slot.expected_tokens = reservation.cached
            slot.pick = pick_of(reservation)
        slot.status = <uint16_t> self.status
        slot.end = 2 if self.broken else 1 if self.whole else 0
        slot.retries = <uint8_t> retries
        slot.estimated_tokens = 0
        slot.streamed = False
        if self._prompt is not None:
            slot.estimated_tokens = self._prompt.tokens
            slot.streamed = self._prompt.streams
        slot.prompt_tokens = self.usage.prompt_tokens
        slot.cached_tokens = self.usage.cached_tokens
        slot.output_tokens = self.usage.output_tokens
        id_size = max(0, min(id_size, ID_MAX_BYTES))
        slot.id_size = <uint8_t> id_size
        memcpy(slot.id, PyBytes_AS_STRING(line) + REQUEST_ID_AT, id_size)
        journal.commit(slot)
        return 0

    cdef bint _meter(self, Meter meter, bint is_reported) except -1:
        """Count the request for its key, unless its response is followed; returns whether it is.

        Afterwards all of ``usage`` is known, or estimated.
        """
        cdef Usage *usage = &self.usage
        cdef str model = self._routed.model
        cdef bint is_estimated = self._estimate(meter, model)
        if (
            self._kind is RESPONSES
            and not is_reported
            and (self._has_response() or self._is_unanswered)
            and self.is_followed(
                usage.prompt_tokens,
                usage.output_tokens if asks_to_stream(<InferenceRequest> self._request) else 0,
            )
        ):
            self._charge = None  # ended with the response
            return True
        if not is_reported and usage.output_tokens:  # as estimated
            self._routed.picker.settle(tenant_of(self._key), usage.output_tokens)
        meter.count(self._key, model, usage, is_estimated)
        return False

    cdef bint _has_response(self) noexcept:
        """Whether a response has begun, or the client has given the request up at an engine."""
        return self._reservation is not None and (
            200 <= self.status < 300 or (self.status == 0 and not self.whole)
        )

    cdef bint _estimate(self, Meter meter, str model) except -1:
        """Estimate what is not known of ``usage``; returns whether anything is estimated."""
        cdef Usage *usage = &self.usage
        cdef InferenceRequest request = <InferenceRequest?> self._request
        cdef bint streams = asks_to_stream(request)
        cdef bint knows_output = usage.output_tokens != <uint32_t> UNKNOWN_TOKENS
        cdef bint is_reported = knows_output or usage.prompt_tokens != <uint32_t> UNKNOWN_TOKENS
        cdef bint is_estimated = False
        if self.json_route is None and self._kind.is_stored:  # counted when it was computed
            forget_usage(usage)
            is_reported = True
        elif streams and self.whole and knows_output:
            meter.learn(model, self.answer_bytes, usage.output_tokens)
        if self._has_response():
            if usage.prompt_tokens == <uint32_t> UNKNOWN_TOKENS and self._prompt is not None:
                usage.prompt_tokens = self._prompt.tokens
                is_estimated = self._prompt.tokens != 0
            if (streams or request.generates) and not is_reported:
                usage.output_tokens = <uint32_t> min(
                    <int64_t> TOKENS_MAX, meter.tokens_in(model, self.answer_bytes, streams)
                )
                is_estimated = True
        usage.prompt_tokens = known(usage.prompt_tokens)
        usage.cached_tokens = known(usage.cached_tokens)
        usage.output_tokens = known(usage.output_tokens)
        return is_estimated

    cdef int _outcome(self) noexcept:
        if self.broken:
            return BROKEN
        if self.whole and self.status == 101:
            return ANSWERED_2XX
        if not self.whole or not 200 <= self.status < 600:
            return LEFT
        return ANSWERED_2XX + self.status // 100 - 2

    # implemented by the subclass

    def _refuse(self, error):
        """Respond with an error of the gateway."""
        raise NotImplementedError

    def wait_for_endpoint(self):
        """Hold the request."""
        raise NotImplementedError

    def send_other(self, pool):
        """Send a request to an endpoint whose body is not in ``_payload``."""
        raise NotImplementedError

    def payload_with_id(self):
        """The body, with the ID of the response that the engine stores if the gateway sets it."""
        raise NotImplementedError

    def moved(self, reservation, suppressed):
        """Log that a request goes to another endpoint than the one its key maps to.

        ``suppressed``: how many such requests were not logged since the last one.
        """
        raise NotImplementedError

    def check_key(self, problem, sources):
        """Check a request that has no valid key in a header, or that has cookies.

        True: it may proceed. False: an error response was sent. ``problem``: a Problem;
        ``sources``: the headers with keys.
        """
        raise NotImplementedError

    def is_followed(self, prompt_tokens, sent_tokens):
        """Whether the response may be computed in the background. The engine is then asked for it.

        When it is done, it is counted for its key, and the charge, the Admission and the
        Reservation end. Both numbers are estimates; the client of a stream was sent
        ``sent_tokens``. ``prompt_tokens`` 0: no response has begun.
        """
        raise NotImplementedError

    def revoked(self):
        """The request's key has been revoked, and nothing has been answered: respond with 401."""
        raise NotImplementedError

    def split(self, request, routed):
        """The Model that serves a request for one with a canary."""
        raise NotImplementedError

    def allow_origin(self, policy):
        """Set the response's CORS headers."""
        raise NotImplementedError

    def note_candidates(self):
        """If the client asks for it, note what the pick will compare in ``_candidates``."""
        raise NotImplementedError

    def explain(self, reservation):
        """Tell the client why an endpoint was picked, in a header of the response."""
        raise NotImplementedError

    def observe(self, observers):
        """Notify observers of a new request; keep their observation in ``_observed``."""
        raise NotImplementedError

    def observed(self):
        """Notify observers that the request has ended."""
        raise NotImplementedError


def end_revoked(Relay relay not None):
    """See the stub."""
    cdef Exchange exchange
    cdef Key key
    for downstream in list(relay.downstreams):
        exchange = (<DownstreamEnd?> downstream).exchange
        if isinstance(exchange, FastPath):
            key = (<FastPath> exchange)._key
            if key is not None and (
                key.is_revoked or ((<FastPath> exchange)._needs_admin and not key.is_admin)
            ):
                (<FastPath> exchange)._end_revoked()
