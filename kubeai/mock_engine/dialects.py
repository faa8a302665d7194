"""The mock engine's APIs: parsing requests and formatting responses. Pure.

Four APIs generate text (OpenAI's chat completions, completions and responses, and Anthropic's
messages); each is a :class:`Dialect`. Requests are decoded to a common :class:`Ask`; responses are
formatted from it and the replies. Embeddings, rerank and transcription have their own functions.

Streams match vLLM's, event by event. Simulated tokens are ASCII without quotes or backslashes and
need no JSON escaping, so that an event costs two concatenations.
"""

from __future__ import annotations

import base64
import io
import wave
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import msgspec

from kubeai.simulation import text
from kubeai.simulation.text import TOKEN_BYTES, Reply

PROMPTS_MAX = 2048  # in one request
DIMENSIONS_MAX = 4096
DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode
_HOLE = "\x00"  # placeholder for the token in a template; JSON encodes it as \u0000

T = TypeVar("T")
Positive = Annotated[int, msgspec.Meta(ge=1)]
Messages = list[tuple[str, str]]


class Refused(Exception):
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
        error = {"message": self.message, "type": self.kind, "param": self.param}
        return {"error": error | {"code": self.status}}


class Ask(NamedTuple):
    """A text generation request, independent of its API."""

    model: str | None
    prompts: list[bytes]  # tokens
    stops: list[str]
    limit: int | None  # tokens of each reply
    stream: bool
    usage: bool  # whether the stream ends with the usage


class Meta(NamedTuple):
    """Fields that every event of a response repeats."""

    id: str
    created: int
    model: str
    replica: str


class Usage(NamedTuple):
    prompt: int
    cached: int
    completion: int

    def openai(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def decode(body: bytes, kind: type[T]) -> T:
    """Decode a body, ignoring unknown fields; Refused names an invalid field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused(str(error)) from None


def _stops(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


def _content(content: Any) -> str:
    """The text of a message; other parts (images) contribute their JSON encoding."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(
        part if isinstance(part, str) else str(part.get("text") or _encode(part).decode())
        for part in content
    )


Content = str | list[str | dict[str, Any]] | None


class Message(msgspec.Struct):
    role: str = "user"
    content: Content = None
    tool_calls: Any = None

    def rendered(self) -> tuple[str, str]:
        calls = _encode(self.tool_calls).decode() if self.tool_calls else ""
        return self.role, _content(self.content) + calls


