"""What `run` must know of an endpoint before it sends load: its models, version and tokenizer.

`prepare` completes a scenario with it. The list of models may lack the model: KubeAI lists only
models for text generation by default, so each name that is not listed is asked for by itself.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from kubeai.loadtest import options, sse
from kubeai.loadtest.client import Address, Client, EndpointError, Response
from kubeai.loadtest.scenario import Exact, Scenario, Synthetic
from kubeai.simulation.text import WORDS
from kubeai.simulation.traffic import SHAPES, RandomLengths

PROBE_TIMEOUT_S = 10.0
MODELS_SHOWN = 10
VERSION_MAX_CHARS = 100
VERSION_PATHS = ("/version", "/api/version")  # of vLLM and SGLang; of Ollama
GENERATION, EMBEDDING = "TextGeneration", "TextEmbedding"
GROUP = 8  # words in a probe
WORDS_MIN = 16  # with fewer words that are one token each, single words are tried


class Prepared(NamedTuple):
    """A complete scenario, the server's version if reported, and what differs from the request."""

    scenario: Scenario
    server: str | None
    warnings: list[str]


async def prepare(
    scenario: Scenario, *, shape_given: bool, ignore_eos: bool | None = None
) -> Prepared:
    """Find the model and its kind, and adapt exact lengths to the engine's tokenizer.

    ``shape_given``: the kind of traffic is the user's choice; otherwise a model that only embeds
    gets embeddings. ``ignore_eos``: None tries it with exact lengths. An endpoint without a model
    list is assumed to have the model. EndpointError if the endpoint is down, denies access or lacks
    the model.
    """
    address = Address(scenario.url)
    client = Client(address, scenario.headers, timeout_s=min(PROBE_TIMEOUT_S, scenario.timeout_s))
    try:
        await client.resolve()
        model = await _find_model(client, scenario.model)
    finally:
        client.close()
    scenario = msgspec.structs.replace(
        _of_kind(scenario, model, shape_given=shape_given), model=model.id
    )
    if ignore_eos is not None:
        body = scenario.extra_body | {"ignore_eos": ignore_eos}
        scenario = msgspec.structs.replace(scenario, extra_body=body)
    warnings: list[str] = []
    if isinstance(scenario.traffic, Exact):
        # The first request may have to wait for a replica, so it has the load's own timeout.
        client = Client(address, scenario.headers, timeout_s=scenario.timeout_s)
        try:
            await client.resolve()
            scenario, warnings = await _Calibration(client, scenario).run(ignore_eos)
        finally:
            client.close()
    return Prepared(scenario, await _version(scenario), warnings)


# -- the model -------------------------------------------------------------------------------------


class Model(msgspec.Struct):
    """A model of the endpoint. Only KubeAI reports features; () if they are unknown."""

    id: str
    features: tuple[str, ...] = ()

    @property
    def only_embeds(self) -> bool:
        """Whether it has embeddings and no text generation."""
        return EMBEDDING in self.features and GENERATION not in self.features


class _Models(msgspec.Struct):
    data: list[Model]


async def _find_model(client: Client, name: str) -> Model:
    listed = await _list(client, "/models")
    if listed is None:
        if not name:
            raise EndpointError(f"{client.address.url}: does not list its models: set --model")
        return Model(name)
    found = next((model for model in listed if model.id == name), None)
    if name and found is None:
        found = await _one_model(client, name)
    if not name and not listed:
        listed = await _list(client, f"/models?feature={GENERATION}&feature={EMBEDDING}") or []
    if not name and len(listed) == 1:
        found = listed[0]
    if found is None:
        models = [model.id for model in listed]
        raise EndpointError(f"{client.address.url}: {_missing_model(name, models)}")
    return found


async def _one_model(client: Client, name: str) -> Model | None:
    path = f"/models/{urllib.parse.quote(name, safe='')}"
    response = await client.send(client.request("GET", path))
    try:
        model = msgspec.json.decode(response.body, type=Model)
    except msgspec.DecodeError:
        return None
    return model if model.id == name and not response.error else None


