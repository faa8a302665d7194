"""How one stream treats messages, on virtual time, between a fake broker and a fake gateway."""

import asyncio

import pytest
from fakes.broker import MemoryBroker
from fakes.messenger import Scene, error, ok
from fakes.time import FAKE_TIME

from kubeai.brokers.base import BrokerUnavailable
from kubeai.messenger import stream as streams
from kubeai.messenger.in_hand import InHand
from kubeai.messenger.policy import ATTEMPTS_MAX_COUNT, DELIVERIES_MAX_COUNT, HELD_MAX_S

pytestmark = FAKE_TIME


def now():
    return asyncio.get_running_loop().time()


def faults(*operations):
    """A fault for each of these operations, once, in this order."""
    left = list(operations)

    def fault(operation):
        if left and operation == left[0]:
            left.pop(0)
            raise BrokerUnavailable(f"{operation} failed")

    return fault


# -- the usual -------------------------------------------------------------------------------------


async def test_a_message_is_answered_then_acknowledged():
    async with Scene(MemoryBroker()).running() as scene:
        message = scene.ask(prompt="hi")
        await scene.done(1)
        assert scene.answers == [
            {"metadata": {"prompt": "hi"}, "status_code": 200, "body": {"prompt": "hi"}}
        ]
        assert scene.answered == {message: 1}


async def test_as_many_messages_as_handlers_are_served_at_once():
    async with Scene(MemoryBroker(), handlers=3).running() as scene:
        for number in range(9):
            scene.ask(prompt=number)
        began_s = now()
        await scene.done(9)
        assert scene.gateway.serving_max == 3
        assert 3 <= now() - began_s < 4
        assert max(scene.broker.received_max) == 3, "others get what cannot be served here"


async def test_the_broker_is_asked_for_no_more_than_there_are_free_handlers():
    async with Scene(MemoryBroker(), handlers=2).running() as scene:
        for number in range(5):
            scene.ask(prompt=number)
        await asyncio.sleep(0.5)
        assert len(scene.broker.queue("requests").waiting) == 3
        await scene.done(5)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"not json", 400), (b'{"path":"/v1/nope","body":{}}', 404), (b'{"metadata":1}', 400)],
)
async def test_a_malformed_message_is_answered_and_acknowledged(body, status):
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.put("requests", body)
        await scene.done(1)
        assert scene.answers[0]["status_code"] == status
        assert not scene.gateway.requests


async def test_attributes_reach_the_gateway_as_headers():
    async with Scene(MemoryBroker()).running() as scene:
        body = b'{"body":{"model":"m"}}'
        scene.broker.put("requests", body, {"X-Label-Selector": "a=b", "other": "c"})
        await scene.done(1)
        assert scene.gateway.headers == [{"x-label-selector": "a=b"}]


async def test_an_engines_refusal_is_the_response():
    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["m"] = lambda *_: asyncio.sleep(0, error(422))
        scene.ask()
        await scene.done(1, within_s=1)
        assert scene.answers[0]["status_code"] == 422


async def test_a_fault_of_the_messenger_itself_loses_no_message():
    async def broken(*_):
        raise RuntimeError("a bug")

    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["m"] = broken
        scene.ask(prompt="hi")
        await scene.done(1)
        assert scene.answers[0]["status_code"] == 500
        assert scene.answers[0]["metadata"] == {"prompt": "hi"}


# -- attempts --------------------------------------------------------------------------------------


async def test_a_failed_attempt_is_repeated_with_back_off():
    results = [error(503), error(500), error(429), ok()]

    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["m"] = lambda *_: asyncio.sleep(0, results.pop(0))
        scene.ask()
        began_s = now()
        await scene.done(1)
        assert scene.answers[0]["status_code"] == 200
        assert 3.5 <= now() - began_s <= 8, "0.5 to 1 s, then twice that, then four times"
        assert scene.stream.report().retried == 3
        assert len(set(scene.gateway.ids)) == 1, "the attempts have one request ID"


