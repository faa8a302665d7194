"""Files in a prompt: each counts as a thousand tokens, whatever its size."""

import json

import pytest
from fakes.prompts import CONVERSATIONS, PARTS, agrees, body_of, chat, data, dump, prompt, words
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_oracle import FILE_TOKENS, files_in

from examples import some
from kubeai.openai.routes import Kind


@pytest.mark.parametrize("part", list(PARTS))
@pytest.mark.parametrize("kind", list(CONVERSATIONS))
def test_a_file_counts_as_a_thousand_tokens_whatever_its_size(kind, part):
    tokens = []
    for size in (2_000, 100_000, 900_000):
        content = [{"type": "text", "text": "What is this?"}, PARTS[part](size)]
        said = [
            {"role": "system", "content": words(300)},
            {"role": "user", "content": content},
            {"role": "user", "content": words(700, 1)},
        ]
        body = body_of(model="m", **{CONVERSATIONS[kind]: said})
        assert len(files_in(dump(said))) == 1
        agrees(kind, body)
        tokens.append(prompt(kind, body).tokens)
    assert tokens[0] == tokens[1] == tokens[2]
    assert 1250 < tokens[0] < 1350


@settings(max_examples=some(150))
@given(
    st.lists(
        st.one_of(
            st.integers(0, 3000).map(lambda size: {"type": "text", "text": words(size)}),
            st.builds(
                lambda part, size: PARTS[part](size),
                st.sampled_from(list(PARTS)),
                st.one_of(st.integers(0, 2000), st.integers(2000, 60_000)),
            ),
        ),
        max_size=20,
    ),
    st.sampled_from([None, 1]),
)
def test_files_count_wherever_they_lie_relative_to_the_samples(content, indent):
    said = json.dumps([{"role": "user", "content": content}], indent=indent).encode()
    agrees(Kind.CHAT, body_of(model="m", messages=said))


def test_the_images_of_a_message_in_ollamas_api_count_as_one_file():
    for size in (2_000, 100_000):
        said = [{"role": "user", "content": words(700), "images": [data(size), data(size)]}]
        body = body_of(model="m", messages=said)
        agrees(Kind.OLLAMA_CHAT, body)
        assert FILE_TOKENS < prompt(Kind.OLLAMA_CHAT, body).tokens < FILE_TOKENS + 250


def test_only_the_first_sixteen_files_count_as_such():
    for count in (15, 16, 17, 20):
        said = [{"role": "user", "content": [PARTS["chat"](8000) for _ in range(count)]}]
        body = body_of(model="m", messages=said)
        agrees(Kind.CHAT, body)
        tokens = prompt(Kind.CHAT, body).tokens
        files = min(count, 16) * FILE_TOKENS
        further = max(0, count - 16) * 2000
        assert files + further <= tokens < files + further + 30 * count


def test_a_short_file_is_counted_as_text():
    url = "https://example.com/a.png"
    said = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    body = body_of(model="m", messages=said)
    agrees(Kind.CHAT, body)
    assert prompt(Kind.CHAT, body).tokens == len(dump(said)) // 4


@pytest.mark.parametrize(
    "text",
    [
        '"image_url":"' + "x" * 3000 + '"',
        '{"type":"image_url","image_url":{"url":"' + "x" * 3000 + '"}}',
        "image_url: " + "x" * 3000,
        '\\"image_url\\": \\"' + "x" * 3000,
        'image_url\\","image_url":"' + "x" * 3000,
    ],
)
def test_text_that_mentions_a_file_is_text(text):
    for part in ({"type": "text", "text": text}, {"type": "image_url", "text": text}, text):
        said = [{"role": "user", "content": [part, "image_url", text, "source", "file"]}]
        body = body_of(model="m", messages=said)
        agrees(Kind.CHAT, body, with_files=False)


def test_a_key_with_escapes_is_read_too():
    part = dump(PARTS["chat"](50_000)).replace(b'"image_url":', b'"image\\u005furl" :')
    said = b'[{"role":"user","content":[%s]}]' % part
    assert 1000 < prompt(Kind.CHAT, body_of(model="m", messages=said)).tokens < 1050


def test_files_outside_the_conversation_do_not_count():
    body = chat("hello", metadata={"file": data(50_000)})
    agrees(Kind.CHAT, body)
    assert prompt(Kind.CHAT, body).tokens < 20


def test_a_screenshot_that_a_tool_returned_counts_as_a_file():
    said = [
        {"role": "user", "content": "Open the page."},
        {
            "type": "computer_call_output",
            "call_id": "c1",
            "output": {"type": "computer_screenshot", "image_url": data(100_000)},
        },
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_image", "image_url": data(100_000)}],
        },
    ]
    for items in (said[:2], said[::2], said):
        body = body_of(model="m", input=items)
        agrees(Kind.RESPONSES, body)
        assert prompt(Kind.RESPONSES, body).tokens < FILE_TOKENS * (len(items) - 1) + 100
