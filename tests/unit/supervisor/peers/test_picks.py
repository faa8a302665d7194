"""Picks include what the other replicas report: their load, and the requests that wait there."""

from fakes.peers import Replica, two
from harness import until

from kubeai._prompt import Prompt
from kubeai._queue_table import QueueTable


async def test_a_pick_includes_the_in_flight_requests_of_other_replicas():
    async with two() as (one, other):
        one.route("a", "b"), other.route("a", "b")
        one.serve("a", 3)
        await until("the peer's load is seen", lambda: other.in_flight("a") == 3)
        row = other.publisher.row("m")
        assert other.table.in_flight(row) == 3
        ring = other.ring()
        picks = [ring.pick_least() for _ in range(3)]
        assert [pick.name for pick in picks] == ["b"] * 3
        del picks
        one.held.clear()
        await until("the request has ended", lambda: other.in_flight("a") == 0)
        assert other.table.in_flight(row) == 0


async def test_a_hashed_pick_is_bounded_by_the_load_of_all_replicas():
    async with two() as (one, other):
        one.route("a", "b"), other.route("a", "b")
        ring = other.ring()
        key = next(k << 54 for k in range(1024) if ring.lookup(k << 54) == "a")
        one.serve("a", 8)
        await until("the peer's load is seen", lambda: other.in_flight("a") == 8)
        pick = ring.pick_hashed(key)
        assert (pick.first, pick.first_load, pick.name) == ("a", 8, "b")
        pick.release()


def waiting(replica, priority, start, model="m"):
    """The first request in the queue of the replica's worker."""
    queue = QueueTable.attach(replica.queues.fd, 0, replica.queues.wake_fds)
    queue.publish(replica.publisher.row(model), priority, start)
    return queue


async def test_a_place_is_left_free_for_a_waiting_request_of_another_replica():
    async with two() as (one, other):
        one.route("a", capacity=2), other.route("a", capacity=2)
        first = waiting(one, 0, 70)
        row = other.publisher.row("m")
        await until("the request is seen", lambda: other.queues.best(row) == 1)
        picker = other.picker()
        pick = picker.pick_new(Prompt())
        assert pick is not None
        assert picker.pick_new(Prompt()) is None, "there is one place"
        assert picker.pick(Prompt()) is not None, "but not for a retry"
        first.withdraw(one.publisher.row("m"))
        await until("nobody waits", lambda: other.queues.best(row) == -1)
        pick.release()
        assert picker.pick_new(Prompt()) is not None
        first.close()


async def test_the_first_of_the_other_replicas_requests_is_recorded():
    async with two() as (one, other), Replica("three", [one.address, other.address]) as three:
        for replica in (one, other, three):
            replica.route("a")
        row = three.publisher.row("m")
        queues = [waiting(one, 0, 70), waiting(other, 0, 50)]
        await until("the earlier one counts", lambda: three.queues.earliest(row, 0) == 50)
        queues.append(waiting(other, 3, 90))
        await until("a higher priority counts", lambda: three.queues.earliest(row, 3) == 90)
        for queue in queues:
            queue.close()


async def test_the_virtual_time_of_another_replica_is_taken_over():
    async with two() as (one, other):
        one.route("a"), other.route("a")
        queue = waiting(one, 0, 500)
        queue.charge(one.publisher.row("m"), 7, 1000, 10)
        row = other.publisher.row("m")
        await until("it is told", lambda: other.queues.round(row) == 1000)
        queue.close()


async def test_a_peer_that_is_gone_waits_for_nothing():
    async with two() as (one, other):
        one.route("a"), other.route("a")
        queue = waiting(one, 5, 70)
        row = other.publisher.row("m")
        await until("the request is seen", lambda: other.queues.best(row) == 1)
        other.peers._view.leave(one.address)
        assert other.queues.best(row) == -1
        queue.close()