async def test_after_the_last_attempt_its_error_is_the_response():
    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["m"] = lambda *_: asyncio.sleep(0, error(503))
        scene.ask(prompt="hi")
        await scene.done(1)
        assert scene.answers[0]["status_code"] == 503
        assert scene.answers[0]["metadata"] == {"prompt": "hi"}
        assert len(scene.gateway.requests) == ATTEMPTS_MAX_COUNT
        report = scene.stream.report()
        assert (report.dead, report.answered["5xx"]) == (1, 1)


async def test_a_message_that_backs_off_leaves_its_handler_to_others():
    async with Scene(MemoryBroker(), handlers=1).running() as scene:
        scene.gateway.serves["bad"] = lambda *_: asyncio.sleep(0, error(503))
        scene.ask("bad")
        await scene.until("it backs off", lambda: scene.stream.report().retried)
        scene.ask("good")
        await scene.until("the other is answered", lambda: scene.answers, 5)
        assert scene.answers[0]["status_code"] == 200


async def test_a_message_that_was_delivered_too_often_is_given_up():
    """It may be what kills the process."""
    broker = MemoryBroker()
    async with Scene(broker).running() as scene:
        scene.ask(prompt="deadly")
        broker.queue("requests").waiting[0].deliveries = DELIVERIES_MAX_COUNT
        scene.ask(prompt="harmless")
        broker.queue("requests").waiting[1].deliveries = DELIVERIES_MAX_COUNT - 1
        await scene.done(2)
        by_prompt = {each["metadata"]["prompt"]: each for each in scene.answers}
        assert by_prompt["deadly"]["body"]["error"]["code"] == "delivered_too_often"
        assert by_prompt["harmless"]["status_code"] == 200
        assert scene.stream.report().dead == 1


# -- cold models -----------------------------------------------------------------------------------


async def test_messages_of_a_cold_model_do_not_block_others():
    async with Scene(MemoryBroker(), handlers=1).running() as scene:
        cold = scene.gateway.cold["cold"] = asyncio.Event()
        for number in range(5):
            scene.ask("cold", number)
        scene.ask("warm", "x")
        await scene.until("the warm one is answered", lambda: scene.answers, 2)
        assert scene.stream.report().held == 5
        cold.set()
        await scene.done(6, within_s=6)
        assert scene.gateway.serving_max == 1, "those that were held took turns"


async def test_a_retry_that_is_held_again_gives_its_handler_back():
    cold = asyncio.Event()

    async def loses_its_replicas(body, gate):
        gate.on_hold()
        await cold.wait()
        await gate.on_endpoint()
        return ok()

    async with Scene(MemoryBroker(), handlers=1).running() as scene:
        scene.gateway.serves["m"] = loses_its_replicas
        scene.ask("m")
        await scene.until("it is held", lambda: scene.stream.report().held)
        scene.ask("other")
        await scene.until("the other is answered", lambda: scene.answers, 2)
        cold.set()
        await scene.done(2, within_s=2)


async def test_a_model_that_takes_longer_than_hold_timeout_is_waited_for():
    starts_s = 20 * 60

    async def timed_out(body, gate):
        if now() > starts_s:
            return ok()
        gate.on_hold()
        await asyncio.sleep(600)
        return error(504)

    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["m"] = timed_out
        scene.ask("m")
        await scene.done(1, within_s=starts_s + 700)
        assert scene.answers[0]["status_code"] == 200
        assert scene.stream.report().retried == 0


async def test_a_model_that_never_starts_is_given_up_after_hours():
    async def timed_out(body, gate):
        gate.on_hold()
        await asyncio.sleep(600)
        return error(504)

    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["m"] = timed_out
        scene.ask("m")
        began_s = now()
        await scene.done(1)
        assert HELD_MAX_S <= now() - began_s < HELD_MAX_S + 700
        assert scene.answers[0]["status_code"] == 504
        assert scene.stream.report().dead == 1


