"""An AMQP 1.0 peer that behaves as Service Bus does, on Apache Qpid Proton.

    python tests/brokers/servers/amqp_peer.py PORT QUEUE[,ATTRIBUTE=VALUE]…

A queue is created when it is first used, unless its name begins with ``missing``; its attributes
are ``lock_s`` and ``sessions``. The name of a subscription is TOPIC/Subscriptions/NAME; what is
sent to a topic reaches its subscriptions.

What this proves: that the client speaks AMQP 1.0 with an implementation that is not its own; that
it presents a token at ``$cbs``, grants credit, sends single messages and batches, settles
deliveries (accepted, modified, released) and waits for the outcome, and renews locks at
``$management``; what it does when a lock is lost, a message is too large, the entity is missing or
has sessions, and the connection is cut or silent.

What it does not prove: all that only Microsoft's service knows. Tokens are not checked, so neither
are SAS signatures nor Entra ID; there is no TLS; throttling, the limits of the tiers, dead-letter
queues, idle timeouts, forced detaches and the text of errors are not as in Azure, or not there. The
service's own behaviour is taken from Microsoft's description of the protocol and from what the
client library expects.

Everything is in memory. SIGUSR1 closes the port and all connections, SIGUSR2 opens the port again:
an outage that keeps the messages, as the service does. SIGHUP breaks all locks. Prints a line when
it serves; ends with its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import uuid
from collections import deque
from typing import Any

from proton import (
    Array,
    Condition,
    Data,
    Delivery,
    Endpoint,
    Handler,
    Link,
    Message,
    symbol,
    timestamp,
    ulong,
)
from proton.reactor import ApplicationEvent, Container, EventInjector

PR_SET_PDEATHSIG = 1
MESSAGE_MAX_BYTES = 1 << 20  # of the premium tier
CREDIT = 200
LOCK_S = 30.0
TICK_S = 0.1  # between looks for locks that have expired
LOCK_LOST = "com.microsoft:message-lock-lost"


class Stored:
    """A message in a queue."""

    def __init__(self, message: Message, number: int) -> None:
        self.message = message
        self.number = number
        self.count = 0  # of failed deliveries
        self.token: uuid.UUID | None = None  # of the lock
        self.locked_until_s = 0.0


class Queue:
    """A queue, or the subscription of a topic."""

    def __init__(self, lock_s: float = LOCK_S, sessions: bool = False) -> None:
        self.lock_s = lock_s
        self.sessions = sessions
        self.waiting: deque[Stored] = deque()
        self.locked: dict[uuid.UUID, Stored] = {}
        self.links: list[Link] = []  # of receivers
        self._numbers = 0

    def add(self, message: Message) -> None:
        self._numbers += 1
        self.waiting.append(Stored(message, self._numbers))

    def settle(self, token: uuid.UUID, keep: bool, failed: bool) -> bool:
        """Delete a locked message or make it available; False if the lock is lost."""
        stored = self.locked.pop(token, None)
        if stored is None:
            return False
        if keep:
            stored.count += failed
            self.waiting.appendleft(stored)
        return True

    def renew(self, token: uuid.UUID) -> float | None:
        """The time to which a lock is extended; None if it is lost."""
        if stored := self.locked.get(token):
            stored.locked_until_s = time.time() + self.lock_s
            return stored.locked_until_s
        return None

    def expire(self) -> None:
        now_s = time.time()
        for token in [t for t, stored in self.locked.items() if stored.locked_until_s <= now_s]:
            self.settle(token, keep=True, failed=True)

    def dispatch(self) -> None:
        """Send messages on the links that have credit, in turn."""
        while self.waiting:
            link = next((link for link in self.links if link.credit > 0), None)
            if link is None:
                return
            self.links.remove(link)
            self.links.append(link)
            self._deliver(link, self.waiting.popleft())

    def _deliver(self, link: Link, stored: Stored) -> None:
        stored.token = uuid.uuid4()
        stored.locked_until_s = time.time() + self.lock_s
        self.locked[stored.token] = stored
        message = stored.message
        message.delivery_count = stored.count
        message.annotations = {
            symbol("x-opt-locked-until"): timestamp(int(stored.locked_until_s * 1000)),
            symbol("x-opt-sequence-number"): stored.number,
            symbol("x-opt-enqueued-time"): timestamp(int(time.time() * 1000)),
        }
        delivery = link.delivery(stored.token.bytes_le)  # the tag is the lock token
        link.stream(message.encode())
        link.advance()
        delivery.context = stored.token


class Peer(Handler):
    """The protocol. One thread."""

    def __init__(self, port: int, queues: dict[str, Queue]) -> None:
        self._port = port
        self._queues = queues
        self._connections: set[Any] = set()
        self.injector = EventInjector()

    # The port and the connections

    def on_reactor_init(self, event: Any) -> None:
        self._container = event.container
        self._container.selectable(self.injector)
        self._container.schedule(TICK_S, self)
        self._listen()

    def _listen(self) -> None:
        self._acceptor = self._container.listen(f"amqp://127.0.0.1:{self._port}")
        print("serving", self._port, flush=True)

    def on_outage(self, event: Any) -> None:
        self._acceptor.close()
        for queue in self._queues.values():
            queue.links.clear()
        for connection in self._connections:
            if connection.transport is not None:
                connection.transport.close_head()
                connection.transport.close_tail()
        self._connections.clear()

    def on_repair(self, event: Any) -> None:
        self._listen()

    def on_break_locks(self, event: Any) -> None:
        for queue in self._queues.values():
            for token in list(queue.locked):
                queue.settle(token, keep=True, failed=True)
            queue.dispatch()

    def on_timer_task(self, event: Any) -> None:
        for queue in self._queues.values():
            queue.expire()
            queue.dispatch()
        self._container.schedule(TICK_S, self)

    def on_connection_remote_open(self, event: Any) -> None:
        self._connections.add(event.connection)
        event.connection.open()

    def on_session_remote_open(self, event: Any) -> None:
        event.session.open()

    def on_session_remote_close(self, event: Any) -> None:
        event.session.close()

    def on_connection_remote_close(self, event: Any) -> None:
        event.connection.close()

    def on_transport_closed(self, event: Any) -> None:
        self._connections.discard(event.connection)
        for queue in self._queues.values():
            queue.links = [link for link in queue.links if link.connection != event.connection]

    # Links

    def on_link_remote_open(self, event: Any) -> None:
        link = event.link
        link.source.copy(link.remote_source)
        link.target.copy(link.remote_target)
        link.context = entity = self._entity(link)
        if entity.rpartition("/")[2] in ("$cbs", "$management"):
            if link.is_receiver:
                link.flow(CREDIT)
        elif entity.startswith("missing"):
            self._refuse(link, "amqp:not-found", f"The messaging entity {entity!r} is not there.")
            return
        elif link.is_receiver:
            link.max_message_size = ulong(MESSAGE_MAX_BYTES)
            link.flow(CREDIT)
        elif self._queue(entity).sessions:
            self._refuse(
                link,
                "amqp:not-allowed",
                "It is not possible for an entity that requires sessions to create a non-sessionful"
                " message receiver.",
            )
            return
        else:
            link.snd_settle_mode = Link.SND_UNSETTLED
            link.rcv_settle_mode = Link.RCV_SECOND
            self._queue(entity).links.append(link)
        link.open()

    def _refuse(self, link: Link, condition: str, description: str) -> None:
        link.open()
        link.condition = Condition(condition, description)
        link.close()

    def _entity(self, link: Link) -> str:
        """The path of the address, without the namespace."""
        end = link.remote_source if link.is_sender else link.remote_target
        return (end.address or "").partition("://")[2].partition("/")[2] or end.address

    def _queue(self, entity: str) -> Queue:
        return self._queues.setdefault(entity.lower(), Queue())

    def on_link_remote_close(self, event: Any) -> None:
        event.link.close()
        for queue in self._queues.values():
            if event.link in queue.links:
                queue.links.remove(event.link)

    def on_link_remote_detach(self, event: Any) -> None:
        self.on_link_remote_close(event)

    def on_link_flow(self, event: Any) -> None:
        link = event.link
        if link.is_sender and "$" not in link.context:
            self._queue(link.context).dispatch()
            if link.drain_mode:
                link.drained()

    # Deliveries

    def on_delivery(self, event: Any) -> None:
        delivery = event.delivery
        if delivery.link.is_receiver:
            if delivery.readable and not delivery.partial:
                self._incoming(event)
        elif delivery.updated and delivery.context is not None and delivery.remote_state:
            self._settled(delivery)

    def _incoming(self, event: Any) -> None:
        delivery, link = event.delivery, event.link
        data = link.recv(delivery.pending)
        link.advance()
        link.flow(1)
        message = Message()
        message.decode(data)
        entity: str = link.context
        if len(data) > MESSAGE_MAX_BYTES and "$" not in entity:
            description = f"The received message exceeds the limit ({MESSAGE_MAX_BYTES} bytes)."
            link.condition = Condition("amqp:link:message-size-exceeded", description)
            link.close()
            return
        delivery.update(Delivery.ACCEPTED)
        delivery.settle()
        if entity == "$cbs":
            self._reply(link, message, {"status-code": 202, "status-description": "Accepted"}, None)
        elif entity.endswith("/$management"):
            self._manage(link, message, self._queue(entity.removesuffix("/$management")))
        else:
            self._store(entity, batched(data) if "batch" in features(data) else [message])

    def _store(self, entity: str, messages: list[Message]) -> None:
        prefix = f"{entity}/Subscriptions/".lower()
        named = [queue for name, queue in self._queues.items() if name.startswith(prefix)]
        for queue in named or [self._queue(entity)]:
            for message in messages:
                queue.add(message)
            queue.dispatch()

    def _settled(self, delivery: Delivery) -> None:
        token, delivery.context = delivery.context, None
        queue = self._queue(delivery.link.context)
        state = delivery.remote_state
        keep = state in (Delivery.RELEASED, Delivery.MODIFIED)
        if queue.settle(token, keep, failed=state == Delivery.MODIFIED):
            delivery.update(state)
        else:
            # The client needs the map, although AMQP does not.
            info = {symbol("com.microsoft:tracking-id"): str(token)}
            delivery.local.condition = Condition(LOCK_LOST, "The lock supplied is invalid.", info)
            delivery.update(Delivery.REJECTED)
        delivery.settle()
        queue.dispatch()

    # Requests at $management

    def _manage(self, link: Link, request: Message, queue: Queue) -> None:
        operation = request.properties["operation"]
        tokens = list(request.body["lock-tokens"])
        if operation == "com.microsoft:renew-lock":
            until_s = [queue.renew(token) for token in tokens]
            done = None not in until_s
            times = [timestamp(int((at_s or 0) * 1000)) for at_s in until_s]
            body = {"expirations": Array(Data.NULL, Data.TIMESTAMP, *times)}
        else:
            completed = request.body["disposition-status"] == "completed"
            settled = [queue.settle(token, not completed, failed=True) for token in tokens]
            done = all(settled)
            body = {}
            queue.dispatch()
        if done:
            properties = {"statusCode": 200, "statusDescription": "OK"}
        else:
            description = "The lock supplied is invalid."
            properties = {"statusCode": 410, "statusDescription": description}
            properties["errorCondition"] = symbol(LOCK_LOST)
        self._reply(link, request, properties, body)

    def _reply(self, link: Link, request: Message, properties: dict[str, Any], body: Any) -> None:
        reply = Message(body=body, properties=properties, correlation_id=request.id)
        own = link.session
        for answer in list(self._senders(own)):
            if answer.remote_target.address == request.reply_to or answer.context == link.context:
                answer.send(reply).settle()
                return

    def _senders(self, session: Any) -> Any:
        link = session.connection.link_head(Endpoint.LOCAL_ACTIVE)
        while link is not None:
            if link.is_sender and link.session == session:
                yield link
            link = link.next(Endpoint.LOCAL_ACTIVE)


def features(data: bytes) -> set[str]:
    """What a message consists of: a batch has several data sections."""
    return {"batch"} if len(sections(data)) > 1 else set()


def sections(data: bytes) -> list[bytes]:
    """The contents of the data sections of a message (AMQP 1.0, part 3.2.6)."""
    found, decoder = [], Data()
    while data:
        used = decoder.decode(data)
        decoder.rewind()
        decoder.next()
        if decoder.type() == Data.DESCRIBED:
            decoder.enter()
            decoder.next()
            descriptor = decoder.get_object()
            decoder.next()
            if descriptor == 0x75:
                found.append(bytes(decoder.get_binary()))
        decoder.clear()
        data = data[used:]
    return found


def batched(data: bytes) -> list[Message]:
    """The messages of a batch: each is in a data section."""
    messages = []
    for section in sections(data):
        message = Message()
        message.decode(section)
        messages.append(message)
    return messages


def main(port: str, *texts: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        return  # the parent ended before prctl took effect
    queues = {}
    for text in texts:
        name, *attributes = text.split(",")
        pairs = dict(attribute.split("=") for attribute in attributes)
        queues[name.lower()] = Queue(float(pairs.get("lock_s", LOCK_S)), "sessions" in pairs)
    peer = Peer(int(port), queues)
    events = {signal.SIGUSR1: "outage", signal.SIGUSR2: "repair", signal.SIGHUP: "break_locks"}
    for number, name in events.items():
        event = ApplicationEvent(name)
        signal.signal(number, lambda *_, event=event: peer.injector.trigger(event))
    Container(peer).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
