"""The schemas of bodies: what KubeAI reads of a request, and the types of its own responses."""

from __future__ import annotations

from typing import Any

import msgspec

from kubeai.gateway.local_routes import ListedModel, ModelList
from kubeai.gateway.ollama import OllamaModels, OllamaShown, OllamaShowRequest, OllamaVersion
from kubeai.openai.errors import AnthropicError, OllamaError, OpenAIError
from kubeai.openai.request import SHAPES, read
from kubeai.openai.routes import Kind

Schema = dict[str, Any]
OWN_TYPES = (
    ModelList,
    ListedModel,
    OllamaModels,
    OllamaShown,
    OllamaShowRequest,
    OllamaVersion,
    OpenAIError,
    AnthropicError,
    OllamaError,
)
# Of kinds that the gateway answers itself.
OWN_RESPONSES: dict[Kind, type[msgspec.Struct]] = {
    Kind.MODELS: ModelList,
    Kind.OLLAMA_TAGS: OllamaModels,
    Kind.OLLAMA_PS: OllamaModels,
    Kind.OLLAMA_SHOW: OllamaShown,
    Kind.OLLAMA_VERSION: OllamaVersion,
}
MODEL: Schema = {
    "type": "string",
    "minLength": 1,
    "description": "A Model, one of its aliases, or `<name>_<adapter>` with either. `GET "
    "/v1/models` lists them. The engine gets its own name of the model.",
}
_STREAM = "Whether the response is a stream. A held stream gets comments while it waits."
_LIMIT = "Limit of the response's tokens. A key with a limit of tokens is charged by it at first."
_PROBE = b'{"model":"m","max_tokens":7}'  # finds out how a kind of body is read


def request_schema(kind: Kind) -> Schema:
    """A JSON body: the members that KubeAI reads. All others are passed on to the engine."""
    shape, probe = SHAPES[kind], read(kind, _PROBE)
    members: dict[str, Schema] = {"model": MODEL}
    if kind.has_streams or probe.stream:
        members["stream"] = {"type": "boolean", "default": probe.stream, "description": _STREAM}
    if shape.conversation is not None:
        members[shape.conversation.decode()] = {
            "type": ["array", "string"],
            "description": "The conversation. Prefix routing hashes its first user message; the "
            "size of all texts estimates the load.",
        }
    if shape.text is not None:
        members[shape.text.decode()] = {
            "type": ["string", "array"],
            "description": "The prompt, whose beginning prefix routing hashes, and whose size "
            "estimates the load.",
        }
    if shape.system is not None:
        members[shape.system.decode()] = {
            "type": ["string", "array", "null"],
            "description": "System text. It is part of the prefix.",
        }
    if shape.previous is not None:
        members[shape.previous.decode()] = {
            "type": ["string", "null"],
            "description": "A stored response that the request continues, on the replica that "
            "has it.",
        }
    if probe.output_tokens == 7:
        members |= _output_members(kind)
    return {
        "type": "object",
        "required": ["model"],
        "properties": members,
        "additionalProperties": True,
    }


def _output_members(kind: Kind) -> dict[str, Schema]:
    limit: Schema = {"type": ["integer", "null"], "description": _LIMIT}
    if kind.is_ollama:
        options: Schema = {"type": "object", "properties": {"num_predict": limit}}
        return {"options": options | {"additionalProperties": True}}
    if kind is Kind.RESPONSES:
        return {"max_output_tokens": limit}
    if kind is Kind.MESSAGES:
        return {"max_tokens": limit}
    number = {"type": ["integer", "null"], "description": "How many responses are generated."}
    return {"max_tokens": limit, "max_completion_tokens": limit, "n": number}


def form_schema() -> Schema:
    """A multipart form: KubeAI reads only ``model``."""
    return {
        "type": "object",
        "required": ["model"],
        "properties": {"model": MODEL},
        "additionalProperties": True,
    }


def own_schemas() -> dict[str, Schema]:
    """Components: the types of the gateway's own responses."""
    _, components = msgspec.json.schema_components(
        OWN_TYPES, ref_template="#/components/schemas/{name}"
    )
    # Default values are tuples, which JSON does not have.
    decoded: dict[str, Schema] = msgspec.json.decode(msgspec.json.encode(components))
    return dict(sorted(decoded.items()))


def reference(type_: type[msgspec.Struct]) -> Schema:
    """A reference to a type in the components."""
    return {"$ref": f"#/components/schemas/{type_.__name__}"}
