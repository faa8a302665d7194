"""What the API formats share: the common request, the format interface, errors and usage.

Streams match vLLM's, event by event. Simulated tokens are ASCII without quotes or backslashes and
need no JSON escaping, so that an event costs two concatenations.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

import msgspec

from kubeai.simulation import text
from kubeai.simulation.text import TOKEN_BYTES, Reply

PROMPTS_MAX = 2048  # in one request
DONE = b"data: [DONE]\n\n"
encode = msgspec.json.encode
_PLACEHOLDER = "\x00"  # for the token in a template; JSON encodes it as \u0000

T = TypeVar("T")
Positive = Annotated[int, msgspec.Meta(ge=1)]
Messages = list[tuple[str, str]]


class ApiError(Exception):
    """A request that vLLM would reject: its status, type and message."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param

    def body(self) -> dict[str, Any]:
        """The JSON body of the error response, in vLLM's format."""
        error = {"message": self.message, "type": self.kind, "param": self.param}
        return {"error": error | {"code": self.status}}


class GenerationRequest(NamedTuple):
    """A text generation request, independent of its API."""

    model: str | None
    prompts: list[bytes]  # tokens
    stops: list[str]
    limit: int | None  # tokens of each reply
    stream: bool
    usage: bool  # whether the stream ends with the usage
    previous: str | None = None  # the ID of the stored response that it continues
    response_id: str | None = None  # that the response gets; None: one of the engine's


class Meta(NamedTuple):
    """Fields that every event of a response repeats."""

    id: str
    created: int
    model: str
    replica: str


class Usage(NamedTuple):
    """Token counts of a request, over all its replies."""

    prompt: int
    cached: int
    completion: int

    def openai(self) -> dict[str, Any]:
        """The usage object of OpenAI's APIs."""
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def decode(body: bytes, kind: type[T]) -> T:
    """Decode a body, ignoring unknown fields; ApiError names an invalid field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(str(error)) from None


def stop_strings(stop: str | list[str] | None) -> list[str]:
    """Normalize the ``stop`` parameter to a list."""
    return [stop] if isinstance(stop, str) else stop or []


def content_text(content: Any) -> str:
    """The text of a message; other parts (images) contribute their JSON encoding."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(
        part if isinstance(part, str) else str(part.get("text") or encode(part).decode())
        for part in content
    )


Content = str | list[str | dict[str, Any]] | None


class Message(msgspec.Struct):
    """A chat message of OpenAI's or Anthropic's API."""

    role: str = "user"
    content: Content = None
    tool_calls: Any = None

    def rendered(self) -> tuple[str, str]:
        """(role, text) of the message; tool calls contribute their JSON encoding."""
        calls = encode(self.tool_calls).decode() if self.tool_calls else ""
        return self.role, content_text(self.content) + calls


class ApiFormat:
    """Formats the response to one request in one API.

    A stream consists of ``opening``, one ``token`` per token except the last, ``last_token`` and
    ``closing``. ``opening`` is sent together with the first token.
    """

    prefix: ClassVar[str]  # of the response's id
    stream_type: ClassVar[str] = "text/event-stream; charset=utf-8"

    def __init__(self, meta: Meta, request: GenerationRequest) -> None:
        self.meta = meta
        self.request = request
        self._around: dict[int, tuple[bytes, bytes]] = {}

    @staticmethod
    def parse(body: bytes) -> GenerationRequest:
        """Parse a request body; ApiError if it is invalid."""
        raise NotImplementedError

    def response(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        """The non-streamed response."""
        raise NotImplementedError

    def opening(self, usage: Usage) -> bytes:
        """The events before the first token."""
        return b""

    def token(self, index: int, number: int, piece: bytes) -> bytes:
        """The event for token ``number`` of reply ``index``; not for the last token."""
        around = self._around.get(index)
        if around is None:
            before, _, behind = self._token(index, _PLACEHOLDER).partition(
                encode(_PLACEHOLDER)[1:-1]
            )
            around = self._around[index] = before, behind
        return around[0] + piece + around[1]

    def _token(self, index: int, piece: str) -> bytes:
        raise NotImplementedError

    def last_token(self, index: int, piece: str, reply: Reply) -> bytes:
        """The event for the last token of reply ``index``, empty if a stop string cut it."""
        raise NotImplementedError

    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        """The events after the last token, up to the end of the stream."""
        raise NotImplementedError


def sse_data(value: Any) -> bytes:
    """Encode an SSE event that has only a ``data`` field."""
    return b"data: " + encode(value) + b"\n\n"


Input = str | list[str | int | list[int]]


def parse_prompts(value: Input, name: str) -> list[bytes]:
    """The prompts of a request: a string, strings, token IDs, or lists of token IDs."""
    if isinstance(value, str):
        return [text.pack(value)]
    if not value:
        raise ApiError(f"{name}: is empty", param=name)
    if all(isinstance(item, int) for item in value):
        return [text.pack_ids(value)]  # type: ignore[arg-type]
    if len(value) > PROMPTS_MAX:
        raise ApiError(f"{name}: {len(value)} prompts, the limit is {PROMPTS_MAX}", param=name)
    prompts = []
    for item in value:
        if isinstance(item, int) or item == []:
            raise ApiError(f"{name}: mixes strings and token IDs, or has an empty item", param=name)
        prompts.append(text.pack(item) if isinstance(item, str) else text.pack_ids(item))
    return prompts


def pieces(reply: Reply) -> list[str]:
    """A reply's tokens as text; tokens cut by a stop string are empty."""
    content = reply.text
    return [
        content[at : at + TOKEN_BYTES] for at in range(0, reply.tokens * TOKEN_BYTES, TOKEN_BYTES)
    ]
