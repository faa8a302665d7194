"""Bodies with prompts, and their samples compared with the oracle."""

import json
import random

from prompt_oracle import Expected, expected

from kubeai._load import LoadTable
from kubeai._pick import STRATEGIES, Picker
from kubeai._ring import Ring
from kubeai.openai.request import prompt_of, read
from kubeai.openai.routes import Kind

CONVERSATIONS = {
    Kind.CHAT: "messages",
    Kind.RESPONSES: "input",
    Kind.MESSAGES: "messages",
    Kind.OLLAMA_CHAT: "messages",
}
CACHED = [*CONVERSATIONS, Kind.COMPLETIONS, Kind.SYSTEM_ONE, Kind.OLLAMA_GENERATE]


def picker(strategy="PrefixCache", prefix_char_length=100):
    made = Picker(Ring(LoadTable.create(1, 1), 0, 0))
    made.configure(strategy, prefix_char_length)
    return made


PICKERS = {strategy: picker(strategy) for strategy in STRATEGIES}


def prompt(kind, body, strategy="PrefixCache"):
    return prompt_of(PICKERS[strategy], read(kind, body))


def dump(value) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def body_of(**members) -> bytes:
    """A body; a member that is bytes is written as it stands."""
    return b"{%s}" % b",".join(
        dump(name) + b":" + (value if isinstance(value, bytes) else dump(value))
        for name, value in members.items()
    )


def chat(*texts, **members) -> bytes:
    said = [
        {"role": "user" if n % 2 == 0 else "assistant", "content": text}
        for n, text in enumerate(texts)
    ]
    return body_of(**{"model": "m", **members, "messages": said})


def words(size, seed=0) -> str:
    source = random.Random(seed)
    return "".join(source.choices("abcdefghijklmnopqrstuvwxyz  \n", k=size))[:size]


def agrees(kind: Kind, body: bytes, with_files: bool = True) -> Expected:
    """Check a prompt's length and depths; returns what its hashes have to cover."""
    found = prompt(kind, body)
    wanted = expected(kind, body, with_files)
    assert [depth for _, depth in found.samples] == wanted.depths
    assert found.tokens == wanted.tokens
    depths = [depth for _, depth in found.samples]
    assert depths == sorted(depths)
    assert all(depth <= found.tokens for depth in depths)
    assert not found.has_key
    return wanted


def data(size) -> str:
    return "data:image/png;base64," + "iVBORw0KGgo/" * (size // 12)


PARTS = {
    "chat": lambda size: {"type": "image_url", "image_url": {"url": data(size), "detail": "low"}},
    "responses": lambda size: {"type": "input_image", "image_url": data(size)},
    "anthropic": lambda size: {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": data(size)},
    },
    "tool result": lambda size: {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "image", "source": {"type": "base64", "data": data(size)}}],
    },
    "audio": lambda size: {
        "type": "input_audio",
        "input_audio": {"data": data(size), "format": "wav"},
    },
    "file": lambda size: {
        "type": "file",
        "file": {"filename": "a.pdf", "file_data": data(size)},
    },
    "input file": lambda size: {"type": "input_file", "filename": "a", "file_data": data(size)},
    "video": lambda size: {"type": "video_url", "video_url": {"url": data(size)}},
    "audio url": lambda size: {"type": "audio_url", "audio_url": {"url": data(size)}},
}