class Dialect:
    """One API's response to one Ask. In streams, ``opening`` is sent with the first token."""

    prefix: ClassVar[str]  # of the response's id

    def __init__(self, meta: Meta, ask: Ask) -> None:
        self.meta = meta
        self.ask = ask
        self._around: dict[int, tuple[bytes, bytes]] = {}

    @staticmethod
    def read(body: bytes) -> Ask:
        raise NotImplementedError

    def whole(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        """The non-streamed response."""
        raise NotImplementedError

    def opening(self, usage: Usage) -> bytes:
        return b""

    def token(self, index: int, number: int, piece: bytes) -> bytes:
        """The event for token ``number`` of reply ``index``; not for the last token."""
        around = self._around.get(index)
        if around is None:
            before, _, behind = self._token(index, _HOLE).partition(_encode(_HOLE)[1:-1])
            around = self._around[index] = before, behind
        return around[0] + piece + around[1]

    def _token(self, index: int, piece: str) -> bytes:
        raise NotImplementedError

    def last(self, index: int, piece: str, reply: Reply) -> bytes:
        """The event for the last token of reply ``index``, empty if a stop string cut it."""
        raise NotImplementedError

    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        raise NotImplementedError


def _data(value: Any) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


# -- OpenAI: chat ------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ChatRequest(msgspec.Struct):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    stop: str | list[str] | None = None
    n: int | None = 1


class Chat(Dialect):
    prefix = "chatcmpl-"

    @staticmethod
    def read(body: bytes) -> Ask:
        asked = decode(body, ChatRequest)
        _only_one(asked.n)
        return Ask(
            asked.model,
            [text.render(message.rendered() for message in asked.messages)],
            _stops(asked.stop),
            asked.max_completion_tokens or asked.max_tokens,
            bool(asked.stream),
            asked.stream_options is not None and asked.stream_options.include_usage,
        )

    def whole(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        (reply,) = replies
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text, "tool_calls": []},
            "logprobs": None,
            "finish_reason": reply.finish,
            "stop_reason": reply.stop,
        }
        return self._object("chat.completion", [choice]) | {"usage": usage.openai()}

    def opening(self, usage: Usage) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def _token(self, index: int, piece: str) -> bytes:
        return self._chunk({"content": piece})

    def last(self, index: int, piece: str, reply: Reply) -> bytes:
        return self._chunk({"content": piece}, reply.finish, {"stop_reason": reply.stop})

    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        if not self.ask.usage:
            return DONE
        return _data(self._object("chat.completion.chunk", []) | {"usage": usage.openai()}) + DONE

    def _chunk(
        self, delta: dict[str, str], finish: str | None = None, more: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _data(self._object("chat.completion.chunk", [choice | (more or {})]))

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        meta = self.meta
        head = {"id": meta.id, "object": kind, "created": meta.created, "model": meta.model}
        return head | {"choices": choices, "system_fingerprint": meta.replica}


def _only_one(count: int | None) -> None:
    if count not in (None, 1):
        raise Refused("n: the mock engine only supports n=1", param="n")


# -- OpenAI: completions -----------------------------------------------------------------------

Input = str | list[str | int | list[int]]


def _prompts(value: Input, name: str) -> list[bytes]:
    """The prompts of a request: a string, strings, token IDs, or lists of token IDs."""
    if isinstance(value, str):
        return [text.pack(value)]
    if not value:
        raise Refused(f"{name}: is empty", param=name)
    if all(isinstance(item, int) for item in value):
        return [text.pack_ids(value)]  # type: ignore[arg-type]
    if len(value) > PROMPTS_MAX:
        raise Refused(f"{name}: {len(value)} prompts, the limit is {PROMPTS_MAX}", param=name)
    prompts = []
    for item in value:
        if isinstance(item, int) or item == []:
            raise Refused(f"{name}: mixes strings and token IDs, or has an empty item", param=name)
        prompts.append(text.pack(item) if isinstance(item, str) else text.pack_ids(item))
    return prompts


class CompletionRequest(msgspec.Struct):
    prompt: Input
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = 16
    stop: str | list[str] | None = None
    n: int | None = 1
    echo: bool | None = False


class Completions(Dialect):
    prefix = "cmpl-"

    @staticmethod
    def read(body: bytes) -> Ask:
        asked = decode(body, CompletionRequest)
        _only_one(asked.n)
        if asked.echo:
            raise Refused("echo: the mock engine does not support echo", param="echo")
        return Ask(
            asked.model,
            _prompts(asked.prompt, "prompt"),
            _stops(asked.stop),
            asked.max_tokens,
            bool(asked.stream),
            asked.stream_options is not None and asked.stream_options.include_usage,
        )

    def whole(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(i, r.text, r.finish, r.stop) for i, r in enumerate(replies)]
        return self._object(choices) | {"usage": usage.openai()}

    def _token(self, index: int, piece: str) -> bytes:
        return _data(self._object([self._choice(index, piece, None, None)]))

    def last(self, index: int, piece: str, reply: Reply) -> bytes:
        return _data(self._object([self._choice(index, piece, reply.finish, reply.stop)]))

    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        if not self.ask.usage:
            return DONE
        return _data(self._object([]) | {"usage": usage.openai()}) + DONE

    def _choice(
        self, index: int, said: str, finish: str | None, stop: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": said, "logprobs": None}
        return choice | {"finish_reason": finish, "stop_reason": stop}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        meta = self.meta
        head = {"id": meta.id, "object": "text_completion", "created": meta.created}
        return head | {
            "model": meta.model,
            "choices": choices,
            "system_fingerprint": meta.replica,
        }


# -- OpenAI: responses -------------------------------------------------------------------------


class ResponseItem(msgspec.Struct):
    type: str = "message"
    role: str | None = None
    content: Content = None
    output: Content = None  # of a tool call
    arguments: str = ""

    def rendered(self) -> tuple[str, str]:
        said = _content(self.content) + self.arguments + _content(self.output)
        return self.role or self.type, said


class ResponsesRequest(msgspec.Struct):
    input: str | list[ResponseItem]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = False
    max_output_tokens: Positive | None = None


class Responses(Dialect):
    prefix = "resp_"

    @staticmethod
    def read(body: bytes) -> Ask:
        asked = decode(body, ResponsesRequest)
        messages: Messages = [("system", asked.instructions)] if asked.instructions else []
        if isinstance(asked.input, str):
            messages.append(("user", asked.input))
        else:
            messages += [item.rendered() for item in asked.input]
        limit = asked.max_output_tokens
        return Ask(asked.model, [text.render(messages)], [], limit, bool(asked.stream), True)

    def whole(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        (reply,) = replies
        cut = reply.finish == "length"
        output = [self._item("incomplete" if cut else "completed", [self._part(reply.text)])]
        return self._response("incomplete" if cut else "completed", output) | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.completion,
            },
        }

    def opening(self, usage: Usage) -> bytes:
        begun = {"response": self._response("in_progress", [])}
        return b"".join(
            (
                self._event(0, "response.created", begun),
                self._event(1, "response.in_progress", begun),
                self._event(
                    2,
                    "response.output_item.added",
                    {"output_index": 0, "item": self._item("in_progress", [])},
                ),
                self._event(
                    3, "response.content_part.added", self._place() | {"part": self._part("")}
                ),
            )
        )

    def token(self, index: int, number: int, piece: bytes) -> bytes:
        return self._delta(4 + number, piece.decode())

    def last(self, index: int, piece: str, reply: Reply) -> bytes:
        return self._delta(3 + reply.tokens, piece)

    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        whole = self.whole(replies, usage)
        (item,) = whole["output"]
        (part,) = item["content"]
        said = {"text": replies[0].text, "logprobs": []}
        number = 4 + replies[0].tokens
        return b"".join(
            (
                self._event(number, "response.output_text.done", self._place() | said),
                self._event(
                    number + 1, "response.content_part.done", self._place() | {"part": part}
                ),
                self._event(
                    number + 2, "response.output_item.done", {"output_index": 0, "item": item}
                ),
                self._event(number + 3, f"response.{whole['status']}", {"response": whole}),
            )
        )

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.meta.id,
            "object": "response",
            "created_at": self.meta.created,
            "model": self.meta.model,
            "status": status,
            "output": output,
            "instructions": None,
            "metadata": {"replica": self.meta.replica},
            "max_output_tokens": self.ask.limit,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        item = {"id": f"msg_{self.meta.id}", "type": "message", "role": "assistant"}
        return item | {"status": status, "content": content}

    @staticmethod
    def _part(said: str) -> dict[str, Any]:
        return {"type": "output_text", "text": said, "annotations": [], "logprobs": []}

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.meta.id}", "output_index": 0, "content_index": 0}

    def _delta(self, number: int, said: str) -> bytes:
        more = {"delta": said, "logprobs": []}
        return self._event(number, "response.output_text.delta", self._place() | more)

    @staticmethod
    def _event(number: int, kind: str, value: dict[str, Any]) -> bytes:
        body = {"type": kind, "sequence_number": number} | value
        return f"event: {kind}\n".encode() + _data(body)


