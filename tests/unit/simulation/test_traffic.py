"""Client traffic: generated, read from files, and its arrival times."""

from __future__ import annotations

import itertools
import json
import math
import statistics

import msgspec
import pytest

from kubeai.simulation import text
from kubeai.simulation.traffic import (
    SHAPES,
    Arrivals,
    Conversation,
    RandomLengths,
    Shape,
    TrafficError,
    Turn,
    generate,
    generate_exact,
    read_sharegpt,
    unrolled,
)


def tokens(said: str) -> int:
    return text.count(text.pack(said))


def some(shape: Shape, count: int, seed: int = 1) -> list[Conversation]:
    return list(generate(msgspec.structs.replace(shape, conversations=count), seed))


# -- generated -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_a_seed_gives_the_same_conversations_regardless_of_their_number(name):
    assert some(SHAPES[name], 3) == some(SHAPES[name], 30)[:3]
    assert some(SHAPES[name], 3) != some(SHAPES[name], 3, seed=2)


def test_lengths_are_spread_around_their_means():
    shape = Shape(turns=2, prompt_tokens=200, turn_tokens=50, reply_tokens=100)
    many = some(shape, 2000)
    first = [tokens(one.turns[0].text) for one in many]
    assert statistics.fmean(first) == pytest.approx(200, rel=0.05)
    assert statistics.fmean(tokens(o.turns[1].text) for o in many) == pytest.approx(50, rel=0.05)
    assert statistics.fmean(o.turns[1].reply_tokens for o in many) == pytest.approx(100, rel=0.05)
    assert min(first) < 80 < 400 < max(first)
    alike = some(msgspec.structs.replace(shape, spread=0.0), 3)
    assert {tokens(one.turns[0].text) for one in alike} == {200}


def test_system_prompts_are_shared_and_documents_precede_the_question():
    many = some(Shape(system_tokens=300, systems=3), 100)
    systems = {one.history[0] for one in many}
    assert len(systems) == 3
    assert {(role, tokens(said)) for role, said in systems} == {("system", 300)}
    asked = some(Shape(turns=1, documents=20, document_tokens=100), 400)
    documents = [one.turns[0].text[: 100 * text.TOKEN_BYTES] for one in asked]
    counts = sorted((documents.count(one) for one in set(documents)), reverse=True)
    assert len(counts) <= 20
    assert counts[0] > 4 * counts[-1], "some documents are asked about far more often"


def test_a_turn_contains_the_conversation_before_it():
    one = Conversation((Turn("a"), Turn("b", reply="given"), Turn("c")), (("system", "s"),))
    assert one.prompt(2, ["came", "ignored"]) == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "came"),
        ("user", "b"),
        ("assistant", "given"),
        ("user", "c"),
    ]


def test_unrolling_makes_each_turn_a_request_with_its_history():
    (one,) = some(Shape(turns=3, replies=True), 1)
    parts = list(unrolled([one]))
    assert [len(part.history) for part in parts] == [0, 2, 4]
    for number, part in enumerate(parts):
        whole = one.prompt(number, [""] * number)
        assert part.prompt(0, ()) == whole


# -- files -----------------------------------------------------------------------------------------


def said(*texts: str) -> dict:
    speakers = itertools.cycle(("human", "gpt"))
    return {"conversations": [{"from": next(speakers), "value": t} for t in texts]}


def test_sharegpt_gives_turns_with_the_replies_in_the_file(tmp_path):
    file = tmp_path / "s.json"
    entries = [said("hello", "hi there", "bye", "b" * 40), said("short", "one")]
    late = {
        "conversations": [{"from": "gpt", "value": "I begin"}, *said("q", "a")["conversations"]]
    }
    file.write_text(json.dumps([*entries, late]))
    first, _, third = read_sharegpt(file)
    assert first.turns == (Turn("hello", 2, "hi there"), Turn("bye", 10, "b" * 40))
    assert third.turns == (Turn("q", 1, "a"),)
    assert read_sharegpt(file, messages_min=4) == [first]
    assert read_sharegpt(file, tokens_max=6)[0].turns == (Turn("hello", 2, "hi there"),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON: nested too deeply"),
        ("{}", "is not a list"),
        ("[]", "has no conversation"),
        ('[{"conversations": [{"from": "human"}]}]', "entry 0 is not"),
        ("[1]", "entry 0 is not"),
    ],
)
def test_an_invalid_sharegpt_file_is_reported_with_the_path(tmp_path, content, words):
    file = tmp_path / "s.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TrafficError, match=words) as caught:
        read_sharegpt(file)
    assert str(file) in str(caught.value)


