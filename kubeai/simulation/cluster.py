"""Simulates a Model's engines behind KubeAI in virtual time, for ``kubeai bench simulate``.

The hash ring, the load table and the request keys are the gateway's own code and the engines are
the mock engine's; only time and sockets are simulated. Deterministic: the same setting and traffic
give the same measurements on every machine.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from kubeai._counts import Reservation
from kubeai.simulation.engine import Engine, Sequence
from kubeai.simulation.results import Gaps, Measurement
from kubeai.simulation.routers import make_router
from kubeai.simulation.sessions import Session, Traffic, make_session
from kubeai.simulation.setting import Setting
from kubeai.simulation.turns import WaitingTurns


class SimulationRun(NamedTuple):
    """The result of a simulation."""

    measurements: list[Measurement]
    gaps: Gaps
    preemptions: int
    ended_s: float


class _Pace:
    """A rate limit of ``per_s`` events per second; 0: unlimited."""

    def __init__(self, per_s: float) -> None:
        self._apart_s = 1 / per_s if per_s else 0.0
        self._free_s = 0.0

    def next_s(self, now_s: float) -> float:
        at_s = max(now_s, self._free_s)
        self._free_s = at_s + self._apart_s
        return at_s


class _InFlight(NamedTuple):
    """An in-flight request, the owner of its sequence."""

    session: Session
    measurement: Measurement
    reservation: Reservation | None


# -- the run ---------------------------------------------------------------------------------------

# READY: requests that wait for a place in flight or for a turn may be sent.
ARRIVE, SEND, STEP, REQUEST, READY, CALL = range(6)
Watch = Callable[[float, list[Engine]], None]


class Cluster:
    """One run of a setting. ``watch(now_s, engines)`` is called after each request is sent."""

    def __init__(self, setting: Setting, watch: Watch | None = None) -> None:
        self._setting = setting
        self._watch = watch
        self._engines = [Engine(setting.engine) for _ in range(setting.engines)]
        self._names = [f"engine-{number}" for number in range(setting.engines)]
        self._now_s = 0.0
        self._router = make_router(setting, self._engines, lambda: self._now_s)
        self._stepping = [False] * setting.engines
        self._ended_s = [0.0] * setting.engines  # end of the last step
        self._events: list[tuple[float, int, int, Any]] = []  # heap of (time, order, kind, subject)
        self._order = itertools.count()
        self._numbers = itertools.count()
        self._left = 0  # events that are not calls of the router
        self._waiting: Iterator[Traffic] = iter(())
        self._request_times: Iterator[float] | None = None
        # Requests that are due: the session, or None for any session's, and when they were due.
        self._due: deque[tuple[Session | None, float]] = deque()
        self._turns: WaitingTurns[Session] = WaitingTurns(self._next_session)
        self._awaited = False  # whether the next request has an event
        self._in_flight = 0
        self._in_flight_max = setting.in_flight_max or math.inf
        self._paced = _Pace(setting.paced_per_s)
        self._client = _Pace(setting.client_per_s)
        self._measurements: list[Measurement] = []
        self._gaps = Gaps()

    def run(
        self, conversations: Iterable[Traffic], request_times: Iterator[float] | None = None
    ) -> SimulationRun:
        """Run all conversations, each at its start time or else when another ends.

        With ``request_times``, requests start at these times instead, each as the next turn of a
        conversation that waits for it or the first turn of another; the run ends with the times or
        the conversations.
        """
        self._waiting = iter(conversations)
        self._request_times = request_times
        if request_times is not None:
            self._schedule_request(0.0)
        else:
            for _ in range(self._setting.concurrency):
                if not self._begin(0.0):
                    break
        self._router.start(lambda when_s, callback: self._at(when_s, CALL, callback))
        try:
            while self._left:
                self._now_s, _, kind, subject = heapq.heappop(self._events)
                self._left -= kind != CALL
                self._handle(kind, subject, self._now_s)
        finally:
            self._router.close()
        preemptions = sum(engine.preemptions for engine in self._engines)
        return SimulationRun(self._measurements, self._gaps, preemptions, self._now_s)

    def _handle(self, kind: int, subject: Any, now_s: float) -> None:
        if kind == STEP:
            self._step(subject, now_s)
        elif kind == SEND:
            self._send(subject, now_s)
        elif kind == ARRIVE:
            self._schedule_turn(subject, now_s)
        elif kind == REQUEST:
            self._awaited = False
            self._due.append((None, subject))
            self._send_due(now_s)
        elif kind == READY:
            self._in_flight -= subject
            self._send_due(now_s)
        else:
            subject(now_s)

    def _at(self, when_s: float, kind: int, subject: Any) -> None:
        self._left += kind != CALL
        heapq.heappush(self._events, (when_s, next(self._order), kind, subject))

    def _next_session(self) -> Session | None:
        conversation = next(self._waiting, None)
        if conversation is None:
            return None
        return make_session(next(self._numbers), conversation, self._setting)

    def _begin(self, now_s: float) -> bool:
        """Start the next conversation; returns whether another may start at the same time."""
        session = self._next_session()
        if session is None:
            return False
        if session.at_s is None:
            self._schedule_turn(session, now_s)
            return True
        self._at(session.at_s, ARRIVE, session)
        return False  # its arrival starts the next one

    def _schedule_turn(self, session: Session, now_s: float) -> None:
        """A turn is due: send it, subject to the limits."""
        if session.at_s is not None and not session.turn:
            self._begin(now_s)
        self._due.append((session, now_s))
        self._send_due(now_s)

    def _schedule_request(self, now_s: float) -> None:
        """Schedule the next request, once the one before it was sent."""
        if self._request_times is None or self._due or self._awaited:
            return
        at_s = next(self._request_times, None)
        if at_s is not None:
            self._awaited = True
            self._at(max(at_s, now_s), REQUEST, at_s)

    def _send_due(self, now_s: float) -> None:
        """Send the requests that are due, subject to the limits."""
        while self._due and self._in_flight < self._in_flight_max:
            session = self._due[0][0] or self._turns.take(now_s)
            if session is None:
                return
            _, arrived_s = self._due.popleft()
            self._in_flight += 1
            due_s = self._paced.next_s(now_s)
            sent_s = self._client.next_s(due_s)
            measurement = Measurement(session.number, session.turn, due_s, sent_s)
            measurement.queued_s = now_s - arrived_s
            self._measurements.append(measurement)
            self._at(sent_s + self._setting.network_s, SEND, (session, measurement))
        self._schedule_request(now_s)

    def _send(self, subject: tuple[Session, Measurement], now_s: float) -> None:
        """Send the next request of a session: the router picks an engine, which begins with it."""
        session, measurement = subject
        asked, output, hashes = session.next_request()
        prompt = asked.prompt.tokens
        number, reservation = self._router.pick(asked)
        measurement.prompt_tokens, measurement.endpoint = prompt, self._names[number]
        request = _InFlight(session, measurement, reservation)
        try:
            self._engines[number].submit(now_s, prompt, output, hashes, request)
        except ValueError:
            measurement.error = "status 400"  # the request exceeds the engine's KV cache
            measurement.ended_s = now_s
            self._end_turn(request, now_s)
            return
        if not self._stepping[number]:
            self._step(number, now_s)
        if self._watch is not None:
            self._watch(now_s, self._engines)

    def _step(self, number: int, now_s: float) -> None:
        step = self._engines[number].step(now_s)
        self._stepping[number] = step.next_s is not None
        if step.next_s is not None:
            self._at(step.next_s, STEP, number)
        if not step.advanced:
            return
        # All decoding sequences waited for this step, ignoring preemptions in between.
        decoded = sum(1 for sequence in step.advanced if sequence.produced > 1)
        if decoded:
            self._gaps.add(now_s - self._ended_s[number], decoded)
        self._ended_s[number] = now_s
        for sequence in step.advanced:
            if sequence.produced == 1:
                request = sequence.owner
                assert isinstance(request, _InFlight)
                if request.reservation is not None:
                    request.reservation.prefilled(now_s)
            if sequence.done:
                self._complete(sequence, now_s)

    def _complete(self, sequence: Sequence, now_s: float) -> None:
        request = sequence.owner
        assert isinstance(request, _InFlight)
        measurement, back_s = request.measurement, self._setting.network_s
        # Embeddings have no first token, and a sequence without output has NaN.
        measurement.first_s = sequence.first_token_s + back_s
        measurement.ended_s = now_s + back_s
        measurement.cached_tokens, measurement.output_tokens = (
            sequence.cached_tokens,
            sequence.produced,
        )
        self._end_turn(request, now_s)

    def _end_turn(self, request: _InFlight, now_s: float) -> None:
        session = request.session
        if request.reservation is not None:
            request.reservation.release()
        session.complete_turn()
        back_s = now_s + self._setting.network_s
        if self._setting.in_flight_max:
            self._at(back_s, READY, 1)
        else:
            self._in_flight -= 1
        if self._request_times is not None:
            if not session.is_over:
                ready_s = back_s + session.think_s
                self._turns.add(session, ready_s)
                self._at(ready_s, READY, 0)
        elif not session.is_over:
            self._at(back_s + session.think_s, ARRIVE, session)
        elif session.at_s is None:
            self._begin(back_s)


def simulate(
    setting: Setting,
    conversations: Iterable[Traffic],
    watch: Watch | None = None,
    request_times: Iterator[float] | None = None,
) -> SimulationRun:
    """Simulate a setting; see :class:`Cluster`."""
    return Cluster(setting, watch).run(conversations, request_times)
