"""URLs and variables of RabbitMQ; the rest is in tests/brokers."""

import pytest

from kubeai.brokers.urls import open_broker
from kubeai.errors import ConfigError

PATH = "messaging.streams[0].requestsURL"
SERVER = {"RABBIT_SERVER_URL": "amqp://guest:guest@127.0.0.1"}


@pytest.mark.parametrize(
    ("url", "name"),
    [("rabbit://Requests?prefetch_count=0", "Requests"), ("rabbit://a/b%20c", "a/b c")],
)
def test_host_and_path_are_the_name(url, name):
    assert open_broker(url, PATH, SERVER)._name == name


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("rabbit://", "names neither a queue nor an exchange"),
        ("rabbit://q?prefetch_count=many", "from 0 (no limit) to 65535"),
        ("rabbit://q?prefetch_count=65536", "from 0 (no limit) to 65535"),
        ("rabbit://q?key_name=", "needs a name for the option key_name"),
        ("rabbit://q?qos=1", "unknown option qos"),
    ],
)
def test_invalid_url_is_refused_with_its_path(url, part):
    with pytest.raises(ConfigError) as raised:
        open_broker(url, PATH, SERVER)
    assert str(raised.value).startswith(f"{PATH}: ")
    assert part in str(raised.value)


@pytest.mark.parametrize("server", ["http://one", "amqp://", "amqp://user:secret@one:port", ""])
def test_missing_or_invalid_server_is_named_without_credentials(server):
    with pytest.raises(ConfigError, match="RABBIT_SERVER_URL") as raised:
        open_broker("rabbit://queue", PATH, {"RABBIT_SERVER_URL": server})
    assert "secret" not in str(raised.value)
