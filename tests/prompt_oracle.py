"""What the prompt of a request body has to look like, in plain Python, without hashing anything.

Used by the tests only, for comparisons with hypothesis.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import msgspec
from json_oracle import SYSTEMS

from kubeai._prompt import BLOCKS_MAX
from kubeai.openai.request import SHAPES
from kubeai.openai.routes import Kind

# Where the sampled blocks of a conversation end.
ENDS = [
    *range(256, 4096 + 1, 256),
    *range(5120, 16384 + 1, 1024),
    *range(20480, 65536 + 1, 4096),
    *range(81920, 262144 + 1, 16384),
    *range(327680, 1048576 + 1, 65536),
]
FILE_TOKENS = 1000


FILE = re.compile(
    rb'"(?:image_url|source|input_audio|file|file_data|audio_url|video_url|images)"'
    rb"[ \n\r\t]*:[ \n\r\t]*"
)


@dataclass
class Expected:
    """What a prompt must look like."""

    covers: list[tuple[bytes, ...]]  # of each sample, the bytes that it covers
    depths: list[int]  # of each sample, the tokens up to its end
    tokens: int


def files_in(conversation: bytes) -> list[tuple[int, int]]:
    """Begin and end of the first 16 values that count as files; keys have no escapes."""
    found: list[tuple[int, int]] = []
    text = conversation.decode("latin-1")  # so that an offset is one of bytes
    at = 0
    while len(found) < 16 and (key := FILE.search(conversation, at)):
        _, end = json.JSONDecoder().raw_decode(text, key.end())
        if end - key.end() >= 1024:
            found.append((key.end(), end))
        at = end
    return found


def length(size: int, files: list[tuple[int, int]]) -> int:
    """The tokens in the first ``size`` bytes: a file counts once it is complete."""
    text = size - sum(min(size, end) - begin for begin, end in files if begin < size)
    return text // 4 + FILE_TOKENS * sum(end <= size for _, end in files)


def expected(kind: Kind, body: bytes, with_files: bool = True) -> Expected:
    members = {
        name: bytes(memoryview(value))
        for name, value in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items()
    }
    shape = SHAPES[kind]
    conversation = members.get((shape.conversation or shape.text or b"").decode(), b"")
    heads = [members[name] for name in ("tools", SYSTEMS.get(kind)) if name in members]
    files = files_in(conversation) if with_files else []
    covers: list[tuple[bytes, ...]] = [
        (members["model"], *heads[: n + 1]) for n in range(len(heads))
    ]
    depths = [sum(len(head) // 4 for head in heads[: n + 1]) for n in range(len(heads))]
    head_tokens = depths[-1] if depths else 0
    for end in ENDS:
        if end <= len(conversation) and len(covers) < BLOCKS_MAX:
            covers.append((members["model"], *heads, conversation[:end]))
            depths.append(head_tokens + length(end, files))
    return Expected(
        covers,
        depths,
        sum(len(head) for head in heads) // 4 + length(len(conversation), files),
    )