def _missing_model(model: str, models: list[str]) -> str:
    if not models:
        return f"has no model {model!r}" if model else "has no models"
    more = f", and {len(models) - MODELS_SHOWN} more" if len(models) > MODELS_SHOWN else ""
    problem = (
        f"has no model {model!r}, but" if model else "has several models: set --model to one of"
    )
    return f"{problem} {', '.join(models[:MODELS_SHOWN])}{more}"


async def _list(client: Client, path: str) -> list[Model] | None:
    """The endpoint's models; None if it has no model list."""
    response = await client.send(client.request("GET", path))
    url = f"{client.address.url}/models"
    if not response.status or response.error == "timeout":
        raise EndpointError(f"{url}: {response.error}")
    if response.status in (401, 403) or (response.status >= 500 and response.status != 501):
        raise EndpointError(f"{url}: {response.error}: {response.error_message}".rstrip(": "))
    try:
        return msgspec.json.decode(response.body, type=_Models).data
    except msgspec.DecodeError:
        return None


def _of_kind(scenario: Scenario, model: Model, *, shape_given: bool) -> Scenario:
    """The scenario with traffic that the model serves; EndpointError if that is not possible."""
    if not model.features:
        return scenario
    wanted = EMBEDDING if scenario.embeds else GENERATION
    if wanted in model.features:
        return scenario
    traffic = scenario.traffic
    if not model.only_embeds or shape_given or not isinstance(traffic, Synthetic | Exact):
        hint = ": use --shape embeddings" if model.only_embeds else ""
        raise EndpointError(
            f"{scenario.url}: the model {model.id!r} has no {wanted}, but "
            f"{', '.join(model.features)}{hint}"
        )
    if isinstance(traffic, Exact):
        lengths = msgspec.structs.replace(traffic.lengths, kind="embeddings")
        return msgspec.structs.replace(scenario, traffic=Exact(lengths, traffic.seed))
    shape = SHAPES["embeddings"]
    shape = msgspec.structs.replace(shape, conversations=traffic.shape.conversations)
    return msgspec.structs.replace(scenario, traffic=Synthetic("embeddings", shape, traffic.seed))


# -- the version -----------------------------------------------------------------------------------


class _Version(msgspec.Struct):
    version: str


async def _version(scenario: Scenario) -> str | None:
    """The server's version, as vLLM, SGLang, Ollama and the mock engine report it."""
    parts = urllib.parse.urlsplit(scenario.url)
    root = Address(f"{parts.scheme}://{parts.netloc}")
    client = Client(root, scenario.headers, timeout_s=PROBE_TIMEOUT_S)
    try:
        await client.resolve()
        for path in VERSION_PATHS:
            response = await client.send(client.request("GET", path))
            if not response.error and (version := _decode_version(response.body)):
                return version
    finally:
        client.close()
    return None


def _decode_version(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Version).version[:VERSION_MAX_CHARS]
    except msgspec.DecodeError:
        return ""


# -- the tokenizer ---------------------------------------------------------------------------------


