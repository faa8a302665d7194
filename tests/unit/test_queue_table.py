"""What the workers' queues share: heads, tenants' accounts, waits, and wake-ups."""

from __future__ import annotations

import os

import pytest

from kubeai._queue_table import CLASS_NAMES, PRIORITY_MAX, WORK_MAX_TOKENS, QueueTable

ROW = 3


@pytest.fixture
def supervisor():
    table = QueueTable.create(8, 3)
    for row in range(8):
        table.open_row(row)
    yield table
    table.close()


@pytest.fixture
def workers(supervisor):
    tables = [QueueTable.attach(supervisor.fd, at, supervisor.wake_fds) for at in range(3)]
    yield tables
    for table in tables:
        table.close()


def test_the_best_head_has_the_highest_priority_then_the_earliest_start(workers):
    a, b, c = workers
    assert a.best(ROW) == -1
    a.publish(ROW, 0, 50)
    b.publish(ROW, 0, 40)
    assert c.best(ROW) == 1
    c.publish(ROW, 1, 1000)
    assert a.best(ROW) == 2
    c.publish(ROW, -1, 0)
    assert a.best(ROW) == 1
    assert a.best(ROW, skip=1 << 1) == 0
    b.withdraw(ROW)
    assert a.best(ROW) == 0
    assert a.best(ROW + 1) == -1


def test_heads_order_the_whole_range_of_priorities_and_starts(workers):
    a, b, _ = workers
    a.publish(ROW, -PRIORITY_MAX, 0)
    b.publish(ROW, -PRIORITY_MAX, 2**48 - 1)
    assert a.best(ROW) == 0
    b.publish(ROW, PRIORITY_MAX, 2**48 - 1)
    assert a.best(ROW) == 1


def test_of_equal_heads_one_is_best_for_all_workers(workers):
    for worker in workers:
        worker.publish(ROW, 0, 7)
    assert {worker.best(ROW) for worker in workers} == {0}


def test_blocked_heads_wait_but_do_not_come_first(workers):
    a, b, _ = workers
    a.publish(ROW, 5, 0, blocked=True)
    b.publish(ROW, 0, 0)
    assert a.best(ROW) == 1
    b.withdraw(ROW)
    assert a.best(ROW) == -1
    assert b.is_waiting(ROW)
    assert not b.is_waiting(ROW, blocked_too=False)


def test_another_workers_head_is_blocked_until_it_is_published_again(workers):
    a, b, _ = workers
    a.publish(ROW, 5, 0)
    b.publish(ROW, 0, 0)
    b.block(ROW, 0, a.head(ROW, 0))
    assert b.best(ROW) == 1
    a.publish(ROW, 5, 0)
    assert b.best(ROW) == 0
    with pytest.raises(IndexError):
        b.block(ROW, 4, 1)


def test_a_head_that_has_changed_meanwhile_is_not_blocked(workers):
    a, b, _ = workers
    a.publish(ROW, 5, 0)
    late = b.head(ROW, 0)
    a.publish(ROW, 5, 1)
    b.block(ROW, 0, late)
    assert b.best(ROW) == 0
    a.withdraw(ROW)
    b.block(ROW, 0, b.head(ROW, 0))
    assert b.head(ROW, 0) == 0


def test_the_other_replicas_head_stays_blocked_until_another_one_is_reported(supervisor, workers):
    a, *_ = workers
    supervisor.set_peers(ROW, 5, 10)
    a.block(ROW, 3, a.head(ROW, 3))
    supervisor.set_peers(ROW, 5, 10)
    assert a.best(ROW) == -1
    supervisor.set_peers(ROW, 5, 20)
    assert a.best(ROW) == 3
    a.block(ROW, 3, a.head(ROW, 3))
    supervisor.set_peers(ROW, 5, 20, True)
    assert a.best(ROW) == 3, "another request with the same start"


def test_a_tenants_account_is_the_same_in_all_workers(workers):
    a, b, _ = workers
    tenant, other = a.account(ROW, 1, "acme"), a.account(ROW, 1, "other")
    assert b.account(ROW, 1, "acme") == tenant != other
    assert a.account(ROW, 2, "acme") != tenant  # the row has been reused
    assert a.charge(ROW, tenant, 0, 100) == 100
    assert b.start(ROW, tenant, 0) == 100
    assert b.charge(ROW, tenant, 0, 50) == 150
    assert a.start(ROW, tenant, 0) == 150
    assert a.start(ROW, other, 20) == 20


def test_the_virtual_time_is_the_latest_start_in_any_worker(workers):
    a, b, c = workers
    a.charge(ROW, a.account(ROW, 1, "x"), 70, 10)
    b.charge(ROW, b.account(ROW, 1, "y"), 30, 10)
    assert c.round(ROW) == 70
    assert c.round(ROW + 1) == 0


