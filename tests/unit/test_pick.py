"""Picks by strategy: what a request costs, what is known of its prompt, and what is learned."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeai._counts import live
from kubeai._load import LoadTable
from kubeai._pick import Picker
from kubeai._prefix import PrefixIndex
from kubeai._prompt import BLOCKS_MAX, Prompt, sample_ends
from kubeai._ring import Ring

NAMES = "abcdefgh"


class Model:
    """A model's picker over some endpoints, with its own load table, index and clock."""

    def __init__(self, count=4, strategy="PrefixCache", adapters=None, load_factor=0, peers=0):
        self.now_s = 100.0
        self.table = LoadTable.create(count + 1, 2)
        self.table.peers = peers
        self.index = PrefixIndex.create(count + 1, 1 << 12, 2)
        self.worker = LoadTable.attach(self.table.fd, 0)
        self.workers_index = PrefixIndex.attach(self.index.fd, 0)
        self.lives = [self.table.open_row(row) for row in range(count + 1)]
        self.ring = Ring(self.worker, 0, self.lives[0], clock=lambda: self.now_s)
        for row in range(1, count + 1):
            name = NAMES[row - 1]
            self.ring.set(name, row, self.lives[row], (adapters or {}).get(name, ()))
            self.index.set_cache(row, 100_000)
        self.picker = Picker(self.ring, self.workers_index)
        self.picker.configure(strategy, load_factor=load_factor)

    def pick(self, *args, **options):
        return self.picker.pick(*args, **options)

    def row(self, name):
        return NAMES.index(name) + 1

    def pending(self, name):
        return self.table.pending(self.row(name))

    def work(self, name):
        """In tokens, a request in flight being 256."""
        return self.pending(name) + 256 * self.table.in_flight(self.row(name))

    def answer(self, pick, after_s=0.1):
        """The first byte comes, and then the end."""
        self.now_s += after_s
        pick.prefilled(self.now_s)
        pick.release()

    def close(self):
        for each in (self.workers_index, self.index, self.worker, self.table):
            each.close()


@pytest.fixture
def make():
    made = []

    def new(*args, **options):
        made.append(Model(*args, **options))
        return made[-1]

    yield new
    for one in made:
        one.close()


def prompt(*words, tokens_each=1000, key=None, streams=True):
    """A prompt with a sampled block per word; those that begin with the same words share blocks."""
    hashes, chain = [], 0
    for word in words:
        chain = hash((chain, word)) & (1 << 64) - 1
        hashes.append(chain)
    depths = [tokens_each * n for n in range(1, len(words) + 1)]
    return Prompt(tokens_each * len(words), hashes, depths, key=key, streams=streams)


# -- the cost --------------------------------------------------------------------------------------


def test_the_next_turn_goes_where_the_conversation_is_cached(make):
    model = make()
    homes = {}
    for turn in range(1, 5):
        for conversation in range(4):
            pick = model.pick(prompt(*(f"{conversation} {n}" for n in range(turn))))
            model.answer(pick)
            homes.setdefault(conversation, pick.name)
            assert pick.name == homes[conversation]
    assert set(homes.values()) == set("abcd"), "new conversations spread"


def test_only_new_tokens_are_pending(make):
    model = make()
    first = model.pick(prompt("a", "b"))
    assert (first.pending, model.pending(first.name)) == (2000, 2000)
    model.answer(first)
    second = model.pick(prompt("a", "b", "c"))
    assert (second.name, second.pending) == (first.name, 1000)
    second.release()


def test_tokens_are_pending_until_the_first_byte_of_the_body(make):
    model = make()
    pick = model.pick(prompt("a"))
    assert model.table.pending(0) == model.pending(pick.name) == 1000
    pick.prefilled(model.now_s)
    assert model.table.pending(0) == model.pending(pick.name) == 0
    assert model.table.in_flight(model.row(pick.name)) == 1
    pick.prefilled(model.now_s)
    pick.release()
    assert model.table.in_flight(model.row(pick.name)) == 0


def test_a_request_that_ends_without_a_first_byte_leaves_nothing_pending(make):
    model = make()
    model.pick(prompt("a")).release()
    assert model.table.pending(0) == 0


