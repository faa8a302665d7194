"""How the supervisor distributes API keys to worker processes."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kubeai.api.api_key import ApiKey
from kubeai.api.config.system import parse_config
from kubeai.errors import ConfigError
from kubeai.routing.keys import KeyDelta, KeySnapshot
from kubeai.routing.routes import Delta, Route, Snapshot
from kubeai.supervisor import memory, supervisor
from kubeai.supervisor.checks import check_keys
from kubeai.supervisor.listeners import is_loopback
from kubeai.supervisor.supervisor import Supervisor

CONFIG = """
metricsAddr: 127.0.0.1:0
healthAddress: 127.0.0.1:0
gateway: {keys: {required: true}}
"""


class Process:
    """A worker process that keeps what it is sent."""

    alive = True
    column = 0

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)


class Operator:
    """Keeps what the supervisor gives it."""

    def __init__(self, *_, publish, publish_key, **__):
        self.publish = publish
        self.publish_key = publish_key

    def demand(self, model):
        pass


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(supervisor, "Operator", Operator)
    made = []

    def make(text=CONFIG):
        one = Supervisor(
            None, parse_config(text), namespace="n", identity="i", host="127.0.0.1", port=0
        )
        one._processes = [cast(Any, Process())]
        made.append(one)
        return one

    yield make
    for one in made:
        for worker in one._workers:
            worker.close_listener()
        one.table.close()


def key(name="a", digest=b"d" * 32, **fields):
    return ApiKey(name=name, digest=digest, tenant=name, **fields)


def test_a_worker_gets_routes_then_keys_then_each_change_in_one_sequence(make):
    one = make()
    one.operator.publish("m", Route("m", "VLLM"))
    one.operator.publish_key("a", key())
    assert one._snapshot() == ()  # nothing before everything is listed
    assert one._processes[0].sent == []
    one.synced = True
    routes, keys = one._snapshot()
    assert isinstance(routes, Snapshot)
    assert isinstance(keys, KeySnapshot)
    assert (routes.version, keys.version) == (2, 2)
    assert [each.name for each in keys.keys] == ["a"]
    one.operator.publish_key("b", key("b", b"e" * 32))
    one.operator.publish("m", None)
    one.operator.publish_key("a", None)
    one.operator.publish_key("a", None)
    assert [(type(each), each.version) for each in one._processes[0].sent] == [
        (KeyDelta, 3), (Delta, 4), (KeyDelta, 5),
    ]  # fmt: skip


def test_without_the_setting_keys_are_neither_watched_nor_sent(make):
    one = make(CONFIG.replace("true", "false"))
    assert one.operator.publish_key is None
    assert one.keys is None
    one.synced = True
    (routes,) = one._snapshot()
    assert isinstance(routes, Snapshot)


def test_a_key_beyond_the_table_is_reported_and_the_others_stay(make, monkeypatch, capsys):
    monkeypatch.setattr(memory, "KEY_ROWS", 1)
    one = make()
    one.synced = True
    one.operator.publish_key("a", key())
    one.operator.publish_key("b", key("b", b"e" * 32))
    assert list(one.keys.names()) == ["a"]
    assert len(one._processes[0].sent) == 1


def test_keys_are_refused_where_another_gateway_serves():
    with pytest.raises(ConfigError, match=r"^gateway\.keys\.required: with proxy\.mode external"):
        check_keys(parse_config(CONFIG + "proxy: {mode: external}\n"))
    check_keys(parse_config(CONFIG))
    check_keys(parse_config("proxy: {mode: external}"))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("no.such.host.invalid", False)],
)  # fmt: skip
def test_whether_an_address_is_this_machines_alone(host, expected):
    assert is_loopback(host) == expected
