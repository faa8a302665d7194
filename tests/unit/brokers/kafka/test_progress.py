from hypothesis import given, settings
from hypothesis import strategies as st

from kubeai.brokers.kafka import progress as module
from kubeai.brokers.kafka.progress import METADATA_MAX_CHARS, PREFIX, Progress, undelivered

STEPS = st.lists(
    st.one_of(
        st.just(("fetch", 0)),
        st.tuples(st.just("acknowledge"), st.integers(0, 30)),
        st.tuples(st.just("deliver again"), st.integers(0, 30)),
        st.just(("restart", 0)),
    ),
    max_size=60,
)
# Offsets of messages; the ones between were compacted, or belong to transactions.
OFFSETS = st.lists(st.integers(1, 3), min_size=1, max_size=40).map(
    lambda gaps: [sum(gaps[: at + 1]) for at in range(len(gaps))]
)


class Consumer:
    """A model: which messages are acknowledged, and how often each was delivered."""

    def __init__(self, offsets: list[int]) -> None:
        self.offsets = offsets
        self.progress = Progress(0)
        self.acknowledged: set[int] = set()
        self.deliveries: dict[int, int] = {}
        self.in_hand: list[int] = []

    def do(self, step: str, at: int) -> None:
        if step == "fetch":
            left = [offset for offset in self.offsets if offset >= self.progress.next]
            if left and self.progress.accept(left[0]):
                self.deliver(left[0])
        elif step == "restart":
            self.progress = Progress(*self.progress.commit())
            self.in_hand.clear()
        elif self.in_hand and step == "acknowledge":
            offset = self.in_hand.pop(at % len(self.in_hand))
            self.progress.acknowledge(offset)
            self.acknowledged.add(offset)
        elif self.in_hand:
            self.deliver(self.in_hand.pop(at % len(self.in_hand)))

    def deliver(self, offset: int) -> None:
        assert offset not in self.acknowledged
        self.deliveries[offset] = self.deliveries.get(offset, 0) + 1
        assert self.progress.deliver(offset) == self.deliveries[offset]
        self.in_hand.append(offset)

    def check(self) -> None:
        first, metadata = self.progress.commit()
        before = {offset for offset in self.offsets if offset < first}
        assert before <= self.acknowledged
        assert len(metadata) <= METADATA_MAX_CHARS
        unseen = [
            offset
            for offset in self.offsets
            if offset >= self.progress.next and offset not in self.acknowledged
        ]
        gaps = (
            max(self.offsets)
            + 1
            - self.progress.next
            - len([offset for offset in self.offsets if offset >= self.progress.next])
        )
        assert self.progress.waiting(max(self.offsets) + 1) == len(unseen) + gaps


@given(OFFSETS, STEPS)
@settings(max_examples=300)
def test_no_acknowledged_message_comes_again_and_no_other_is_lost(offsets, steps):
    consumer = Consumer(offsets)
    for step, at in steps:
        consumer.do(step, at)
        consumer.check()
    consumer.do("restart", 0)
    for _ in offsets:
        consumer.do("fetch", 0)
    assert set(consumer.in_hand) | consumer.acknowledged == set(offsets)


def test_committed_offset_is_that_of_the_first_message_that_is_not_acknowledged():
    progress = Progress(100)
    for offset in (100, 101, 102, 103):
        assert progress.accept(offset)
        progress.deliver(offset)
    assert progress.commit() == (100, f"{PREFIX}1111")
    progress.acknowledge(102)
    progress.acknowledge(100)
    assert progress.commit() == (101, f"{PREFIX}1+1")
    progress.acknowledge(101)
    progress.acknowledge(103)
    assert progress.commit() == (104, "")


def test_deliveries_go_on_counting_after_a_restart():
    progress = Progress(7, f"{PREFIX}3+1")
    assert progress.accept(7)
    assert progress.deliver(7) == 4
    assert not progress.accept(8)
    assert progress.accept(9)
    assert progress.deliver(9) == 2
    assert progress.commit() == (7, f"{PREFIX}4+2")


def test_many_deliveries_stay_one_character():
    progress = Progress(0)
    progress.accept(0)
    for _ in range(50):
        progress.deliver(0)
    assert progress.commit() == (0, f"{PREFIX}z")


def test_messages_that_kafka_has_deleted_hold_nothing_up():
    progress = Progress(5, f"{PREFIX}1+1")
    assert progress.accept(9)
    assert progress.first == 9
    progress.acknowledge(9)
    assert progress.commit() == (10, "")


def test_metadata_of_other_consumers_is_ignored():
    for metadata in ("", "my own", "+++"):
        progress = Progress(3, metadata)
        assert progress.accept(3)
        assert progress.deliver(3) == 1
    assert undelivered(3, "+++", 10) == 7


def test_partition_is_full_when_its_oldest_message_is_too_far_behind(monkeypatch):
    monkeypatch.setattr(module, "WINDOW_MAX_COUNT", 3)
    progress = Progress(0)
    for offset in (0, 1, 2):
        assert not progress.is_full
        progress.accept(offset)
        progress.deliver(offset)
    progress.acknowledge(1)
    progress.acknowledge(2)
    assert progress.is_full
    progress.acknowledge(0)
    assert not progress.is_full


def test_metadata_has_a_limit_beyond_which_messages_may_come_again():
    progress = Progress(0)
    progress.accept(0)
    progress.deliver(0)
    progress.accept(10_000)  # a gap
    progress.acknowledge(10_000)
    assert progress.commit() == (0, f"{PREFIX}1")
    assert Progress(*progress.commit()).accept(10_000)


def test_lag_of_another_consumers_partition_leaves_out_what_it_has_received():
    assert undelivered(10, f"{PREFIX}1+0+", 20) == 7
    assert undelivered(10, "", 20) == 10
    assert undelivered(10, "", 5) == 0