def test_a_hot_prefix_spreads_over_as_many_endpoints_as_its_work_needs(make):
    model = make(8)
    few = [model.pick(prompt("system", f"q{n}", tokens_each=2000)) for n in range(2)]
    assert len({pick.name for pick in few}) == 2, "waiting for a prefill costs more than repeating"
    for pick in few:
        model.answer(pick)
    calm = []
    for n in range(20):  # one at a time: its endpoints keep up
        pick = model.pick(prompt("system", f"calm {n}", tokens_each=2000))
        calm.append(pick.name)
        model.answer(pick)
    assert len(set(calm)) <= 2
    burst = [model.pick(prompt("system", f"hot {n}", tokens_each=2000)) for n in range(32)]
    assert {pick.name for pick in burst} == set(NAMES)
    for pick in burst:
        pick.release()


def test_a_long_queue_at_the_cached_endpoint_outweighs_the_cache(make):
    model = make(2)
    home = model.pick(prompt("doc"))
    model.answer(home)
    queue = [model.pick(prompt(f"other {n}", tokens_each=20_000)) for n in range(2)]
    (behind,) = (pick for pick in queue if pick.name == home.name)
    (elsewhere,) = (pick for pick in queue if pick.name != home.name)
    elsewhere.release()
    away = model.pick(prompt("doc", "question", tokens_each=500))
    assert away.name != home.name
    away.release()
    behind.release()
    back = model.pick(prompt("doc"))
    assert back.name in (home.name, away.name)
    back.release()


def test_a_long_prompt_does_not_wait_in_a_queue_to_spare_the_requests_elsewhere(make):
    model = make(2)
    first = model.pick(prompt("first", tokens_each=100))
    busy = [model.pick(prompt("first", tokens_each=100)) for _ in range(4)]
    for pick in (first, *busy):
        pick.prefilled(model.now_s)
    queued = model.pick(prompt("queue", tokens_each=20_000))
    assert queued.name != first.name
    long = model.pick(prompt("long", tokens_each=100_000))
    short = model.pick(prompt("short", tokens_each=50_000))
    assert long.name == first.name, (
        "four requests in flight cost it less than 20,000 tokens pending"
    )
    assert short.name == queued.name, "100,000 tokens pending cost more"
    for pick in (first, *busy, queued, long, short):
        pick.release()


@settings(max_examples=200)
@given(
    loads=st.lists(st.lists(st.integers(0, 4000), max_size=5), min_size=2, max_size=6),
    words=st.lists(st.sampled_from("xyz"), min_size=1, max_size=4),
    caches=st.lists(st.tuples(st.integers(0, 5), st.text("xyz", min_size=1, max_size=4))),
)
def test_the_pick_has_the_least_cost(loads, words, caches):
    model = Model(len(loads))
    try:
        held = []
        model.picker.configure("LeastLoad")
        for row, tokens in enumerate(loads, 1):
            others = tuple(name for name in NAMES[: len(loads)] if model.row(name) != row)
            held += [model.ring.pick_least(None, others, each) for each in tokens]
        model.picker.configure("PrefixCache")
        for at, cached in caches:
            if at < len(loads):
                model.index.note(at + 1, blocks_of(cached), 0)
        wanted = prompt(*words, tokens_each=6000)
        costs = {}
        for row, tokens in enumerate(loads, 1):
            found = model.index.find(blocks_of(words)).get(row, 0)
            new = 6000 * (len(words) - found)
            delay = 1 + (min(new, 16_384) + 200) // 8
            costs[NAMES[row - 1]] = sum(tokens) + new + len(tokens) * delay
        pick = model.pick(wanted)
        assert costs[pick.name] == min(costs.values())
        for each in (pick, *held):
            each.release()
        assert model.table.pending(0) == model.table.in_flight(0) == 0
    finally:
        model.close()


def blocks_of(words):
    hashes, chain = [], 0
    for word in words:
        chain = hash((chain, word)) & (1 << 64) - 1
        hashes.append(chain)
    return hashes


def test_equal_costs_take_turns(make):
    model = make()
    picks = [model.pick(Prompt()) for _ in range(4)]
    assert {pick.name for pick in picks} == set("abcd")
    for pick in picks:
        pick.release()


# -- who may serve ---------------------------------------------------------------------------------


def test_a_cached_endpoint_that_was_tried_or_ejected_is_not_picked(make):
    model = make()
    home = model.pick(prompt("a")).name
    other = model.pick(prompt("a", "b"), exclude=(home,))
    assert other.name != home
    model.worker.eject(model.row(home), model.lives[model.row(home)], model.now_s + 5)
    assert model.pick(prompt("a", "c")).name != home


def test_only_endpoints_with_the_adapter_are_picked(make):
    model = make(adapters={"b": ("x",)})
    assert model.pick(prompt("a"), adapter="x").name == "b"
    assert model.pick(prompt("a"), adapter="y") is None
    assert model.pick(prompt("a"), adapter="x", exclude=("b",)) is None