# -- arrival times -------------------------------------------------------------------------------


def until(arrivals: Arrivals, end_s: float) -> list[float]:
    return list(itertools.takewhile(lambda at_s: at_s < end_s, arrivals.times(1)))


def test_arrivals_have_the_given_rate():
    assert len(until(Arrivals(per_s=20), 500)) == pytest.approx(10_000, rel=0.05)
    assert until(Arrivals(per_s=4, kind="constant"), 1.0) == [0.0, 0.25, 0.5, 0.75]
    bursts = until(Arrivals(per_s=20, kind="bursts", burst=50), 500)
    assert len(bursts) == pytest.approx(10_000, rel=0.2)
    assert len(set(bursts)) * 50 == pytest.approx(len(bursts), abs=50)
    ramp = until(Arrivals(per_s=10, kind="ramp", until_per_s=50, ramp_s=100), 200)
    assert len([at_s for at_s in ramp if at_s < 20]) == pytest.approx(20 * 14, rel=0.2)
    assert len([at_s for at_s in ramp if at_s >= 100]) == pytest.approx(100 * 50, rel=0.1)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_the_gaps_between_arrivals_have_the_gamma_distribution_of_the_burstiness(burstiness):
    """Its coefficient of variation is one over the square root of the shape."""
    times = list(itertools.islice(Arrivals(per_s=10.0, burstiness=burstiness).times(1), 20_000))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.05)
    variation = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)


def test_infinite_burstiness_gives_constant_gaps():
    times = Arrivals(per_s=4.0, burstiness=math.inf).times(1)
    assert list(itertools.islice(times, 3)) == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_number_of_arrivals_takes_as_long_as_the_rate_says(seed):
    times = list(Arrivals(per_s=4.0).times(seed, 100))
    assert len(times) == 100
    assert times == sorted(times)
    assert times[-1] == pytest.approx(25.0)
    assert len(list(Arrivals(per_s=4.0, kind="bursts", burst=7).times(seed, 100))) == 100


# -- exact lengths ---------------------------------------------------------------------------------


def exact(count: int, **lengths) -> list[tuple[Conversation, int, int]]:
    """Requests, with the lengths of their prompts and outputs for a simulated engine."""
    many = itertools.islice(generate_exact(RandomLengths(**lengths), 1), count)
    return [
        (
            one,
            text.count(text.render(one.prompt(0, ()))),
            one.turns[0].reply_tokens,
        )
        for one in many
    ]


def test_prompts_and_outputs_have_exactly_the_given_lengths():
    for one, prompt, output in exact(50, input_len=100, output_len=9):
        assert (prompt, output) == (100, 9)
        assert len(one.turns) == 1
    assert len({one.turns[0].text for one, _, _ in exact(50)}) == 50


def test_random_lengths_are_even_between_their_bounds():
    found = exact(3000, input_len=100, output_len=10, input_ratio=0.25, output_ratio=0.5)
    prompts, outputs = {one[1] for one in found}, {one[2] for one in found}
    assert (min(prompts), max(prompts)) == (75, 125)
    assert (min(outputs), max(outputs)) == (5, 15)
    assert statistics.fmean(one[1] for one in found) == pytest.approx(100, abs=1)


def test_all_prompts_begin_with_the_prefix_which_is_in_addition_to_the_input():
    found = exact(20, input_len=40, prefix_len=60)
    texts = [one.turns[0].text for one, _, _ in found]
    assert {prompt for _, prompt, _ in found} == {100}
    assert len({text[: 4 * 60] for text in texts}) == 1
    assert len({text[4 * 60 :] for text in texts}) == 20


def test_lengths_allow_for_what_an_engine_adds_and_for_its_words():
    lengths = RandomLengths(input_len=50, overhead=23, words=(" cat", " dog"))
    (one,) = itertools.islice(generate_exact(lengths, 1), 1)
    words = one.turns[0].text.split()
    assert len(words) == 27
    assert set(words) == {"cat", "dog"}


def test_an_embeddings_input_has_its_length_without_a_chat_template():
    (one,) = itertools.islice(generate_exact(RandomLengths(input_len=50, kind="embeddings"), 1), 1)
    assert (one.kind, tokens(one.turns[0].text), one.turns[0].reply_tokens) == ("embeddings", 50, 0)


def test_exact_requests_are_split_among_processes():
    lengths = RandomLengths(input_len=50, input_ratio=0.5)
    alone = list(itertools.islice(generate_exact(lengths, 3), 10))
    for first in (0, 1):
        assert (
            list(itertools.islice(generate_exact(lengths, 3, first=first, step=2), 5))
            == (alone[first::2])
        )