async def test_a_model_that_cannot_start_is_given_up_after_the_attempts():
    async def cannot_start(body, gate):
        gate.on_hold()
        return error(503, x_should_retry="false")

    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["m"] = cannot_start
        scene.ask("m")
        await scene.done(1, within_s=300)
        assert scene.answers[0]["status_code"] == 503
        assert len(scene.gateway.requests) == ATTEMPTS_MAX_COUNT


async def test_messages_in_hand_are_limited(monkeypatch):
    monkeypatch.setattr(streams, "PARKED_MAX_COUNT", 10)
    async with Scene(MemoryBroker(), handlers=2).running() as scene:
        cold = scene.gateway.cold["cold"] = asyncio.Event()
        for number in range(50):
            scene.ask("cold", number)
        await asyncio.sleep(10)
        assert scene.stream.report().in_hand == 12
        cold.set()
        await scene.done(50)


async def test_bytes_in_hand_are_limited(monkeypatch):
    monkeypatch.setattr(streams, "IN_HAND_MAX_BYTES", 10_000)
    async with Scene(MemoryBroker(), handlers=1).running() as scene:
        cold = scene.gateway.cold["cold"] = asyncio.Event()
        for _ in range(10):
            scene.ask("cold", "x" * 2500)
        await asyncio.sleep(10)
        assert scene.stream.report().in_hand == 2, "each has its prompt twice"
        cold.set()
        await scene.done(10)


# -- deadlines -------------------------------------------------------------------------------------


async def test_the_deadline_is_extended_as_long_as_a_message_is_in_hand():
    async with Scene(MemoryBroker(ack_deadline_s=30)).running() as scene:
        cold = scene.gateway.cold["cold"] = asyncio.Event()
        scene.ask("cold")
        await asyncio.sleep(3600)
        assert scene.stream.report().received == 1
        cold.set()
        await scene.done(1)


async def test_a_redelivery_of_a_message_in_hand_is_acknowledged_with_it():
    broker = MemoryBroker(ack_deadline_s=30)
    async with Scene(broker).running() as scene:
        cold = scene.gateway.cold["cold"] = asyncio.Event()
        scene.ask("cold")
        await scene.until("it is held", lambda: scene.stream.report().held)
        broker.give_back("requests", broker.queue("requests").unacknowledged[0])
        await scene.until("it came again", lambda: scene.stream.report().redelivered == 1)
        cold.set()
        await scene.done(1)
        assert len(scene.gateway.requests) == 1
        assert list(scene.answered.values()) == [1]


# -- losses of the broker --------------------------------------------------------------------------


async def test_a_lost_connection_costs_a_redelivery_but_no_second_request():
    async with Scene(MemoryBroker()).running() as scene:
        cold = scene.gateway.cold["cold"] = asyncio.Event()
        message = scene.ask("cold")
        await scene.until("it is held", lambda: scene.stream.report().held)
        scene.broker.cut()
        await scene.until("it came again", lambda: scene.stream.report().redelivered == 1)
        cold.set()
        await scene.done(1)
        assert len(scene.gateway.requests) == 1
        assert scene.answered == {message: 1}
        await asyncio.sleep(60)
        assert scene.stream.report().requests.connections == 2, "the old delivery is forgotten"


async def test_a_response_that_was_computed_while_the_broker_was_away_is_published_then():
    away = False

    def fault(operation):
        if away:
            raise BrokerUnavailable("away")

    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.fault = fault
        scene.ask()
        await scene.until("it is served", lambda: scene.gateway.serving)
        away = True
        scene.broker.cut()
        await asyncio.sleep(3600)
        assert not scene.answers
        report = scene.stream.report()
        assert not report.requests.connected
        assert not report.responses.connected
        assert report.requests.problem == "away"
        away = False
        await scene.done(1, within_s=60)
        assert len(scene.gateway.requests) == 1


