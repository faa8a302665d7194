"""Counting, making and reading tokens, in the formats of vLLM and Anthropic."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from typing_extensions import override

from kubeai.mock_engine.formats.base import ApiError, Content, Message, Messages, Meta, content_text
from kubeai.mock_engine.formats.computed import ComputedRequest
from kubeai.simulation import text

TokenIds = list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]]


class TokenizeRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /tokenize``: a prompt, or messages."""

    prompt: str | None = None
    messages: list[Message] | None = None

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        if self.messages is not None:
            data = text.render(message.rendered() for message in self.messages)
        elif self.prompt is not None:
            data = text.pack(self.prompt)
        else:
            raise ApiError("prompt: is required, or messages", param="prompt")
        size = text.TOKEN_BYTES
        ids = [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
        return {"count": len(ids), "max_model_len": len(ids), "tokens": ids, "token_strs": None}


class DetokenizeRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /detokenize``."""

    tokens: TokenIds

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        data = text.pack_ids(self.tokens)
        return {"prompt": data.replace(b"\0", b"").decode("utf-8", "replace")}


class CountTokensRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /v1/messages/count_tokens``."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    system: Content = None

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        messages: Messages = [("system", content_text(self.system))] if self.system else []
        messages += [message.rendered() for message in self.messages]
        return {"input_tokens": text.count(text.render(messages))}
