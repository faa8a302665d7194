"""The order of waiting requests: by priority, fair to tenants by work, then by arrival."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeai.routing.fair_queue import FairQueue, LocalAccounts


class Ask:
    def __init__(self, tenant="a", priority=0, work=1, adapter=None, tag=None):
        self.tenant = tenant
        self.priority = priority
        self.work = work
        self.adapter = adapter
        self.number = 0
        self.tag = tag

    def __repr__(self):
        return f"{self.tenant}{self.tag or ''}"


def queue_of(*asks):
    queue = FairQueue(LocalAccounts())
    for ask in asks:
        queue.push(ask)
    return queue


def serve(queue, blocked=()):
    head = queue.head(blocked)
    if head is None:
        return None
    queue.take(head[0])
    return head[0]


def drained(queue):
    served = []
    while (ask := serve(queue)) is not None:
        served.append(ask)
    return served


def test_an_empty_queue_has_no_head():
    queue = queue_of()
    assert queue.head() is None
    assert not queue
    assert len(queue) == 0


def test_a_tenants_requests_are_served_in_the_order_of_their_arrival():
    asks = [Ask(tag=number) for number in range(5)]
    assert drained(queue_of(*asks)) == asks


def test_a_higher_priority_is_served_first():
    low, normal, high = Ask("a", -5), Ask("b", 0), Ask("c", 7)
    assert drained(queue_of(low, normal, high)) == [high, normal, low]


def test_tenants_take_turns_whatever_they_have_waiting():
    queue = queue_of(*[Ask("many", tag=number) for number in range(10_000)])
    serve(queue)
    queue.push(single := Ask("one"))
    assert serve(queue) is single


def test_tenants_get_equal_work_not_equal_requests():
    long = [Ask("long", work=1000) for _ in range(100)]
    short = [Ask("short", work=100) for _ in range(1000)]
    queue = queue_of(*long, *short)
    work = Counter()
    for _ in range(220):
        ask = serve(queue)
        work[ask.tenant] += ask.work
    assert abs(work["long"] - work["short"]) <= 1000


def test_a_tenant_with_a_long_request_is_not_made_to_wait_for_it():
    """Deficit round robin would let a tenant save up for it, round by round."""
    queue = queue_of(*[Ask("short", work=10) for _ in range(100)])
    serve(queue)
    queue.push(long := Ask("long", work=100_000))
    assert serve(queue) is long


def test_idle_time_is_no_credit():
    queue = queue_of(*[Ask("busy", work=10) for _ in range(50)])
    for _ in range(50):
        serve(queue)
    for number in range(10):
        queue.push(Ask("busy", work=10, tag=number))
        queue.push(Ask("idle until now", work=10, tag=number))
    first = Counter(serve(queue).tenant for _ in range(10))
    assert first == {"busy": 5, "idle until now": 5}


def test_a_long_wait_with_a_low_priority_is_no_credit_against_others_with_it():
    queue = queue_of(*[Ask("patient", -1, work=10) for _ in range(20)])
    for _ in range(100):
        queue.push(Ask("high", 5, work=10))
        assert serve(queue).tenant == "high"
    for _ in range(20):
        queue.push(Ask("newcomer", -1, work=10))
    first = Counter(serve(queue).tenant for _ in range(10))
    assert first == {"patient": 5, "newcomer": 5}


def test_requests_pass_those_whose_adapter_is_blocked():
    waits, passes = Ask("a", adapter="x"), Ask("a")
    queue = queue_of(waits, passes)
    assert serve(queue, blocked={"x"}) is passes
    assert queue.head({"x"}) is None
    assert serve(queue) is waits


def test_a_blocked_tenant_keeps_its_turn():
    blocked, *others = Ask("a", adapter="x"), Ask("b"), Ask("b", tag=2)
    queue = queue_of(blocked, *others)
    assert serve(queue, blocked={"x"}) is others[0]
    assert serve(queue) is blocked


def test_a_request_that_returns_is_its_tenants_next():
    asks = [Ask(tag=number) for number in range(3)]
    queue = queue_of(*asks)
    returned = serve(queue)
    queue.push(returned)
    assert drained(queue) == asks


@pytest.mark.parametrize("adapter", [None, "x"])
def test_requests_that_return_are_in_the_order_in_which_they_came(adapter):
    asks = [Ask(tag=number, adapter=adapter) for number in range(5)]
    queue = queue_of(*asks)
    for ask in (asks[3], asks[0], asks[2]):
        queue.remove(ask)
        queue.push(ask)
    assert list(queue) == asks
    assert queue.refusable(1, "b") is asks[4]
    assert drained(queue) == asks


def test_tenants_that_return_are_in_the_order_in_which_they_came():
    asks = [Ask(tenant) for tenant in "abcde"]
    queue = queue_of(*asks)
    for ask in (asks[1], asks[3], asks[0], asks[4], asks[2]):
        queue.remove(ask)
        queue.push(ask)
    assert drained(queue) == asks


def test_of_the_lowest_priority_the_newest_is_refused_first():
    old, new, high = Ask("a", -1), Ask("b", -1), Ask("c", 3)
    queue = queue_of(old, new, high)
    refused = []
    while (ask := queue.refusable(4, "d")) is not None:
        queue.remove(ask)
        refused.append(ask)
    assert refused == [new, old, high]


def test_a_request_of_a_lower_priority_makes_no_other_room():
    assert queue_of(Ask("a", 0), Ask("a", 0), Ask("a", 0)).refusable(-1, "b") is None


def test_of_the_same_priority_the_tenant_with_the_most_requests_makes_room():
    """Otherwise a tenant could keep all others out by filling the queue."""
    many = [Ask("many", tag=number, adapter="x" if number == 7 else None) for number in range(8)]
    few = [Ask("few", tag=number) for number in range(2)]
    queue = queue_of(*many, *few)
    assert queue.refusable(0, "new") is many[7]
    assert queue.refusable(0, "few") is many[7]
    assert queue.refusable(0, "many") is None
    for ask in many[3:]:
        queue.remove(ask)
    assert queue.refusable(0, "few") is None
    assert queue.refusable(0, "new") is many[2]


def test_the_place_says_how_many_are_served_before():
    queue = FairQueue(LocalAccounts())
    source = random.Random(3)
    asks = [
        Ask(f"{source.choice('abc')}{priority}", priority, source.randrange(1, 50))
        for priority in source.choices((-1, 0, 1), k=40)
    ]
    for ask in asks:
        queue.push(ask)
    places = queue.places()
    assert [places[ask] for ask in drained(queue)] == list(range(1, 41))


def test_removing_and_adding_tenants_keeps_the_heap_small():
    queue = queue_of(Ask("stays"))
    for number in range(5000):
        ask = Ask(f"t{number}")
        queue.push(ask)
        queue.remove(ask)
    (level,) = queue._levels.values()
    assert len(level.heap) < 200


ASKS = st.tuples(
    st.sampled_from("abcd"), st.integers(-2, 2), st.integers(1, 100), st.sampled_from([None, "x"])
)


@given(st.lists(st.one_of(ASKS, st.none(), st.integers(0, 50)), max_size=120))
@settings(max_examples=200)
def test_every_request_is_served_once_and_the_queue_agrees_with_a_plain_one(steps):
    """The oracle keeps a list, and each tenant's account as a number."""
    queue, waiting, ends = FairQueue(LocalAccounts()), [], Counter()
    for step in steps:
        if step is None:
            head = queue.head()
            assert (head is None) == (not waiting)
            if head is None:
                continue
            ask, start = head
            top = max(each.priority for each in waiting)
            assert ask.priority == top
            level = [each for each in waiting if each.priority == top]
            assert ask is next(each for each in level if each.tenant == ask.tenant)
            assert start >= ends[ask.tenant]
            queue.take(ask)
            ends[ask.tenant] = start + ask.work
            waiting.remove(ask)
        elif isinstance(step, int):
            if step < len(waiting):
                queue.remove(waiting.pop(step))
        else:
            ask = Ask(*step)
            queue.push(ask)
            waiting.append(ask)
        assert len(queue) == len(waiting)
        assert set(queue) == set(waiting)
        assert (queue.refusable(3, "") is None) == (not waiting)


def test_tenants_whose_adapters_are_all_blocked_are_not_looked_at():
    class Counting(LocalAccounts):
        count = 0

        def start(self, tenant, floor):
            self.count += 1
            return super().start(tenant, floor)

    accounts = Counting()
    queue = FairQueue(accounts)
    asks = [Ask(f"t{number}", adapter="fin") for number in range(100)]
    for ask in asks:
        queue.push(ask)
    looked_at = accounts.count
    assert queue.head({"fin"}) is None
    assert accounts.count == looked_at
    other = Ask("t5", adapter="law")
    queue.push(other)
    assert serve(queue, {"fin"}) is other
    assert len(drained(queue)) == 100
