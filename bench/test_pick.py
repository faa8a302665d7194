"""PrefixCache, from Python: a request's body to its prompt, and a pick with its release.

Each round is 1,000 times: the reported time divided by 1,000 is one. The limits: a pick of an
800-byte chat at 8 endpoints ≤ 1 µs, at 1,000 ≤ 5 µs, and the prompt of a 400 KB body ≤ 60 µs.
"""

import json

import pytest

from kubeai._pick import Picker
from kubeai._prefix import PrefixIndex
from kubeai.openai.request import prompt_of, read
from kubeai.openai.routes import Kind

TIMES = range(1000)


@pytest.fixture
def make_picker(make_ring):
    made = []

    def make(endpoints):
        index = PrefixIndex.create(4096, 1 << 20, 2)
        made.append((index, PrefixIndex.attach(index.fd, 0)))
        picker = Picker(make_ring(endpoints, 20), made[-1][1])
        picker.configure("PrefixCache")
        return picker

    yield make
    for pair in made:
        for index in pair:
            index.close()


def chat(size_bytes, number=0):
    content = f"{number} " + "Tell me of it. " * (size_bytes // 15)
    messages = [{"role": "user", "content": content[:size_bytes]}]
    body = json.dumps({"model": "m", "messages": messages, "stream": True}).encode()
    return read(Kind.CHAT, body)


@pytest.mark.parametrize("endpoints", [8, 1000])
def test_pick_cached_and_release(benchmark, make_picker, endpoints):
    picker = make_picker(endpoints)
    prompts = [prompt_of(picker, chat(800, number)) for number in TIMES]

    def thousand():
        for prompt in prompts:
            picker.pick(prompt).release()

    benchmark.pedantic(thousand, rounds=100, warmup_rounds=5)


@pytest.mark.parametrize("size_bytes", [800, 400_000])
def test_prompt_of_a_body(benchmark, make_picker, size_bytes):
    picker, request = make_picker(8), chat(size_bytes)

    def thousand():
        for _ in TIMES:
            prompt_of(picker, request)

    benchmark.pedantic(thousand, rounds=20 if size_bytes < 1000 else 5, warmup_rounds=1)