def test_no_account_runs_further_ahead_than_its_bound(workers):
    """So that a collision of hashes cannot starve a tenant."""
    a, b, _ = workers
    tenant = a.account(ROW, 1, "acme")
    for _ in range(10):
        a.charge(ROW, tenant, 10**12, 10**12)  # as another model's row might
    fresh = ROW + 1  # the same account at a model whose time is at its beginning
    assert b.start(fresh, tenant, 0) <= 2 * WORK_MAX_TOKENS


def test_the_earliest_start_of_a_priority_counts_blocked_heads_too(workers):
    a, b, c = workers
    a.publish(ROW, 2, 30)
    b.publish(ROW, 2, 20, blocked=True)
    c.publish(ROW, 1, 10)
    assert a.earliest(ROW, 2) == 20
    assert a.earliest(ROW, 0) is None


def test_a_free_place_wakes_the_worker_whose_head_is_best_and_those_that_are_blocked(workers):
    a, b, c = workers
    a.publish(ROW, 0, 9)
    b.publish(ROW, 0, 3)
    a.notify(ROW)
    assert [each.take_wakes() for each in workers] == [0, 1, 0]
    c.publish(ROW, 0, 1, blocked=True)
    a.notify(ROW)
    a.notify(ROW)
    assert [each.take_wakes() for each in workers] == [0, 2, 2]


def test_a_free_place_for_which_nobody_waits_wakes_nobody(workers):
    workers[0].notify(ROW)
    assert [each.take_wakes() for each in workers] == [0, 0, 0]


def test_of_a_killed_worker_heads_and_gauges_go_and_accounts_stay(supervisor, workers):
    a, b, _ = workers
    tenant = b.account(ROW, 1, "acme")
    b.charge(ROW, tenant, 0, 500)
    b.publish(ROW, 0, 500)
    b.enter(ROW, 0)
    b.enter(ROW, 9)
    b.leave(ROW, 9, 2.0)
    supervisor.clear_column(1)
    assert a.best(ROW) == -1
    assert a.waiting(ROW) == (0, 0, 0)
    assert sum(a.waited(ROW)[2][0]) == 1
    assert a.start(ROW, tenant, 0) == 500
    assert [each.take_wakes() for each in workers] == [1, 1, 1]


def test_waits_are_counted_by_class_of_priority(workers):
    a, b, _ = workers
    for worker, priority in ((a, -3), (a, 0), (b, 0), (b, 400)):
        worker.enter(ROW, priority)
    assert dict(zip(CLASS_NAMES, a.waiting(ROW), strict=True)) == {"low": 1, "normal": 2, "high": 1}
    a.leave(ROW, 0, 0.05)
    b.leave(ROW, 0, 300.0)
    b.leave(ROW, 400)  # has not been served
    low, normal, high = a.waited(ROW)
    assert normal == ([1, 0, 0, 0, 1], pytest.approx(300.05))
    assert low == high == ([0] * 5, 0.0)
    assert a.waiting(ROW) == (1, 0, 0)


def test_a_reused_row_begins_with_nothing(supervisor, workers):
    a, *_ = workers
    a.publish(ROW, 0, 5)
    a.enter(ROW, 0)
    a.charge(ROW, a.account(ROW, 1, "x"), 10, 10)
    supervisor.open_row(ROW)
    assert not a.is_waiting(ROW)
    assert a.waiting(ROW) == (0, 0, 0)
    assert a.round(ROW) == 0


def test_bad_arguments_are_rejected(supervisor, workers):
    a, *_ = workers
    with pytest.raises(IndexError, match="row must be 0 to 7"):
        a.publish(8, 0, 0)
    with pytest.raises(IndexError, match="column must be 0 to 3"):
        a.head(0, 4)
    with pytest.raises(ValueError, match="no column"):
        supervisor.publish(0, 0, 0)
    with pytest.raises(ValueError, match="rows must be"):
        QueueTable.create(0, 1)
    with pytest.raises(ValueError, match="workers must be"):
        QueueTable.create(1, 64)
    with pytest.raises(ValueError, match="column must be"):
        QueueTable.attach(supervisor.fd, 3)
    with pytest.raises(ValueError, match="2 wake descriptors for 3 workers"):
        QueueTable.attach(supervisor.fd, 0, supervisor.wake_fds[:2])
    with open(os.memfd_create("other"), "r+b") as other:
        other.truncate(4096)
        with pytest.raises(ValueError, match="not a queue table"):
            QueueTable.attach(other.fileno(), 0)


def test_a_closed_table_says_so():
    table = QueueTable.create(2, 1)
    table.close()
    with pytest.raises(ValueError, match="closed"):
        table.best(0)
