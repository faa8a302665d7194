"""Credentials files of NATS: a real server with operators, accounts and users."""

import base64
import json
import os
import time
from typing import Any

import nkeys
import pytest
from brokers.servers.nats import NatsServer
from brokers.subscriptions import CONFIG_PATH, receive, subscribed, topic_of

from kubeai.brokers.base import BrokerUnavailable
from kubeai.brokers.urls import open_broker

pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]


def signed_token(
    issuer: nkeys.KeyPair, subject: nkeys.KeyPair, kind: str, payload_max_bytes: int = -1
) -> str:
    """A JWT of NATS's decentralised authentication."""
    rights: dict[str, Any] = {"type": kind, "version": 2}
    if kind == "user":
        rights |= {"subs": -1, "data": -1, "payload": payload_max_bytes}
    elif kind == "account":
        names = ("subs", "data", "payload", "conn", "leaf", "imports", "exports")
        rights["limits"] = dict.fromkeys(names, -1) | {"wildcards": True}
    claims = {
        "jti": kind,
        "iat": int(time.time()),
        "iss": issuer.public_key.decode(),
        "sub": subject.public_key.decode(),
        "name": kind,
        "nats": rights,
    }
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims)
    ]
    signature = base64.urlsafe_b64encode(issuer.sign(".".join(parts).encode())).decode()
    return ".".join((*parts, signature.rstrip("=")))


@pytest.fixture
def operated(tmp_path):
    """A server with decentralised authentication, and a function that makes credentials files."""
    operator, account = (
        nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix)))
        for prefix in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT)
    )
    server = NatsServer(
        tmp_path,
        jetstream=False,
        operator=signed_token(operator, operator, "operator"),
        resolver="MEMORY",
        resolver_preload={account.public_key.decode(): signed_token(operator, account, "account")},
    )

    def credentials(payload_max_bytes: int = -1) -> dict[str, str]:
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        token = signed_token(account, nkeys.from_seed(bytearray(seed)), "user", payload_max_bytes)
        file = tmp_path / f"user{payload_max_bytes}.creds"
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed.decode()}\n------END USER NKEY SEED------\n"
        )
        return server.environment | {"NATS_CREDS": str(file)}

    server.start()
    yield server, credentials
    server.kill()


class TestCredentialsFiles:
    async def test_file_is_used(self, operated):
        server, credentials = operated
        with pytest.raises(BrokerUnavailable, match=r"(?i)authorization violation"):
            await open_broker("nats://s", CONFIG_PATH, server.environment).open_topic()
        environment = credentials()
        async with (
            subscribed("nats://s", environment) as subscription,
            topic_of("nats://s", environment) as topic,
        ):
            await topic.publish(b"{}", {})
            assert (await receive(subscription, 1))[0].body == b"{}"

    async def test_message_that_the_server_refuses_is_not_confirmed(self, operated):
        """The PING of nats-py's flush overtakes the message."""
        _, credentials = operated
        async with topic_of("nats://s", credentials(payload_max_bytes=10)) as topic:
            await topic.publish(b"x" * 10, {})
            with pytest.raises(BrokerUnavailable, match=r"(?i)payload|connection"):
                await topic.publish(b"x" * 11, {})
