"""NATS, without and with JetStream.

URLs as of the Go CDK's natspubsub::

    nats://SUBJECT?queue=GROUP          receive as a member of a queue group
    nats://SUBJECT?natsv2               attributes are escaped in headers as the Go CDK does
    nats://SUBJECT?jetstream&queue=NAME receive from JetStream's durable consumer NAME

The server is in the environment variable NATS_SERVER_URL: one URL, or several with commas;
``tls://`` for TLS; a user and password, or a token, before the host. JetStream is KubeAI's own
addition; the Go CDK has none. So are the variables NATS_CREDS (a credentials file), NATS_CA,
NATS_CERT and NATS_KEY, which NATS's own command-line tool reads as well.

Use JetStream (``jetstream.py``) where each request matters: core NATS (``core.py``) keeps
no messages.
"""

from __future__ import annotations

import posixpath
from urllib.parse import unquote

from kubeai.brokers.base import Broker, Subscription, Topic
from kubeai.brokers.nats.connection import Connection, read_settings
from kubeai.brokers.nats.core import Backlog, CoreSubscription, CoreTopic, Headers
from kubeai.brokers.nats.jetstream import JetStreamSubscription, JetStreamTopic
from kubeai.brokers.urls import BrokerUrl

_TRUE = ("", "1", "t", "T", "true", "TRUE", "True")  # as Go parses a boolean; "" is the bare option
_FALSE = ("0", "f", "F", "false", "FALSE", "False")


class Nats(Broker):
    """A subject of a NATS server."""

    def __init__(self, url: BrokerUrl) -> None:
        url.check_options("queue", "natsv2", "jetstream", "stream")
        self._subject = _subject_of(url)
        self._queue = url.options.get("queue", "")
        self._headers = Headers(_flag(url, "natsv2"))
        self._jetstream = _flag(url, "jetstream")
        self._stream = url.options.get("stream", "")
        if self._stream and not self._jetstream:
            raise url.error("gives the option stream, which needs the option jetstream")
        for option in ("queue", "stream"):
            if set(url.options.get(option, "")) & set(" \t.*>/\\" if self._jetstream else " \t"):
                raise url.error(f"has an invalid character in the option {option}")
        self._settings = read_settings(url)
        self._backlog = Backlog()

    async def subscribe(self) -> Subscription:
        """Connect, and join the queue group or bind to the consumer."""
        connection = await Connection.open(self._settings)
        try:
            if self._jetstream:
                return await JetStreamSubscription.open(
                    connection, self._headers, self._subject, self._queue, self._stream
                )
            return await CoreSubscription.open(
                connection, self._headers, self._subject, self._queue, self._backlog
            )
        except BaseException:
            await connection.close()
            raise

    async def open_topic(self) -> Topic:
        """Connect."""
        connection = await Connection.open(self._settings)
        kind = JetStreamTopic if self._jetstream else CoreTopic
        return kind(connection, self._headers, self._subject)


def _subject_of(url: BrokerUrl) -> str:
    """The host and path, joined as Go's path.Join does."""
    host = url.parts.netloc.rpartition("@")[2]
    path = posixpath.normpath(f"{host}{url.parts.path}")
    subject = unquote(path)
    if subject in ("", ".") or any(character.isspace() for character in subject):
        raise url.error("does not name a subject (nats://SUBJECT)")
    return subject


def _flag(url: BrokerUrl, option: str) -> bool:
    text = url.options.get(option, "false")
    if text not in _TRUE + _FALSE:
        raise url.error(f"needs true or false for the option {option}")
    return text in _TRUE