async def test_a_message_whose_acknowledgement_was_lost_is_not_served_again():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.fault = faults("acknowledge")
        scene.ask()
        await scene.done(1)
        await scene.until("it came again", lambda: scene.stream.report().received == 2)
        await scene.until("it is acknowledged", lambda: scene.broker.is_empty("requests"))
        assert len(scene.gateway.requests) == 1
        assert list(scene.answered.values()) == [1]


async def test_a_lost_confirmation_leads_to_a_second_response_with_the_same_id():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.fault = faults("confirm")
        message = scene.ask()
        await scene.until("it is answered twice", lambda: scene.answered[message] == 2)
        await scene.until("it is acknowledged", lambda: scene.broker.is_empty("requests"))
        assert len(scene.gateway.requests) == 1


async def test_a_message_is_not_acknowledged_before_its_response_is_confirmed():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.fault = faults(*["publish"] * 20)
        scene.ask()
        while not scene.answers:
            assert not scene.broker.is_empty("requests")
            await asyncio.sleep(0.1)
        assert scene.stream.report().publish_failures == 20
        await scene.done(1)


async def test_nothing_is_received_while_responses_cannot_be_published():
    def fault(operation):
        if operation == "open_topic":
            raise BrokerUnavailable("no such topic")

    broker = MemoryBroker()
    broker.fault = fault
    async with Scene(broker).running() as scene:
        scene.ask()
        await asyncio.sleep(600)
        assert len(broker.queue("requests").waiting) == 1
        broker.fault = lambda _: None
        await scene.done(1, within_s=60)


async def test_it_reconnects_with_back_off_for_ever():
    attempts = []

    def fault(operation):
        if operation == "subscribe":
            attempts.append(now())
            raise BrokerUnavailable("away")

    broker = MemoryBroker()
    broker.fault = fault
    async with Scene(broker).running() as scene:
        await asyncio.sleep(3600)
        assert 3600 / 30 <= len(attempts) < 300
        broker.fault = lambda _: None
        scene.ask()
        await scene.done(1, within_s=60)


async def test_a_librarys_own_exception_is_survived_and_its_text_is_not_shown():
    def fault(operation):
        if operation in ("subscribe", "open_topic"):
            raise ValueError("password=secret")

    broker = MemoryBroker()
    broker.fault = fault
    async with Scene(broker).running() as scene:
        scene.ask()
        await asyncio.sleep(10)
        assert scene.stream.report().requests.problem == "ValueError"
        broker.fault = lambda _: None
        await scene.done(1)


async def test_an_answered_id_that_is_used_again_is_a_new_message():
    async with Scene(MemoryBroker()).running() as scene:
        for _ in range(2):
            scene.broker.put("requests", b'{"body":{"model":"m"}}', id="same")
            await scene.until("it is acknowledged", lambda: scene.broker.is_empty("requests"))
        assert scene.answered == {"same": 2}


async def test_an_id_that_is_used_again_while_it_is_in_hand_is_a_new_message():
    async with Scene(MemoryBroker()).running() as scene:
        for _ in range(2):
            scene.broker.put("requests", b'{"body":{"model":"m"}}', id="same")
        await scene.until("both are answered", lambda: scene.answered == {"same": 2})
        await scene.until("both are acknowledged", lambda: scene.broker.is_empty("requests"))


async def test_equal_messages_of_a_broker_without_ids_are_all_answered():
    async with Scene(MemoryBroker(unique_ids=False)).running() as scene:
        for _ in range(3):
            scene.broker.put("requests", b'{"body":{"model":"m"}}', id="hash")
        await scene.until("all are answered", lambda: scene.answered["hash"] == 3)
        await scene.until("all are acknowledged", lambda: scene.broker.is_empty("requests"))


