"""The config's message streams, with their brokers.

The supervisor opens them to check the config at start, the messenger to use them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from kubeai.api.config.system import Messaging
from kubeai.brokers.base import Broker
from kubeai.brokers.urls import open_broker, public_url


class OpenStream(NamedTuple):
    """A stream of the config."""

    name: str  # the URL of its requests, without credentials
    requests: Broker
    responses: Broker
    max_handlers: int


def open_streams(
    messaging: Messaging, environment: Mapping[str, str] = os.environ
) -> list[OpenStream]:
    """Open the brokers of all streams, without I/O.

    ConfigError if a URL or the environment is invalid, or a library is missing.
    """
    return [
        OpenStream(
            public_url(stream.requests_url),
            open_broker(stream.requests_url, f"messaging.streams[{i}].requestsURL", environment),
            open_broker(stream.responses_url, f"messaging.streams[{i}].responsesURL", environment),
            stream.max_handlers,
        )
        for i, stream in enumerate(messaging.streams)
    ]