def test_if_all_endpoints_are_ejected_all_are_picked(make):
    model = make(2)
    for name in "ab":
        model.worker.eject(model.row(name), model.lives[model.row(name)], model.now_s + 5)
    assert {model.pick(Prompt(1000, streams=True)).name for _ in range(2)} == {"a", "b"}


def test_the_load_factor_is_an_outer_bound(make):
    bound, free = make(4, load_factor=100), make(4)
    most = {}
    for model in (bound, free):
        model.answer(model.pick(prompt("system", tokens_each=4000)))
        most[model] = 0.0
        picks = []
        for n in range(24):
            picks.append(model.pick(Prompt(4100, blocks_of(("system",)), [4000], streams=True)))
            work = [model.work(name) for name in "abcd"]
            if n >= 8:
                most[model] = max(most[model], max(work) * 4 / sum(work))
        for pick in picks:
            pick.release()
    assert most[free] > 1.8, "otherwise this shows nothing"
    assert most[bound] < 1.6, "within a request of the mean"


# -- what the index knows --------------------------------------------------------------------------


def test_an_endpoint_that_restarted_has_nothing_cached(make):
    model = make(2)
    home = model.pick(prompt("a"))
    model.answer(home)
    assert model.pick(prompt("a")).pending == 0
    model.index.forget(model.row(home.name))
    assert model.pick(prompt("a")).pending == 1000


def test_without_an_index_every_prompt_is_new(make):
    model = make()
    picker = Picker(model.ring)
    picker.configure("PrefixCache")
    assert [picker.pick(prompt("a")).pending for _ in range(2)] == [1000, 1000]


@pytest.mark.parametrize("silent", [0, 1])
def test_replicas_agree_by_the_ring_on_prompts_that_none_of_them_knows(silent):
    picks = {}
    for words in [[f"{n} {block}" for block in range(4)] for n in range(20)]:
        names = []
        for replica in range(2):
            model = Model(8, peers=1)
            model.index.silent = silent
            model.table.phase = 3 * replica
            names.append(model.pick(prompt(*words)).name)
            model.close()
        picks[words[0]] = names
    assert all(one == other for one, other in picks.values())
    assert len({one for one, _ in picks.values()}) > 3


@pytest.mark.parametrize("silent", [0, 1])
def test_what_is_only_believed_to_be_cached_is_still_work(silent):
    model = Model(8, peers=1)
    model.index.silent = silent
    pick = model.pick(prompt("a", "b", "c", "d"))
    assert (pick.cached, model.pending(pick.name)) == (0, 4000)
    pick.release()
    model.close()


def test_a_known_prompt_goes_where_it_is_known_and_not_to_the_rings_endpoint():
    for n in range(20):
        words = [f"{n} {block}" for block in range(4)]
        model = Model(8, peers=1)
        ring = model.pick(prompt(*words))
        model.answer(ring)
        other = next(name for name in NAMES if name != ring.name)
        model.index.forget(model.row(ring.name))
        model.index.note(model.row(other), blocks_of(words), 0)
        assert model.pick(prompt(*words)).name == other
        model.close()


# -- the other strategies --------------------------------------------------------------------------


def test_least_load_counts_pending_tokens(make):
    model = make(2, strategy="LeastLoad")
    long = model.pick(Prompt(10_000, streams=True))
    short = [model.pick(Prompt(100, streams=True)) for _ in range(5)]
    assert {pick.name for pick in short} == {"a", "b"} - {long.name}
    long.prefilled(model.now_s)
    assert model.pick(Prompt(100, streams=True)).name == long.name


def test_prefix_hash_moves_a_request_off_an_endpoint_with_much_work(make):
    model = make(4, strategy="PrefixHash")
    first = model.pick(prompt("a", tokens_each=8000, key=7))
    assert first.name == model.ring.lookup(7)
    second = model.pick(prompt("b", tokens_each=8000, key=7))
    assert second.name != first.name
    assert second.first == first.name
    assert second.first_load + second.own_load > second.bound


def test_prefix_hash_counts_only_what_is_not_cached(make):
    model = make(4, strategy="PrefixHash")
    model.answer(model.pick(prompt("a", "b", key=7)))
    again = [model.pick(prompt("a", "b", key=7)) for _ in range(2)]
    assert {pick.name for pick in again} == {model.ring.lookup(7)}
    assert [pick.pending for pick in again] == [0, 0]


def test_a_prompt_without_a_key_uses_least_load(make):
    model = make(4, strategy="PrefixHash")
    assert {model.pick(Prompt(10, streams=True)).name for _ in range(4)} == set("abcd")