async def test_a_redelivery_is_recognised_where_the_broker_does_not_count():
    async with Scene(MemoryBroker(counts=False)).running() as scene:
        scene.broker.fault = faults("acknowledge")
        scene.ask()
        await scene.until("it came again", lambda: scene.stream.report().received == 2)
        await scene.until("it is acknowledged", lambda: scene.broker.is_empty("requests"))
        assert len(scene.gateway.requests) == 1


async def test_the_memory_of_answered_messages_is_limited(monkeypatch):
    monkeypatch.setattr(streams, "ANSWERED_MAX_COUNT", 5)
    async with Scene(MemoryBroker()).running() as scene:
        for number in range(20):
            scene.ask(prompt=number)
        await scene.done(20)
        assert len(scene.stream._answered) == 5


# -- sizes -----------------------------------------------------------------------------------------


async def test_a_response_that_is_too_large_is_replaced_by_an_error_that_says_so():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.size_max_bytes = 1000
        scene.gateway.serves["m"] = lambda *_: asyncio.sleep(0, ok(text="x" * 1000))
        scene.ask("m", "hi")
        await scene.done(1)
        (answer,) = scene.answers
        assert answer["metadata"] == {"prompt": "hi"}
        assert answer["status_code"] == 500
        assert answer["body"]["error"]["code"] == "response_too_large"
        assert "at most 1000 bytes" in answer["body"]["error"]["message"]


async def test_metadata_that_makes_even_the_error_too_large_is_left_out():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.size_max_bytes = 1000
        scene.ask("m", "x" * 2000)
        await scene.done(1)
        assert scene.answers[0]["metadata"] is None
        assert scene.answers[0]["body"]["error"]["code"] == "response_too_large"


# -- slowing down ----------------------------------------------------------------------------------


async def test_receiving_slows_down_while_every_message_fails():
    async with Scene(MemoryBroker(), backoff_max_s=30).running() as scene:
        for _ in range(10_000):
            scene.broker.put("requests", b"malformed")
        await asyncio.sleep(3600)
        assert len(scene.answers) < 1500
        before = len(scene.answers)
        await asyncio.sleep(300)
        assert len(scene.answers) - before <= 4 * 11, "one batch every 30 s"


async def test_a_success_ends_the_slowness():
    async with Scene(MemoryBroker(), handlers=1).running() as scene:
        for _ in range(20):
            scene.broker.put("requests", b"malformed")
        for number in range(20):
            scene.ask(prompt=number)
        await scene.until("the malformed are answered", lambda: len(scene.answers) == 20)
        await scene.done(40, within_s=30 + 2 * 20)


async def test_a_few_errors_do_not_slow_it_down():
    async with Scene(MemoryBroker(), handlers=1).running() as scene:
        for _ in range(streams.ERRORS_FREE_COUNT):
            scene.broker.put("requests", b"malformed")
        await scene.done(streams.ERRORS_FREE_COUNT, within_s=0.5)


# -- drain -----------------------------------------------------------------------------------------


async def test_a_drain_finishes_what_is_served_and_gives_back_the_rest():
    async with Scene(MemoryBroker(), handlers=2).running() as scene:
        scene.gateway.cold["cold"] = asyncio.Event()
        scene.gateway.serves["bad"] = lambda *_: asyncio.sleep(0, error(503))
        for model in ("cold", "bad"):
            scene.ask(model)
        await scene.until("both are parked", lambda: scene.stream.report().retried)
        served = [scene.ask("m", number) for number in range(2)]
        await scene.until("two are served", lambda: scene.gateway.serving == 2)
        scene.ask("m", "later")
        began_s = now()
        await scene.stream.drain(60)
        assert now() - began_s <= 1
        assert set(scene.answered) == set(served)
        queue = scene.broker.queue("requests")
        assert len(queue.waiting) == 3
        assert not queue.unacknowledged
        await asyncio.sleep(100)
        assert len(queue.waiting) == 3, "nothing is received any more"


