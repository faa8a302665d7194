"""URLs of brokers: what they open, and what is wrong with them."""

from __future__ import annotations

import importlib

import pytest

from kubeai.brokers.base import Broker
from kubeai.brokers.urls import IMPLEMENTATIONS, Implementation, open_broker, parse_broker_url
from kubeai.errors import ConfigError

PATH = "messaging.streams[0].requestsURL"


@pytest.mark.parametrize(
    "url", ["", "requests", "https://localhost/queue", "mem://requests", "://"]
)
def test_unknown_scheme_is_refused_with_those_that_are_known(url):
    with pytest.raises(ConfigError) as raised:
        open_broker(url, PATH, {})
    assert raised.value.path == PATH
    assert all(f"{scheme}://" in str(raised.value) for scheme in IMPLEMENTATIONS)


def test_missing_library_is_reported_with_the_command_that_installs_it(monkeypatch):
    for library in ("no_such_library", "no_such_package.module"):
        monkeypatch.setitem(
            IMPLEMENTATIONS, "awssqs", Implementation("sqs.broker", "SQS", library, "sqs")
        )
        with pytest.raises(ConfigError) as raised:
            open_broker("awssqs://sqs.us-east-1.amazonaws.com/1/requests", PATH, {})
        assert str(raised.value).startswith(f"{PATH}: ")
        assert "pip install 'kubeai-gateway[sqs]'" in str(raised.value)


def test_option_that_is_given_twice_is_refused():
    with pytest.raises(ConfigError, match="the option region twice"):
        open_broker("awssqs://localhost/1/requests?region=a&region=b", PATH, {})


def test_unknown_option_is_refused_with_those_that_are_known():
    url = parse_broker_url("awssqs://localhost/1/requests?regoin=a", PATH, {})
    with pytest.raises(ConfigError, match="unknown option regoin; the options are region, raw"):
        url.check_options("region", "raw")
    with pytest.raises(ConfigError, match="there are no options"):
        url.check_options()


def test_missing_variable_is_named():
    url = parse_broker_url("nats://requests", PATH, {"EMPTY": "", "SET": "a"})
    assert url.variable("SET") == "a"
    for name in ("EMPTY", "UNSET"):
        with pytest.raises(ConfigError, match=f"needs the environment variable {name}"):
            url.variable(name)


def test_options_are_decoded():
    url = parse_broker_url("kafka://group?topic=a%2Fb&empty=", PATH, {})
    assert url.options == {"topic": "a/b", "empty": ""}
    assert url.parts.netloc == "group"


@pytest.mark.parametrize("scheme", IMPLEMENTATIONS)
def test_each_scheme_names_a_class_that_exists(scheme):
    implementation = IMPLEMENTATIONS[scheme]
    module = importlib.import_module(f"kubeai.brokers.{implementation.module}")
    assert issubclass(getattr(module, implementation.name), Broker)


def test_url_that_cannot_be_parsed_is_refused_without_its_credentials():
    with pytest.raises(ConfigError, match="is not a valid URL") as raised:
        open_broker("nats://user:secret@[requests", PATH, {})
    assert raised.value.path == PATH
    assert "secret" not in str(raised.value)
