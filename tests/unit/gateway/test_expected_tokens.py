"""The tokens that a request is expected to use, before the engine reports any."""

import json
from typing import Any

import pytest
import uvloop
from fakes.limited_keys import Rows, key_for

from kubeai._key_table import KeyTable
from kubeai._prompt import Prompt
from kubeai.gateway._key_limits import OUTPUT_TOKENS, expected_tokens
from kubeai.openai import request as openai
from kubeai.openai.routes import Kind

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


def read(kind: Kind = Kind.CHAT, **fields: Any):
    return openai.read(kind, json.dumps({"model": "m", **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, -1),
        ({"max_tokens": 100}, 100),
        ({"max_completion_tokens": 70}, 70),
        ({"max_output_tokens": 50}, 50),
        ({"max_tokens": 10, "max_completion_tokens": 70}, 70),
        ({"max_tokens": 10, "n": 3}, 30),
        ({"n": 3}, -1),
        ({"max_tokens": 0}, -1),
        ({"max_tokens": -1}, -1),
        ({"max_tokens": None}, -1),
        ({"max_tokens": "100"}, -1),
        ({"max_tokens": 1.5}, -1),
        ({"max_tokens": [7]}, -1),
        ({"max_tokens": 10**30}, 1 << 30),
        ({"max_tokens": 10**9, "n": 10**9}, 1 << 30),
        ({"options": {"num_ctx": 5, "num_predict": 9}}, 9),
        ({"options": {"num_predict": -2}}, -1),
        ({"options": {}}, -1),
        ({"options": [1]}, -1),
        ({"options": {"deep": {"num_predict": 9}}}, -1),
        ({"metadata": {"max_tokens": 9}}, -1),
    ],
)
def test_the_bodys_limit_of_the_response_is_read(fields, tokens):
    assert read(**fields).output_tokens == tokens


@pytest.mark.parametrize("field", [b"max_tokens", b"max_output_tokens", b"max_completion_tokens"])
def test_an_escaped_key_is_read_as_the_engine_reads_it(field):
    for at in range(len(field)):
        escaped = b"%b\\u%04x%b" % (field[:at], field[at], field[at + 1 :])
        body = b'{"model":"m","%b":100}' % escaped
        assert openai.read(Kind.CHAT, body).output_tokens == 100


@pytest.mark.parametrize("kind", [Kind.EMBEDDINGS, Kind.RERANK, Kind.TOKENIZE])
def test_requests_that_generate_nothing_are_expected_to_use_their_prompt(kind):
    request = read(kind, max_tokens=100)
    assert expected_tokens(None, Prompt(11), request) == 11


def test_the_expected_response_is_learned_from_those_before():
    table = KeyTable.create(1, 1)
    key = key_for(Rows(table), "k")
    assert expected_tokens(None, Prompt(5), read()) == 5 + OUTPUT_TOKENS
    assert expected_tokens(key, Prompt(5), read()) == 5 + OUTPUT_TOKENS
    key.mean_output_tokens = 30.5
    assert expected_tokens(key, Prompt(5), read()) == 5 + 31
    assert expected_tokens(key, Prompt(5), read(max_tokens=7)) == 12
    table.close()


def test_only_what_the_client_asks_for_is_expected_to_exceed_the_limit_of_a_minute():
    table = KeyTable.create(1, 1)
    key = key_for(Rows(table), "k", tokens_per_minute=200)
    assert expected_tokens(key, Prompt(5), read()) == 200
    key.mean_output_tokens = 2000
    assert expected_tokens(key, Prompt(5), read()) == 200
    assert expected_tokens(key, Prompt(201), read()) == 201
    assert expected_tokens(key, Prompt(5), read(max_tokens=2000)) == 2005
    table.close()