# -- Anthropic: messages -----------------------------------------------------------------------


class MessagesRequest(msgspec.Struct):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_tokens: Positive
    model: str | None = None
    system: Content = None
    stream: bool | None = False
    stop_sequences: list[str] | None = None


class AnthropicMessages(Dialect):
    prefix = "msg_"

    @staticmethod
    def read(body: bytes) -> Ask:
        asked = decode(body, MessagesRequest)
        messages: Messages = [("system", _content(asked.system))] if asked.system else []
        messages += [message.rendered() for message in asked.messages]
        return Ask(
            asked.model,
            [text.render(messages)],
            asked.stop_sequences or [],
            asked.max_tokens,
            bool(asked.stream),
            True,
        )

    def whole(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        (reply,) = replies
        return self._message(usage) | {
            "content": [{"type": "text", "text": reply.text}],
            "usage": self._usage(usage) | {"output_tokens": usage.completion},
            **self._ending(reply),
        }

    def opening(self, usage: Usage) -> bytes:
        return self._event("message_start", {"message": self._message(usage)}) + self._event(
            "content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}
        )

    def _token(self, index: int, piece: str) -> bytes:
        return self._delta(piece)

    def last(self, index: int, piece: str, reply: Reply) -> bytes:
        return self._delta(piece)

    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        final = self._usage(usage) | {"output_tokens": usage.completion}
        return b"".join(
            (
                self._event("content_block_stop", {"index": 0}),
                self._event("message_delta", {"delta": self._ending(replies[0]), "usage": final}),
                self._event("message_stop", {}),
            )
        )

    def _message(self, usage: Usage) -> dict[str, Any]:
        return {
            "id": self.meta.id,
            "type": "message",
            "role": "assistant",
            "model": self.meta.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(usage),
        }

    @staticmethod
    def _usage(usage: Usage) -> dict[str, Any]:
        # Anthropic does not include cached tokens in the input tokens.
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": 0,
        }

    @staticmethod
    def _ending(reply: Reply) -> dict[str, Any]:
        reasons = {"length": "max_tokens", "stop": "stop_sequence" if reply.stop else "end_turn"}
        return {"stop_reason": reasons[reply.finish], "stop_sequence": reply.stop}

    def _delta(self, said: str) -> bytes:
        delta = {"type": "text_delta", "text": said}
        return self._event("content_block_delta", {"index": 0, "delta": delta})

    @staticmethod
    def _event(kind: str, value: dict[str, Any]) -> bytes:
        return f"event: {kind}\n".encode() + _data({"type": kind} | value)