async def test_a_drain_has_a_limit():
    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["slow"] = lambda *_: asyncio.sleep(1000, ok())
        scene.ask("slow")
        await scene.until("it is served", lambda: scene.gateway.serving)
        began_s = now()
        await scene.stream.drain(60)
        assert 60 <= now() - began_s < 61
        assert len(scene.broker.queue("requests").waiting) == 1
        assert scene.gateway.serving == 0, "the request was cancelled"


async def test_a_drain_waits_for_the_confirmation_of_a_response():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.fault = faults(*["publish"] * 4)
        scene.ask()
        await scene.until("publishing fails", lambda: scene.stream.report().publish_failures)
        await scene.stream.drain(60)
        assert len(scene.answers) == 1
        assert scene.broker.is_empty("requests")


async def test_a_drain_publishes_even_if_the_requests_connection_is_lost_meanwhile():
    async with Scene(MemoryBroker(ack_deadline_s=30)).running() as scene:
        scene.gateway.serves["slow"] = lambda *_: asyncio.sleep(100, ok())
        message = scene.ask("slow")
        await scene.until("it is served", lambda: scene.gateway.serving)
        drain = asyncio.create_task(scene.stream.drain(300))
        await asyncio.sleep(1)
        scene.broker.cut()
        await drain
        assert scene.answered == {message: 1}


async def test_a_drain_gives_back_what_has_only_just_been_received():
    async with Scene(MemoryBroker()).running() as scene:
        await scene.until("it is connected", lambda: scene.stream.report().responses.connected)
        taken = scene.stream._take

        def take(connection, delivery):
            drains.append(asyncio.create_task(scene.stream.drain(60)))  # its turn comes first
            taken(connection, delivery)

        drains = []
        scene.stream._take = take
        scene.ask("m")
        began_s = now()
        await scene.until("it is drained", lambda: drains and drains[0].done())
        assert now() - began_s < 10
        assert scene.broker.queue("requests").waiting or scene.answers


async def test_a_drain_without_a_connection_ends():
    broker = MemoryBroker()
    broker.fault = faults(*["subscribe"] * 1000)
    async with Scene(broker).running() as scene:
        await asyncio.sleep(10)
        await scene.stream.drain(60)


async def test_a_handler_that_is_granted_to_an_ended_attempt_is_not_lost():
    """The gateway notices later than the message that its request has ended."""
    scene = Scene(MemoryBroker(), handlers=1)
    blocker = asyncio.Event()
    granted = []

    async def held(body, gate: InHand):
        async def go_on():
            await gate.on_endpoint()
            granted.append(True)

        gate.on_hold()
        await scene.until("the other has the handler", lambda: scene.gateway.serving == 2)
        asyncio.create_task(go_on())  # noqa: RUF006 (like the gateway's task, it ends by itself)
        await asyncio.sleep(0.1)
        return error(400)

    async def blocks(*_):
        await blocker.wait()
        return ok()

    async with scene.running():
        scene.gateway.serves |= {"held": held, "blocks": blocks}
        scene.ask("held")
        scene.ask("blocks")
        await scene.until("the first one has ended", lambda: scene.answers)
        blocker.set()
        await scene.done(2)
        assert granted
        scene.ask("m")
        await scene.done(3, within_s=5)


# -- the report ------------------------------------------------------------------------------------


async def test_the_report_counts_and_says_what_is_in_hand():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.lag = 7
        scene.gateway.cold["cold"] = asyncio.Event()
        scene.ask("cold")
        scene.ask("m")
        scene.broker.put("requests", b"malformed")
        await scene.until("two are answered", lambda: len(scene.answers) == 2)
        await asyncio.sleep(streams.LAG_INTERVAL_S)
        report = scene.stream.report()
        assert (report.received, report.in_hand, report.held) == (3, 1, 1)
        assert report.answered == {"2xx": 1, "3xx": 0, "4xx": 1, "5xx": 0}
        assert report.lag == 7
        assert report.requests.connected
        assert report.responses.connected
        assert report.requests.connections == 1
