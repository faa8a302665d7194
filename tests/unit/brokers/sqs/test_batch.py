"""Batches of requests to SQS."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kubeai.brokers.base import BrokerUnavailable
from kubeai.brokers.sqs.batch import BATCH_MAX_BYTES, LINGER_S, Batch, Refused

pytestmark = pytest.mark.looptime


class Sqs:
    """Answers batch requests after a second."""

    def __init__(self, *outcomes: dict[str, Any] | BaseException) -> None:
        self.requests: list[list[Any]] = []
        self._outcomes = list(outcomes)

    async def request(self, operation: str, *, Entries: list[Any]) -> dict[str, Any]:
        assert operation == "send_message_batch"
        assert [entry["Id"] for entry in Entries] == [str(n) for n in range(len(Entries))]
        self.requests.append([entry["n"] for entry in Entries])
        await asyncio.sleep(1)
        outcome = self._outcomes.pop(0) if self._outcomes else {}
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def batch_of(sqs: Sqs) -> Batch:
    return Batch(sqs, "send_message_batch")


async def test_entries_go_together_up_to_ten():
    sqs = Sqs()
    batch = batch_of(sqs)
    await asyncio.gather(*(batch.add({"n": n}) for n in range(23)))
    assert [len(request) for request in sqs.requests] == [10, 10, 3]


async def test_entry_alone_waits_only_for_the_linger_time():
    sqs = Sqs()
    started = asyncio.get_running_loop().time()
    await batch_of(sqs).add({"n": 1})
    assert asyncio.get_running_loop().time() - started == pytest.approx(1 + LINGER_S, abs=0.001)


async def test_batch_is_no_larger_than_the_limit():
    sqs = Sqs()
    batch = batch_of(sqs)
    third = BATCH_MAX_BYTES // 3
    sizes = [third, third, third, third, 2 * BATCH_MAX_BYTES, third]
    await asyncio.gather(*(batch.add({"n": n}, size) for n, size in enumerate(sizes)))
    assert sqs.requests == [[0, 1, 2], [3], [4], [5]]


async def test_entry_that_is_refused_does_not_harm_the_others():
    sqs = Sqs({"Failed": [{"Id": "1", "Code": "InvalidParameterValue", "Message": "it is bad"}]})
    batch = batch_of(sqs)
    outcomes = await asyncio.gather(
        *(batch.add({"n": n}) for n in range(3)), return_exceptions=True
    )
    assert outcomes[0] is None
    assert outcomes[2] is None
    assert isinstance(outcomes[1], Refused)
    assert outcomes[1].code == "InvalidParameterValue"
    assert "it is bad" in str(outcomes[1])


async def test_failed_request_fails_all_its_entries():
    batch = batch_of(Sqs(BrokerUnavailable("it is gone")))
    outcomes = await asyncio.gather(
        *(batch.add({"n": n}) for n in range(3)), return_exceptions=True
    )
    assert [str(outcome) for outcome in outcomes] == ["it is gone"] * 3
    await batch.add({"n": 3})


async def test_cancelled_entry_is_not_sent():
    sqs = Sqs()
    batch = batch_of(sqs)
    cancelled, other = batch.add({"n": 1}), batch.add({"n": 2})
    cancelled.cancel()
    await other
    assert sqs.requests == [[2]]


async def test_closing_sends_what_waits_and_refuses_more():
    sqs = Sqs()
    batch = batch_of(sqs)
    waiting = batch.add({"n": 1})
    await batch.close()
    assert waiting.done()
    assert sqs.requests == [[1]]
    with pytest.raises(BrokerUnavailable):
        await batch.add({"n": 2})


def test_error_shows_only_the_first_line():
    refused = Refused("send", "SignatureDoesNotMatch", "it differs\nx-amz-security-token:secret")
    assert str(refused) == "SQS: send: SignatureDoesNotMatch: it differs"


@pytest.mark.parametrize("error", [KeyError("a defect"), asyncio.CancelledError()])
async def test_any_failure_of_the_library_is_unavailable(error):
    batch = batch_of(Sqs(error))
    async with asyncio.timeout(10):
        with pytest.raises(BrokerUnavailable, match="send_message_batch: "):
            await batch.add({"n": 1})
