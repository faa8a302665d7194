"""Simulates a Model's engines behind KubeAI in virtual time, for ``kubeai bench simulate``.

The hash ring, the load table and the request keys are the gateway's own code and the engines are
the mock engine's; only time and sockets are simulated. Deterministic: the same setting and traffic
give the same measurements on every machine.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from kubeai._counts import Reservation
from kubeai.simulation.engine import Engine, Sequence
from kubeai.simulation.results import Gaps, Measurement
from kubeai.simulation.routers import make_router
from kubeai.simulation.sessions import Session, Traffic, make_session
from kubeai.simulation.setting import Setting


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

ARRIVE, SEND, STEP, CALL = range(4)
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
        self._active = 0  # conversations started or scheduled
        self._waiting: Iterator[Traffic] = iter(())
        self._paced = _Pace(setting.paced_per_s)
        self._client = _Pace(setting.client_per_s)
        self._measurements: list[Measurement] = []
        self._gaps = Gaps()

    def run(self, conversations: Iterable[Traffic]) -> SimulationRun:
        """Run all conversations, each at its start time or else when another ends."""
        self._waiting = iter(conversations)
        for _ in range(self._setting.concurrency):
            if not self._begin(0.0):
                break
        now_s = 0.0
        events = self._events
        self._router.start(lambda when_s, callback: self._at(when_s, CALL, callback))
        try:
            while self._active:
                now_s, _, kind, subject = heapq.heappop(events)
                self._now_s = now_s
                if kind == STEP:
                    self._step(subject, now_s)
                elif kind == SEND:
                    self._send(subject, now_s)
                elif kind == ARRIVE:
                    self._schedule_turn(subject, now_s)
                else:
                    subject(now_s)
        finally:
            self._router.close()
        preemptions = sum(engine.preemptions for engine in self._engines)
        return SimulationRun(self._measurements, self._gaps, preemptions, now_s)

    def _at(self, when_s: float, kind: int, subject: Any) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), kind, subject))

    def _begin(self, now_s: float) -> bool:
        """Start the next conversation; returns whether another may start at the same time."""
        conversation = next(self._waiting, None)
        if conversation is None:
            return False
        self._active += 1
        session = make_session(next(self._numbers), conversation, self._setting)
        if session.at_s is None:
            self._schedule_turn(session, now_s)
            return True
        self._at(session.at_s, ARRIVE, session)
        return False  # its arrival starts the next one

    def _schedule_turn(self, session: Session, now_s: float) -> None:
        """A turn is due: send it, subject to the rate limits."""
        if session.at_s is not None and not session.turn:
            self._begin(now_s)
        due_s = self._paced.next_s(now_s)
        sent_s = self._client.next_s(due_s)
        measurement = Measurement(session.number, session.turn, due_s, sent_s)
        self._measurements.append(measurement)
        self._at(sent_s + self._setting.network_s, SEND, (session, measurement))

    def _send(self, subject: tuple[Session, Measurement], now_s: float) -> None:
        session, measurement = subject
        asked, output, hashes = session.next_request()
        prompt = asked.prompt.tokens
        number, reservation = self._router.pick(asked)
        measurement.prompt_tokens, measurement.endpoint = prompt, self._names[number]
        request = _InFlight(session, measurement, reservation)
        try:
            self._engines[number].submit(now_s, prompt, output, hashes, request)
        except ValueError:
            measurement.error, measurement.ended_s = (
                "status 400",
                now_s,
            )  # exceeds the engine's KV cache
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
            if sequence.produced == 1 and (reservation := sequence.owner.reservation) is not None:  # type: ignore[attr-defined]
                reservation.prefilled(now_s)
            if sequence.done:
                self._complete(sequence, now_s)

    def _complete(self, sequence: Sequence, now_s: float) -> None:
        request = sequence.owner
        assert isinstance(request, _InFlight)
        measurement, back_s = request.measurement, self._setting.network_s
        first_s = sequence.first_token_s if sequence.output_tokens else now_s
        measurement.first_s, measurement.ended_s = first_s + back_s, now_s + back_s
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
        if not session.is_over:
            self._at(back_s + session.think_s, ARRIVE, session)
            return
        self._active -= 1
        if session.at_s is None:
            self._begin(back_s)


def simulate(
    setting: Setting, conversations: Iterable[Traffic], watch: Watch | None = None
) -> SimulationRun:
    """Simulate a setting; see :class:`Cluster`."""
    return Cluster(setting, watch).run(conversations)
