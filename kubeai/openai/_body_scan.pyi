"""Extract routing data from a JSON request body in one pass."""

from typing import final

from kubeai.openai.routes import Kind

LARGE_BYTES: int  # larger bodies are parsed in a thread

@final
class Shape:
    """The top-level members that a kind of request is routed by.

    ``conversation`` is a list of messages or a string, ``text`` a string or a list that begins with
    one; at most one of these two is set. ``system`` is system text outside the conversation, and
    ``previous`` the ID of a stored response.
    ``uses_prefix_cache``: whether an engine keeps what it computes for such a prompt, and finds it
    again. ``has_prompt``: whether it computes one at all. ``streams_by_default``: whether the
    response is a stream unless the body has ``"stream": false``. ``generates``: whether the engine
    generates text.
    ``has_usage_option``: whether a stream reports its usage only if the body has
    ``"stream_options": {"include_usage": true}``.
    """

    kind: Kind
    conversation: bytes | None
    text: bytes | None
    system: bytes | None
    previous: bytes | None

    def __init__(
        self,
        kind: Kind,
        conversation: bytes | None = None,
        text: bytes | None = None,
        system: bytes | None = None,
        previous: bytes | None = None,
        uses_prefix_cache: bool = True,
        has_prompt: bool = True,
        streams_by_default: bool = False,
        generates: bool = False,
        has_usage_option: bool = False,
    ) -> None: ...

@final
class InferenceRequest:
    """The routing data of one request. Created by :func:`read` and :func:`named`."""

    kind: Kind
    model: str  # as the client wrote it, but without the tag "latest" in Ollama's API
    name: str  # of the Model that serves it: at first, what precedes the first "_" in ``model``
    adapter: str | None  # "" if the first "_" is the last character: matches no adapter
    target: str  # both: "<name>" or "<name>_<adapter>"
    is_renamed: bool  # whether the engine knows the model by another name than the client
    stream: bool

    @property
    def engines_name(self) -> str:
        """The name by which the engine knows the model: the adapter's or the Model's."""
    @property
    def model_json(self) -> bytes:
        """The model as the client wrote it, as a JSON string."""
    def serve_as(self, name: str, adapter: str | None = None) -> None:
        """Have another Model serve the request than the one that its ``model`` names literally."""
    @property
    def previous_response_id(self) -> str | None:
        """The stored response that the request continues; None if it is not a non-empty string."""
    @property
    def output_tokens(self) -> int:
        """How many tokens the response may have, as the body limits it; -1: it does not.

        The members ``max_tokens``, ``max_completion_tokens`` and ``max_output_tokens``, and
        Ollama's ``options.num_predict``, of several the largest, times ``n``. Values that are no
        positive whole numbers count as missing.
        """
    def key(self, prefix_char_length: int) -> int:
        """The 64-bit key of the request on the ring; the same in every process and release.

        mmh3 of a hash of all system text, the adapter, and the first ``prefix_char_length`` code
        points of the first user message (chat, responses, messages), the prompt, the query or the
        first input. A token id counts as one code point. Structures that an engine would reject
        hash as if they were empty. Conversations of more than 200,000 messages and parts hash by
        their first bytes.
        """
    def with_model(self, value: bytes) -> bytes:
        """The body with the value of ``model`` replaced (JSON); all other bytes are unchanged."""

def read(shape: Shape, body: bytes) -> InferenceRequest:
    """Parse a body of this shape. Raises ErrorResponse if it is invalid or ambiguous.

    Releases the GIL if the body is large.
    """

def named(kind: Kind, model: str) -> InferenceRequest:
    """A request whose model is not in a JSON body (but in a form field); ErrorResponse if empty."""
