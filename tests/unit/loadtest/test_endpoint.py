"""What `kubeai bench` finds out about an endpoint before it sends load."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from fakes.web import serving

from kubeai.loadtest import endpoint
from kubeai.loadtest.arguments import OptionError
from kubeai.loadtest.client import EndpointError
from kubeai.loadtest.scenario import ClosedLoop, Exact, Scenario, Synthetic
from kubeai.simulation.traffic import SHAPES, RandomLengths

CHAT = {"id": "chat", "features": ["TextGeneration"]}
EMBED = {"id": "embed", "features": ["TextEmbedding"]}
SPEECH = {"id": "speech", "features": ["SpeechToText"]}


class Endpoint:
    """Lists models for text generation only, as KubeAI does, and counts tokens in its own way."""

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [CHAT, EMBED, SPEECH]
        self.template_tokens = 30
        self.split: tuple[str, ...] = ()  # words of two tokens
        self.reports_usage = True
        self.rejects: tuple[str, ...] = ()  # fields of requests
        self.version = "/version"
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[Endpoint]:
        app = web.Application()
        app.router.add_get("/openai/v1/models", self._list)
        app.router.add_get("/openai/v1/models/{id}", self._one)
        app.router.add_post("/openai/v1/chat/completions", self._chat)
        app.router.add_post("/openai/v1/embeddings", self._embed)
        app.router.add_get(self.version, self._version)
        async with serving(web.AppRunner(app)) as address:
            self.url = f"http://{address}/openai/v1"
            yield self

    async def _list(self, request: web.Request) -> web.Response:
        wanted = set(request.query.getall("feature", ["TextGeneration"]))
        return web.json_response(
            {"data": [one for one in self.models if wanted & set(one["features"])]}
        )

    async def _one(self, request: web.Request) -> web.Response:
        for one in self.models:
            if one["id"] == request.match_info["id"]:
                return web.json_response(one)
        return web.json_response({"error": {"message": "no such model"}}, status=404)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    def _answer(self, body: dict[str, Any], text: str, added: int) -> web.Response:
        self.bodies.append(body)
        if any(field in body for field in self.rejects):
            return web.json_response({"error": {"message": "unknown field"}}, status=400)
        words = re.findall(r"\S+", text)
        tokens = added + sum(2 if word in self.split else 1 for word in words)
        usage = {"prompt_tokens": tokens, "completion_tokens": 1}
        choice = {"message": {"content": "x"}}
        return web.json_response(
            {"choices": [choice]} | ({"usage": usage} if self.reports_usage else {})
        )

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        return self._answer(body, body["messages"][0]["content"], self.template_tokens)

    async def _embed(self, request: web.Request) -> web.Response:
        body = await request.json()
        return self._answer(body, body["input"], 2)


async def prepared(
    at: Endpoint, *, shape_given: bool = False, ignore_eos: bool | None = None, **fields: Any
) -> endpoint.Prepared:
    traffic = Synthetic("chat", SHAPES["chat"], 1)
    fields = {"model": "", "traffic": traffic, "load": ClosedLoop(1)} | fields
    return await endpoint.prepare(
        Scenario(url=at.url, **fields), shape_given=shape_given, ignore_eos=ignore_eos
    )


# -- models ----------------------------------------------------------------------------------------


async def test_the_only_model_for_text_is_the_default():
    async with Endpoint().served() as at:
        found = await prepared(at)
        assert (found.scenario.model, found.scenario.embeds) == ("chat", False)


async def test_a_model_that_is_not_listed_is_found_by_its_name_and_gets_embeddings():
    async with Endpoint().served() as at:
        scenario = (await prepared(at, model="embed")).scenario
        assert scenario.embeds
        assert scenario.traffic.name == "embeddings"
        exact = Exact(RandomLengths(input_len=50), 1)
        scenario = (await prepared(at, model="embed", traffic=exact)).scenario
        assert scenario.embeds
        assert {body["model"] for body in at.bodies} == {"embed"}
        assert all(body["input"] for body in at.bodies)


async def test_an_endpoint_with_only_an_embeddings_model_needs_no_name():
    one = Endpoint()
    one.models = [EMBED]
    async with one.served() as at:
        assert (await prepared(at)).scenario.model == "embed"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "none"}, "has no model 'none', but chat"),
        ({"model": "speech"}, "the model 'speech' has no TextGeneration, but SpeechToText"),
        (
            {"model": "embed", "shape_given": True},
            "has no TextGeneration, but TextEmbedding: use --shape embeddings",
        ),
        (
            {"model": "chat", "traffic": Synthetic("embeddings", SHAPES["embeddings"], 1)},
            "the model 'chat' has no TextEmbedding",
        ),
    ],
)
async def test_a_model_that_cannot_serve_the_traffic_is_an_error(fields, words):
    async with Endpoint().served() as at:
        with pytest.raises(EndpointError, match=words):
            await prepared(at, **fields)


@pytest.mark.parametrize("path", ["/version", "/api/version"])
async def test_the_servers_version_is_found_where_engines_tell_it(path):
    one = Endpoint()
    one.version = path
    async with one.served() as at:
        assert (await prepared(at)).server == "0.32.0"


async def test_a_server_that_tells_no_version_has_none():
    one = Endpoint()
    one.version = "/elsewhere"
    async with one.served() as at:
        assert (await prepared(at)).server is None


# -- exact lengths ---------------------------------------------------------------------------------


async def calibrated(at: Endpoint, **fields: Any) -> tuple[RandomLengths, endpoint.Prepared]:
    lengths = RandomLengths(**({"input_len": 100} | fields.pop("lengths", {})))
    found = await prepared(at, traffic=Exact(lengths, 1), **fields)
    return found.scenario.traffic.lengths, found


async def test_prompts_allow_for_the_chat_template_of_the_engine():
    async with Endpoint().served() as at:
        lengths, found = await calibrated(at)
        assert (lengths.overhead, len(lengths.words)) == (30, 80)
        assert found.warnings == []
        assert found.scenario.extra_body == {"ignore_eos": True}


async def test_words_that_the_tokenizer_splits_are_not_used():
    one = Endpoint()
    one.split = ("ant", "cat")
    async with one.served() as at:
        lengths, _ = await calibrated(at)
    assert not {" ant", " cat"} & set(lengths.words)
    assert len(lengths.words) >= 60
    assert lengths.overhead == 30


async def test_a_tokenizer_that_splits_nearly_all_words_leaves_the_others():
    one = Endpoint()
    whole = ("dog", "sun", "web")
    one.split = tuple(word.strip() for word in endpoint.WORDS if word.strip() not in whole)
    async with one.served() as at:
        lengths, found = await calibrated(at)
        assert sorted(lengths.words) == [" dog", " sun", " web"]
        assert found.warnings == []
        one.split += whole
        _, found = await calibrated(at)
        (warning,) = found.warnings
        assert "splits all words" in warning


async def test_an_engine_that_reports_no_usage_or_knows_no_ignore_eos_causes_a_warning():
    one = Endpoint()
    one.reports_usage, one.rejects = False, ("ignore_eos",)
    async with one.served() as at:
        lengths, found = await calibrated(at)
    assert lengths.overhead is None
    first, second = found.warnings
    assert "rejects ignore_eos: responses may be shorter" in first
    assert "reports no usage: the lengths of prompts are approximate" in second
    assert found.scenario.extra_body == {}


async def test_the_users_choice_of_ignore_eos_is_sent():
    async with Endpoint().served() as at:
        _, found = await calibrated(at, ignore_eos=False)
        assert found.scenario.extra_body == {"ignore_eos": False}
        assert all(body["ignore_eos"] is False for body in at.bodies)


async def test_a_prompt_shorter_than_the_chat_template_is_an_error():
    async with Endpoint().served() as at:
        with pytest.raises(OptionError, match=r"--input-len: .* 25 tokens, .* takes 30"):
            await calibrated(at, lengths={"input_len": 25})


async def test_a_failed_request_to_measure_lengths_is_an_error():
    one = Endpoint()
    one.rejects = ("messages",)
    async with one.served() as at:
        with pytest.raises(EndpointError, match="measure prompt lengths failed: status 400"):
            await calibrated(at)


def test_requests_whose_counted_lengths_differ_cause_a_warning():
    lengths = RandomLengths(input_len=100, output_len=10)
    assert endpoint.length_warnings(lengths, 1, [(0, 100, 10), (1, -1, 10)]) == []
    assert endpoint.length_warnings(lengths, 1, [(0, 100, 10), (1, 103, 4)]) == [
        "1 of 2 prompts do not have the requested length, by up to +3 tokens",
        "1 of 2 responses do not have the requested length, by up to -6 tokens: the engine ends "
        "them early, see --ignore-eos",
    ]