# -- embeddings, rerank, transcription ---------------------------------------------------------


class EmbeddingRequest(msgspec.Struct):
    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=DIMENSIONS_MAX)] | None = None

    def prompts(self) -> list[bytes]:
        return _prompts(self.input, "input")

    def answer(self, meta: Meta, prompts: list[bytes], tokens: int) -> dict[str, Any]:
        dimensions = self.dimensions or text.EMBEDDING_DIMENSIONS
        data = []
        for index, prompt in enumerate(prompts):
            vector = text.embed(prompt.rstrip(b"\0").decode("utf-8", "replace"), dimensions)
            value = (
                base64.b64encode(vector.tobytes()).decode()
                if self.encoding_format == "base64"
                else vector.tolist()
            )
            data.append({"object": "embedding", "index": index, "embedding": value})
        return {
            "id": meta.id,
            "object": "list",
            "created": meta.created,
            "model": meta.model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }


class RerankRequest(msgspec.Struct):
    query: str
    documents: Annotated[
        list[str | dict[str, Any]], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)
    ]
    model: str | None = None
    top_n: Annotated[int, msgspec.Meta(ge=0)] | None = None
    return_documents: bool | None = True

    def texts(self) -> list[str]:
        return [
            item if isinstance(item, str) else str(item.get("text") or "")
            for item in self.documents
        ]

    def answer(self, meta: Meta, tokens: int) -> dict[str, Any]:
        query = text.embed(self.query)
        results = []
        for index, document in enumerate(self.texts()):
            score = text.similarity(query, text.embed(document))
            result: dict[str, Any] = {"index": index, "relevance_score": score}
            if self.return_documents:
                result["document"] = {"text": document}
            results.append(result)
        results.sort(key=lambda result: (-result["relevance_score"], result["index"]))
        return {
            "id": meta.id,
            "model": meta.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": results[: self.top_n or None],
        }


def audio_seconds(head: bytes, size_bytes: int) -> float:
    """The duration of audio: from the header if it is WAV, else assuming 128 kbit/s.

    ``head``: the first bytes, at least the header. The header of a streamed WAV has no valid
    length, so the duration is capped at what ``size_bytes`` can hold.
    """
    try:
        with wave.open(io.BytesIO(head)) as file:
            frame = file.getsampwidth() * file.getnchannels()
            frames = min(file.getnframes(), size_bytes // frame)
            return float(frames / file.getframerate())
    except (wave.Error, EOFError, ZeroDivisionError):
        return size_bytes / 16_000


def transcript(digest: bytes, seconds: float) -> str:
    """A transcript that depends only on the bytes, about two words per second."""
    words = text.reply(digest, limit=max(1, min(round(2 * seconds), 4096))).text
    return f"transcript of {seconds:.2f} s of audio {digest.hex()[:12]}: {words}"


def transcription(form: str, said: str, seconds: float) -> tuple[str, bytes]:
    """Content type and body of a response in format ``form``."""
    if form == "text":
        return "text/plain", said.encode() + b"\n"
    usage = {"type": "duration", "seconds": int(seconds + 0.999)}
    answer: dict[str, Any] = {"text": said, "usage": usage}
    if form == "verbose_json":
        segment = {
            "id": 0,
            "seek": 0,
            "start": 0.0,
            "end": seconds,
            "text": said,
            "tokens": [],
            "temperature": 0.0,
            "avg_logprob": -0.1,
            "compression_ratio": 1.0,
            "no_speech_prob": 0.0,
        }
        more = {"task": "transcribe", "language": "en", "duration": seconds}
        answer = more | answer | {"segments": [segment]}
    elif form != "json":
        raise Refused(
            f"response_format: {form!r} is not json, text or verbose_json", param="response_format"
        )
    return "application/json", _encode(answer)


def pieces(reply: Reply) -> list[str]:
    """A reply's tokens as text; tokens cut by a stop string are empty."""
    said = reply.text
    return [said[at : at + TOKEN_BYTES] for at in range(0, reply.tokens * TOKEN_BYTES, TOKEN_BYTES)]
