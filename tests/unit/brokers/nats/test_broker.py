"""URLs, variables and headers of NATS; the rest is in tests/brokers."""

import pytest
from nats.aio.msg import Msg

from kubeai.brokers.nats.broker import Nats
from kubeai.brokers.nats.connection import read_settings
from kubeai.brokers.nats.core import Headers
from kubeai.brokers.urls import open_broker, parse_broker_url
from kubeai.errors import ConfigError

PATH = "messaging.streams[0].requestsURL"
SERVER = {"NATS_SERVER_URL": "nats://127.0.0.1"}


def settings(**environment: str):
    return read_settings(parse_broker_url("nats://subject", PATH, environment))


@pytest.mark.parametrize(
    ("url", "subject"),
    [
        ("nats://requests", "requests"),
        ("nats://My.Requests.*?queue=q", "My.Requests.*"),
        ("nats://a/b//c/", "a/b/c"),
        ("nats://a.%3E", "a.>"),
    ],
)
def test_host_and_path_are_the_subject(url, subject):
    assert Nats(parse_broker_url(url, PATH, SERVER))._subject == subject


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("nats://", "does not name a subject"),
        ("nats://a%20b", "does not name a subject"),
        ("nats://a?jetstream&queue=a.b", "invalid character in the option queue"),
        ("nats://a?jetstream&stream=a%20b", "invalid character in the option stream"),
        ("nats://a?queue=a%20b", "invalid character in the option queue"),
        ("nats://a?natsv2=yes", "needs true or false for the option natsv2"),
        ("nats://a?stream=S", "which needs the option jetstream"),
        ("nats://a?durable=S", "unknown option durable"),
    ],
)
def test_invalid_url_is_refused_with_its_path(url, part):
    with pytest.raises(ConfigError) as raised:
        open_broker(url, PATH, SERVER)
    assert str(raised.value).startswith(f"{PATH}: ")
    assert part in str(raised.value)


def test_missing_server_is_named():
    with pytest.raises(ConfigError, match="NATS_SERVER_URL"):
        open_broker("nats://subject", PATH, {})


def test_several_servers_and_their_login_are_read():
    found = settings(NATS_SERVER_URL="nats://us%40er:p%2Fw@one:4333, two,tls://[::1]")
    assert found.servers == ["nats://one:4333", "nats://two:4222", "tls://[::1]:4222"]
    assert (found.user, found.password, found.token) == ("us@er", "p/w", "")


def test_user_without_a_password_is_a_token():
    found = settings(NATS_SERVER_URL="nats://secret@one")
    assert (found.user, found.password, found.token) == ("", "", "secret")


@pytest.mark.parametrize(
    "url", ["http://one", "nats://", "nats://user:secret@one:port", "nats://:4"]
)
def test_invalid_server_is_refused_without_its_credentials(url):
    with pytest.raises(ConfigError, match="NATS_SERVER_URL") as raised:
        settings(NATS_SERVER_URL=url)
    assert "secret" not in str(raised.value)


def test_client_certificate_needs_its_key():
    with pytest.raises(ConfigError, match="NATS_KEY"):
        settings(NATS_SERVER_URL="nats://one", NATS_CERT="/cert.pem")


def test_go_headers_are_escaped_and_plain_ones_are_not():
    attributes = {"a key": "1 + 1: é"}
    assert Headers(go=True).encode(attributes) == {"a+key": "1+%2B+1%3A+%C3%A9"}
    assert Headers(go=False).encode(attributes) == attributes
    for headers in (Headers(go=True), Headers(go=False)):
        message = Msg(None, data=b"{}", headers=headers.encode(attributes))
        assert headers.decode(message) == (attributes, b"{}")