class _Calibration:
    """Finds out how many tokens the engine adds to a text, and which words are one token for it.

    Both follow from the prompt lengths that it reports for a few short requests.
    """

    def __init__(self, client: Client, scenario: Scenario) -> None:
        assert isinstance(scenario.traffic, Exact)
        self._client, self._scenario = client, scenario
        self._traffic = scenario.traffic
        self._warnings: list[str] = []

    async def run(self, ignore_eos: bool | None) -> tuple[Scenario, list[str]]:
        """The scenario with the engine's own lengths, and what is not as requested."""
        lengths = self._traffic.lengths
        if ignore_eos is None and lengths.kind == "chat":
            await self._try_ignore_eos()
        first_word_tokens = await self._count(WORDS[0])
        if first_word_tokens < 0:
            self._warnings.append(
                "the endpoint reports no usage: the lengths of prompts are approximate"
            )
            return self._scenario, self._warnings
        groups = [WORDS[at : at + GROUP] for at in range(0, len(WORDS), GROUP)]
        words = await self._one_token_words(first_word_tokens, groups)
        if len(words) < WORDS_MIN:
            words = await self._one_token_words(first_word_tokens, [(word,) for word in WORDS])
        if not words:
            self._warnings.append(
                "the engine's tokenizer splits all words of the generated text: prompts are longer "
                "than --input-len"
            )
            words = list(WORDS)
        overhead = await self._count(words[0]) - 1
        lengths = msgspec.structs.replace(lengths, overhead=overhead, words=tuple(words))
        options.check_lengths(lengths)
        traffic = Exact(lengths, self._traffic.seed)
        return msgspec.structs.replace(self._scenario, traffic=traffic), self._warnings

    async def _try_ignore_eos(self) -> None:
        plain = self._scenario
        body = plain.extra_body | {"ignore_eos": True}
        self._scenario = msgspec.structs.replace(plain, extra_body=body)
        response = await self._send(WORDS[0])
        if response.status in (400, 422):
            self._scenario = plain
            self._warnings.append(
                "the engine rejects ignore_eos: responses may be shorter than --output-len"
            )

    async def _one_token_words(
        self, first_word_tokens: int, groups: Sequence[Sequence[str]]
    ) -> list[str]:
        """The words of the groups in which each word adds one token to a text.

        ``first_word_tokens``: the length of a prompt that is only ``WORDS[0]``.
        """
        kept: list[str] = []
        for group in groups:
            text = WORDS[0] + "".join(group)
            if await self._count(text) == first_word_tokens + len(group):
                kept += group
        return kept

    async def _count(self, text: str) -> int:
        """The length of a prompt with this text, in tokens; -1 if it is not reported."""
        response = await self._send(text)
        if response.error:
            raise EndpointError(
                f"{self._client.address.url}: a request to measure prompt lengths failed: "
                f"{response.error}: {response.error_message}".rstrip(": ")
            )
        try:
            usage = sse.decode_completion(response.body).usage
        except msgspec.DecodeError:
            usage = None
        return -1 if usage is None else usage.prompt_tokens

    async def _send(self, text: str) -> Response:
        body: dict[str, Any] = {"model": self._scenario.model, **self._scenario.extra_body}
        if self._traffic.lengths.kind == "embeddings":
            path = "/embeddings"
            body["input"] = text
        else:
            path = "/chat/completions"
            body |= {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        return await self._client.send(
            self._client.request("POST", path, msgspec.json.encode(body))
        )


def length_warnings(
    lengths: RandomLengths, seed: int, counted: Sequence[tuple[int, int, int]]
) -> list[str]:
    """What the engine's own counts say about exact lengths.

    ``counted``: for each successful request its number, prompt tokens (-1: not reported) and
    output tokens.
    """
    wrong_inputs, wrong_outputs = [], []
    for number, prompt_tokens, output_tokens in counted:
        input_len, output_len = lengths.lengths(seed, number)
        if prompt_tokens >= 0 and prompt_tokens != input_len:
            wrong_inputs.append(prompt_tokens - input_len)
        if lengths.kind == "chat" and output_tokens != output_len:
            wrong_outputs.append(output_tokens - output_len)
    found = []
    for what, wrong, hint in (
        ("prompts", wrong_inputs, ""),
        ("responses", wrong_outputs, ": the engine ends them early, see --ignore-eos"),
    ):
        if wrong:
            most = max(wrong, key=abs)
            found.append(
                f"{len(wrong):,} of {len(counted):,} {what} do not have the requested length, by "
                f"up to {most:+,} tokens{hint if most < 0 else ''}"
            )
    return found
