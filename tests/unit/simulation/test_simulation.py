"""The simulated engine: batching, memory and time, as properties of a pure state machine."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeai.simulation.engine import BlockCache, Engine, EngineConfig
from kubeai.simulation.text import (
    block_hashes,
    count,
    embed,
    pack,
    pack_ids,
    render,
    reply,
    similarity,
)


def engine(**settings) -> Engine:
    defaults = {"prefill_tokens_per_s": 1000.0, "decode_tokens_per_s": 10.0}
    return Engine(EngineConfig(**(defaults | settings)))


def drain(machine: Engine, now: float = 0.0, steps: int = 10_000) -> list[tuple[float, list]]:
    """Run the machine in virtual time until it is idle."""
    trace = []
    step = machine.step(now)
    while step.next_s is not None:
        now = step.next_s
        step = machine.step(now)
        trace.append((now, step.advanced))
        assert len(trace) < steps
    return trace


def test_a_lone_request_takes_its_prefill_and_one_step_per_token():
    machine = engine()
    sequence = machine.submit(0.0, prompt_tokens=500, output_tokens=3)
    times = [now for now, advanced in drain(machine) if advanced]
    assert times == pytest.approx([0.5, 0.6, 0.7])
    assert sequence.first_token_s == pytest.approx(0.5)
    assert sequence.finished_s == pytest.approx(0.7)
    assert sequence.done


def test_an_unfinished_step_yields_nothing_and_returns_its_end_time_again():
    machine = engine()
    machine.submit(0.0, 500, 2)
    end = machine.step(0.0).next_s
    assert machine.step(0.2) == ([], end)
    assert machine.step(end).advanced


def test_sequences_decode_together_at_the_rate_of_one():
    machine = engine(prefill_tokens_per_s=0.0)
    sequences = [machine.submit(0.0, 10, 11) for _ in range(50)]
    drain(machine)
    assert {round(sequence.finished_s, 6) for sequence in sequences} == {1.0}


def test_at_most_max_batch_sequences_run_and_the_others_queue():
    machine = engine(max_batch=2)
    first, second, third = (machine.submit(0.0, 10, 3) for _ in range(3))
    machine.step(0.0)
    assert (machine.running, machine.waiting) == (2, 1)
    drain(machine)
    assert first.finished_s == second.finished_s < third.first_token_s


def test_a_long_prompt_is_prefilled_in_chunks_while_others_keep_decoding():
    machine = engine(step_tokens=100)
    talker = machine.submit(0.0, 10, 50)
    step = machine.step(0.0)
    step = machine.step(step.next_s)
    assert step.advanced == [talker]
    reader = machine.submit(0.01, 450, 1)
    trace = drain(machine, step.next_s)
    first = next(index for index, (_, advanced) in enumerate(trace) if reader in advanced)
    assert first >= 4  # 450 tokens at 99 per step
    assert all(talker in advanced for _, advanced in trace[: first + 1])


def test_a_repeated_prompt_is_cached_except_for_its_last_tokens():
    machine = engine()
    hashes = list(range(10))
    cold = machine.submit(0.0, 160, 1, hashes)
    drain(machine)
    warm = machine.submit(10.0, 160, 1, hashes)
    drain(machine, 10.0)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 144)  # the last token is not looked up
    assert warm.first_token_s - 10.0 == pytest.approx(0.016)
    assert (machine.prefix_queries, machine.prefix_hits) == (320, 144)


def test_a_prefix_is_shared_only_up_to_the_first_block_that_differs():
    machine = engine()
    machine.submit(0.0, 160, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    drain(machine)
    other = machine.submit(5.0, 160, 1, [1, 2, 3, 99, 5, 6, 7, 8, 9, 10])
    drain(machine, 5.0)
    assert other.cached_tokens == 48


def test_generated_tokens_are_cached_for_the_next_turn():
    machine = engine()
    machine.submit(0.0, 32, 49, [1, 2, 3, 4, 5])
    drain(machine)
    second = machine.submit(20.0, 100, 1, [1, 2, 3, 4, 5, 6])
    drain(machine, 20.0)
    assert second.cached_tokens == 80


def test_the_least_recently_used_blocks_are_evicted_tails_first():
    machine = engine(cache_blocks=10)
    for start, now in ((0, 0.0), (100, 10.0)):
        machine.submit(now, 80, 1, range(start, start + 5))
        drain(machine, now)
    machine.submit(20.0, 32, 1, [200, 201])
    drain(machine, 20.0)
    old = machine.submit(30.0, 81, 1, [*range(5), 500])
    drain(machine, 30.0)
    assert old.cached_tokens == 3 * 16  # of 5: two were evicted, from the tail


def test_when_memory_runs_out_the_newest_sequence_restarts_and_all_finish():
    machine = engine(cache_blocks=8, prefill_tokens_per_s=0.0)
    sequences = [machine.submit(0.0, 16, 80, range(9 * n, 9 * n + 6)) for n in range(3)]
    drain(machine)
    assert machine.preemptions
    assert [sequence.produced for sequence in sequences] == [80, 80, 80]
    assert sequences[0].finished_s < sequences[2].finished_s
    assert machine.output_tokens == 240


def test_a_cancelled_sequence_frees_its_memory_and_never_advances():
    machine = engine(max_batch=1)
    gone = machine.submit(0.0, 100, 50, range(6))
    queued = machine.submit(0.0, 100, 50, range(10, 16))
    stays = machine.submit(0.0, 100, 1, range(20, 26))
    step = machine.step(0.0)
    machine.cancel(gone)
    machine.cancel(queued)
    machine.cancel(gone)
    advanced = [sequence for _, part in drain(machine, step.next_s) for sequence in part]
    assert advanced == [stays]
    assert machine.cache.used == 0


def test_a_request_without_output_is_done_after_its_prefill():
    machine = engine()
    sequence = machine.submit(0.0, 200, 0)
    assert [(now, advanced) for now, advanced in drain(machine) if advanced] == [
        (pytest.approx(0.2), [sequence])
    ]
    assert sequence.done
    assert sequence.produced == 0


def test_a_request_that_could_never_fit_is_rejected():
    with pytest.raises(ValueError, match="longer than the KV cache"):
        engine(cache_blocks=4).submit(0.0, 60, 5)
    with pytest.raises(ValueError, match="prompt"):
        engine().submit(0.0, 0, 5)


requests = st.lists(
    st.tuples(
        st.floats(0, 5),  # arrival time
        st.integers(1, 120),  # prompt tokens
        st.integers(0, 40),  # output tokens
        st.integers(0, 2),  # which prefix family
        st.booleans(),  # cancelled a second later
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(1, 6), st.integers(1, 64), st.integers(10, 20))
def test_every_request_gets_all_its_tokens_and_no_block_is_lost(plan, batch, budget, blocks):
    def run() -> list[tuple]:
        machine = engine(max_batch=batch, step_tokens=budget, cache_blocks=blocks)
        events = [(at, "come", n) for n, (at, *_) in enumerate(plan)]
        events += [(at + 1, "go", n) for n, (at, *_, leaves) in enumerate(plan) if leaves]
        sequences = {}
        tokens = dict.fromkeys(range(len(plan)), 0)
        due: float | None = None
        events.sort(key=lambda event: event[0])
        now = 0.0
        for _ in range(100_000):
            if due is not None and (not events or due <= events[0][0]):
                now = due
            elif events:
                now, what, n = events.pop(0)
                if what == "come":
                    _, prompt, output, family, _ = plan[n]
                    hashes = [family * 1000 + k for k in range((prompt + output) // 16)]
                    sequences[n] = machine.submit(now, prompt, output, hashes, n)
                else:
                    machine.cancel(sequences[n])
            else:
                break
            step = machine.step(now)
            due = step.next_s
            assert machine.cache.used <= blocks
            assert machine.cache.used + len(machine.cache._idle) <= blocks
            assert machine.running <= batch
            for sequence in step.advanced:
                tokens[sequence.owner] += bool(sequence.output_tokens)
        else:
            raise AssertionError("the engine never became idle")
        assert machine.cache.used == 0
        for n, (*_, output, _, leaves) in enumerate(plan):
            assert sequences[n].done
            assert tokens[n] == output or leaves
        return [(s.first_token_s, s.finished_s, s.cached_tokens) for s in sequences.values()]

    first, second = run(), run()
    assert str(first) == str(second)  # NaN is not equal to itself


def test_the_block_cache_reuses_idle_blocks_without_counting_them_twice():
    cache = BlockCache(4)
    assert cache.take(3)
    cache.share([1, 2, 3])
    cache.release([1, 2, 3], 0)
    assert cache.used == 0
    assert cache.admit([1, 2, 3, 4, 5], 3, 1)
    assert cache.used == 4
    assert not cache.take(1)
    assert not cache.admit([1, 2], 2, 1)


# -- text ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["user", "system"]), st.text(max_size=80)), min_size=1))
def test_a_turn_starts_with_the_tokens_of_the_previous_turn_and_its_reply(messages):
    prompt = render(messages)
    said = reply(prompt, limit=30)
    following = render([*messages, ("assistant", said.text), ("user", "go on")])
    assert following.startswith(prompt + said.text.encode())
    assert len(prompt) % 4 == 0
    assert len(said.text) == 4 * said.tokens


def test_equal_prompts_get_equal_replies_and_different_ones_different_replies():
    assert reply(pack("one"), limit=20) == reply(pack("one"), limit=20)
    assert reply(pack("one"), limit=20).text != reply(pack("two"), limit=20).text
    assert reply(pack("one"), limit=20).text != reply(pack("one"), limit=20, salt="lora").text
    assert reply(pack("one"), limit=20).text.startswith("mock ")


def test_a_reply_ends_at_its_limit_by_itself_or_at_a_stop_string():
    prompt = pack("hello")
    natural = reply(prompt, limit=None)
    assert natural.finish == "stop"
    assert 24 <= natural.tokens <= 72
    assert reply(prompt, limit=5)[1:3] == (5, "length")
    assert reply(prompt, limit=500)[1:3] == (500, "length")
    assert reply(prompt, limit=None, room=7)[1:3] == (7, "length")
    assert reply(prompt, limit=500).text.startswith(natural.text)
    second, third = natural.text.split()[1:3]
    stopped = reply(prompt, limit=500, stops=["never", third, f"{second} {third}"])
    assert stopped.text == "mock "
    assert (stopped.tokens, stopped.finish) == (3, "stop")
    assert stopped.stop == f"{second} {third}"


def test_block_hashes_cover_everything_before_them():
    one = block_hashes(pack("a" * 640))
    assert len(one) == 10
    other = block_hashes(pack("b" + "a" * 639))
    assert not set(one) & set(other)
    same = block_hashes(pack("a" * 320 + "b" * 320))
    assert same[:5] == one[:5]
    assert not set(same[5:]) & set(one)
    assert not set(block_hashes(pack("a" * 640), "lora")) & set(one)
    assert block_hashes(pack_ids(range(31)))[:1] == block_hashes(pack_ids(range(16)))
    assert count(pack_ids(range(31))) == 31


def test_hashes_and_replies_do_not_depend_on_the_process():
    assert block_hashes(b"x" * 64) == [2549505894840153663]
    assert reply(pack("hello"), limit=5).text == "mock lap fox pin art"


def test_embeddings_are_unit_vectors_and_close_for_texts_with_common_words():
    query = embed("where do owls sleep")
    near, far = embed("owls sleep in old oaks"), embed("the price of tin")
    assert len(query) == 384
    assert math.isclose(similarity(query, query), 1.0, rel_tol=1e-5)
    assert similarity(query, near) > similarity(query, far) + 0.2
    assert embed("where do owls sleep") == query
    for text in ("", "!", "word"):
        vector = embed(text, 2)
        assert math.isclose(similarity(vector, vector), 1.0, rel_tol=1e-5)
