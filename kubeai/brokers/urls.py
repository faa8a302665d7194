"""Opens the broker that a URL names.

The URLs are those of the Go CDK's pubsub packages (gocloud.dev/pubsub), which KubeAI in Go uses,
with the environment variables that those packages read.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import NamedTuple, cast
from urllib.parse import SplitResult, parse_qsl, urlsplit

from kubeai.brokers.base import Broker
from kubeai.errors import ConfigError, install_hint, quoted


class Implementation(NamedTuple):
    """Where a scheme is implemented, and what has to be installed for it."""

    module: str  # in kubeai.brokers
    name: str
    library: str  # the module that the extra installs
    extra: str
    repeatable: tuple[str, ...] = ()  # options that a URL may give several times


IMPLEMENTATIONS: dict[str, Implementation] = {
    "nats": Implementation("nats.broker", "Nats", "nats", "nats"),
    "kafka": Implementation("kafka.broker", "Kafka", "aiokafka", "kafka", ("topic",)),
    "rabbit": Implementation("rabbitmq", "RabbitMQ", "aio_pika", "rabbitmq"),
    "awssqs": Implementation("sqs.broker", "SQS", "aiobotocore", "sqs"),
    "gcppubsub": Implementation("pubsub.broker", "PubSub", "google.cloud.pubsub_v1", "pubsub"),
    "azuresb": Implementation("servicebus", "ServiceBus", "azure.servicebus", "servicebus"),
}
SCHEMES = ", ".join(f"{scheme}://" for scheme in IMPLEMENTATIONS)


class BrokerUrl(NamedTuple):
    """A parsed URL, where it stands in the config, and the environment."""

    text: str
    path: str  # in the config, for errors
    parts: SplitResult
    options: dict[str, str]  # the query; of a repeated option, the first value
    environment: Mapping[str, str]

    def error(self, problem: str) -> ConfigError:
        """A ConfigError about the URL. ``problem`` completes a sentence that begins with it."""
        return ConfigError(self.path, f"{quoted(public_url(self.text))} {problem}")

    def check_options(self, *known: str) -> None:
        """ConfigError if the query has an option that is not among ``known``."""
        for option in self.options:
            if option not in known:
                allowed = f"the options are {', '.join(known)}" if known else "there are no options"
                raise self.error(f"has the unknown option {option}; {allowed}")

    def values(self, option: str) -> list[str]:
        """All values of an option."""
        query = parse_qsl(self.parts.query, keep_blank_values=True)
        return [value for name, value in query if name == option]

    def variable(self, name: str) -> str:
        """The value of an environment variable; ConfigError if it is not set."""
        if value := self.environment.get(name, ""):
            return value
        raise self.error(f"needs the environment variable {name}")


def public_url(text: str) -> str:
    """A URL without user and password, for logs, errors and metrics."""
    try:
        parts = urlsplit(text)
    except ValueError:  # its error has the URL
        return f"{text.partition(':')[0]}://…"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def parse_broker_url(text: str, path: str, environment: Mapping[str, str]) -> BrokerUrl:
    """Parse a broker's URL. ConfigError if it is not one, or repeats an option that it must not."""
    try:
        parts = urlsplit(text)
    except ValueError:  # a bracket without its counterpart, for example
        raise ConfigError(path, f"{quoted(public_url(text))} is not a valid URL") from None
    options: dict[str, str] = {}
    url = BrokerUrl(text, path, parts, options, environment)
    if parts.scheme not in IMPLEMENTATIONS:
        raise url.error(f"does not begin with one of {SCHEMES}")
    for option, value in parse_qsl(parts.query, keep_blank_values=True):
        if option in options and option not in IMPLEMENTATIONS[parts.scheme].repeatable:
            raise url.error(f"gives the option {option} twice")
        options.setdefault(option, value)
    return url


def open_broker(text: str, path: str, environment: Mapping[str, str] = os.environ) -> Broker:
    """The broker that a URL names. ConfigError if the URL is invalid, or its library is missing.

    ``path``: of the URL in the config, for errors.
    """
    url = parse_broker_url(text, path, environment)
    implementation = IMPLEMENTATIONS[url.parts.scheme]
    if not _installed(implementation.library):
        raise url.error(f"needs a library; run {install_hint(implementation.extra)}")
    module = importlib.import_module(f"kubeai.brokers.{implementation.module}")
    return cast(Broker, getattr(module, implementation.name)(url))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
