"""How one stream treats messages, on virtual time, between a fake broker and a fake gateway."""

import asyncio
from collections import Counter

import pytest
from fakes.broker import MemoryBroker
from fakes.messenger import Scene, error, ok
from fakes.time import FAKE_TIME

from kubeai.messenger import stream as streams
from kubeai.messenger.policy import ATTEMPTS_MAX_COUNT, DELIVERIES_MAX_COUNT, HELD_MAX_S

pytestmark = FAKE_TIME


def now():
    return asyncio.get_running_loop().time()


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


async def test_a_fault_after_the_response_gives_the_message_back(monkeypatch):
    def broken(metadata, answer):
        monkeypatch.undo()
        raise RuntimeError("a bug")

    monkeypatch.setattr(streams, "write_response", broken)
    async with Scene(MemoryBroker()).running() as scene:
        scene.ask()
        await scene.done(1, within_s=60)
        assert scene.stream.report().requests.connections == 1


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


async def test_a_message_that_crashes_its_engine_again_is_given_up():
    died = error(502, x_should_retry="false", x_kubeai_crashed_engines="1")
    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["m"] = lambda *_: asyncio.sleep(0, died)
        scene.ask()
        await scene.done(1)
        assert scene.answers[0]["status_code"] == 502
        assert len(scene.gateway.requests) == 2
        report = scene.stream.report()
        assert (report.retried, report.dead) == (1, 1)


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


async def test_a_cold_model_is_asked_for_no_more_messages_at_a_time_than_there_are_handlers():
    """What the gateway holds counts as load: more would add replicas that the stream cannot use."""
    async with Scene(MemoryBroker(), handlers=2).running() as scene:
        cold = scene.gateway.cold["cold"] = asyncio.Event()
        for name in ("cold", "cold_adapter", "other"):
            scene.gateway.cold[name] = cold
        for prompt in range(20):
            scene.ask("cold_adapter" if prompt % 2 else "cold", prompt)
        scene.ask("other")
        await scene.until("all are in hand", lambda: scene.stream.report().held == 21)
        assert Counter(body["model"] for body in scene.gateway.requests) == {
            "cold": 1,
            "cold_adapter": 1,
            "other": 1,
        }
        cold.set()
        await scene.done(21)
        assert scene.gateway.serving_max == 2
        assert set(scene.answered.values()) == {1}


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


async def test_a_request_that_was_not_held_keeps_its_handler_when_it_falls_back():
    async def falls_back(body, gate):
        await gate.on_endpoint()
        return ok()

    async with Scene(MemoryBroker(), handlers=1).running() as scene:
        scene.gateway.serves["m"] = falls_back
        scene.ask("m")
        scene.ask("m")
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


async def test_bytes_in_hand_are_limited():
    async with Scene(MemoryBroker(), handlers=1, in_hand_max_bytes=10_000).running() as scene:
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