# -- learned times ---------------------------------------------------------------------------------


def serve(model, times_s, count=200):
    """Serve new prompts one by one, each in its endpoint's time per 1,000 tokens; count by name."""
    counts = dict.fromkeys(times_s, 0)
    waiting = []
    for n in range(count):
        pick = model.pick(prompt(f"new {n}"))
        counts[pick.name] += 1
        waiting.append((model.now_s + times_s[pick.name], n, pick))
        model.now_s += 0.05
        for due in sorted(waiting):
            if due[0] <= model.now_s:
                due[2].prefilled(due[0])
                due[2].release()
                waiting.remove(due)
    for *_, pick in waiting:
        pick.release()
    return counts


def test_a_slow_endpoint_gets_less_work(make):
    counts = serve(make(4), {"a": 0.4, "b": 0.1, "c": 0.1, "d": 0.1})
    assert 0 < counts["a"] < 0.5 * min(counts["b"], counts["c"], counts["d"])


def test_equal_endpoints_get_equal_work(make):
    counts = serve(make(4), dict.fromkeys("abcd", 0.1))
    assert max(counts.values()) <= 1.2 * min(counts.values())


@pytest.mark.parametrize("late", range(12))
def test_one_late_response_moves_no_conversation(make, late):
    model, homes = make(4), {}
    for number, (words, conversation) in enumerate(itertools.product((1, 5, 8), range(4))):
        pick = model.pick(prompt(*(f"{conversation} {n}" for n in range(words))))
        model.answer(pick, after_s=0.5 if number == late else 0.001)
        assert pick.name == homes.setdefault(conversation, pick.name)


def test_an_engine_that_lies_about_its_speed_is_believed_only_to_a_limit(make):
    model = make(2)
    for n in range(100):
        pick = model.pick(prompt(f"{n}"))
        model.answer(pick, after_s=0.0 if pick.name == "a" else 0.2)
    queue = [model.pick(prompt(f"more {n}")) for n in range(30)]
    served = [pick.name for pick in queue]
    assert served.count("b") >= 3, "it is never the only one that is picked"
    for pick in queue:
        pick.release()


def test_an_endpoint_that_was_slow_is_tried_again(make):
    model = make(2)
    for n in range(60):
        pick = model.pick(prompt(f"{n}"))
        model.answer(pick, after_s=0.5 if pick.name == "a" else 0.05)
    later = []
    for n in range(200):
        pick = model.pick(prompt(f"later {n}"))
        later.append(pick.name)
        model.answer(pick, after_s=0.05)
    assert later[-100:].count("a") >= 20


def test_a_response_that_is_not_streamed_is_pending_as_long_as_its_prefill_should_take(make):
    model = make(1)
    for n in range(50):
        model.answer(model.pick(prompt(f"{n}")), after_s=0.12)  # 0.1 ms a token
    pick = model.pick(prompt("whole", tokens_each=10_000, streams=False))
    model.now_s += 0.9
    model.picker.expire()
    assert model.pending("a") == 10_000
    model.now_s += 0.2
    model.picker.expire()
    assert model.pending("a") == 0
    assert model.table.in_flight(1) == 1
    pick.release()


def test_reservations_that_wait_for_their_estimate_are_not_leaked(make):
    before = live()
    model = make(1)
    model.pick(prompt("a", streams=False)).release()
    model.now_s += 100
    model.picker.expire()
    assert live() == before


# -- prompts ---------------------------------------------------------------------------------------


def test_samples_lie_where_the_offset_says():
    ends = sample_ends(1 << 30)
    assert len(ends) == BLOCKS_MAX
    assert ends[:17] == [*range(256, 4097, 256), 5120]
    assert ends[-1] == 1 << 20
    assert all(b - a <= max(256, a / 4) for a, b in itertools.pairwise(ends))
    for size in (0, 255, 256, 5000, 100_000):
        assert sample_ends(size) == [end for end in ends if end <= size]


def test_a_pick_needs_a_prompt(make):
    model = make()
    with pytest.raises(TypeError):
        model.pick(None)
    with pytest.raises(TypeError):
        model.ring.pick_hashed(1, prompt=None)


def test_a_prompt_with_unequal_blocks_and_depths_is_rejected():
    with pytest.raises(ValueError, match="2 blocks, but 1 depths"):
        Prompt(10, [1, 2], [3])
    with pytest.raises(ValueError, match="at most"):
        Prompt(10, [1] * 65, [1] * 65)
