"""The chaos test notices what it looks for: lost, wrong and falsely named responses."""

import json
import time

import pytest
from chaos.load import ID, Account, Sent
from chaos.site import UNKNOWN, WARM, HttpFailure, Outage, Site, ask

from kubeai.brokers.base import REQUEST_MESSAGE_ID, Delivery


class Response(Delivery):
    def __init__(self, delivery: str, number: int, body: object, *, request="m1", status=200):
        message = {"metadata": {ID: number}, "status_code": status, "body": body}
        self.id, self.body, self.deliveries = delivery, json.dumps(message).encode(), 1
        self.attributes = {REQUEST_MESSAGE_ID: request}

    async def acknowledge(self): ...

    async def release(self): ...

    async def extend(self): ...


@pytest.fixture
def account():
    account = Account()
    for number in range(3):
        account.sent[number] = Sent(ask(WARM, f"message {number}"), time.monotonic())
        account.publications[number] = 1
    account.sent[3] = Sent(ask(UNKNOWN, "message 3"), time.monotonic())
    account.publications[3] = 1
    return account


def completion(number: int, *, model: str = WARM) -> dict:
    text = ask(WARM, f"message {number}").text
    return {"model": model, "choices": [{"message": {"content": text}}]}


def test_right_responses_in_any_order_leave_nothing_to_complain_about(account):
    account.note(Response("a", 3, {"error": {}}, request="m3", status=404))
    for number in (2, 0, 1):
        account.note(Response(f"r{number}", number, completion(number), request=f"m{number}"))
    assert (account.missing, account.problems, account.duplicates) == ([], [], 0)


def test_a_message_without_a_response_is_missing(account):
    account.note(Response("a", 1, completion(1)))
    assert account.missing == [0, 2, 3]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (completion(2), 200, "the response of another request"),
        (completion(1, model="cold"), 200, "from the model cold"),
        ({"error": {}}, 502, "status 502"),
        ({"choices": []}, 200, "not a chat completion"),
    ],
)
def test_a_wrong_response_is_a_problem(account, body, status, words):
    account.note(Response("a", 1, body, status=status))
    (problem,) = account.problems
    assert words in problem


def test_an_unknown_model_must_be_a_404(account):
    account.note(Response("a", 3, completion(1)))
    (problem,) = account.problems
    assert "instead of 404" in problem


def test_duplicates_have_the_id_of_one_publication(account):
    account.note(Response("a", 1, completion(1)))
    account.note(Response("b", 1, completion(1)))
    assert (account.duplicates, account.problems) == (1, [])
    account.note(Response("c", 1, completion(1), request="m9"))
    assert account.problems
    account.publications[2] = 2
    for delivery, request in (("d", "x"), ("e", "y")):
        account.note(Response(delivery, 2, completion(2), request=request))
    assert len(account.problems) == 1


def test_a_response_that_the_reader_gets_again_is_no_duplicate(account):
    for _ in range(2):
        account.note(Response("a", 1, completion(1)))
    assert (account.duplicates, account.redelivered) == (0, 1)


def test_only_failures_during_an_outage_are_explained(tmp_path):
    site = Site(tmp_path, {}, {})
    site._outages = [Outage(10, 13)]
    site.http_failures = [
        HttpFailure(8, 9, "before"),
        HttpFailure(9, 11, "cut by it"),
        HttpFailure(12, 40, "began in it"),
        HttpFailure(14, 15, "after"),
    ]
    assert [failure.why for failure in site.unexplained()] == ["before", "after"]
