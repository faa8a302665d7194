"""Checks of the system config that concern several of its sections, and of ``--workers``.

The supervisor calls :func:`check_config` and :func:`check_workers` before it starts anything.
"""

from __future__ import annotations

import msgspec

from kubeai.api.config.system import SystemConfig
from kubeai.brokers.streams import open_streams
from kubeai.errors import ConfigError, KubeAIError
from kubeai.routing.channel import SETTINGS_MAX_BYTES

PROCESSES_MAX = 63  # workers and the messenger; the limit of `LoadTable.create`


def check_config(config: SystemConfig) -> None:
    """ConfigError if this config cannot be served."""
    check_streams(config)
    check_keys(config)
    check_settings(config)


def check_workers(workers: int, config: SystemConfig) -> None:
    """KubeAIError if there cannot be this number of worker processes."""
    workers_max = PROCESSES_MAX - bool(config.messaging.streams)
    if not 1 <= workers <= workers_max:
        raise KubeAIError(f"--workers: {workers} is not between 1 and {workers_max}")


def check_streams(config: SystemConfig) -> None:
    """ConfigError if the message streams cannot be served."""
    if config.messaging.streams and config.external:
        raise ConfigError(
            "proxy.mode",
            "external and messaging.streams exclude each other: KubeAI does not "
            "know the loads of another gateway, nor may it scale the Models; remove one of them",
        )
    open_streams(config.messaging)


def check_keys(config: SystemConfig) -> None:
    """ConfigError if keys are required where KubeAI does not serve the requests."""
    if config.gateway.keys.required and config.external:
        raise ConfigError(
            "gateway.keys.required",
            "with proxy.mode external, another gateway serves the requests and KubeAI checks no "
            "keys; remove it, and have that gateway check them",
        )


def check_settings(config: SystemConfig) -> None:
    """ConfigError if what a process gets of the config does not fit into its environment."""
    gateway = msgspec.json.encode(config.gateway)
    messaging = msgspec.json.encode(config.messaging)
    size_bytes = len(gateway) + len(messaging)
    if size_bytes > SETTINGS_MAX_BYTES:
        raise ConfigError(
            "messaging.streams" if len(messaging) > len(gateway) else "gateway",
            f"the sections gateway and messaging have {size_bytes >> 10} KiB together as JSON, at "
            f"most {SETTINGS_MAX_BYTES >> 10} KiB are possible; shorten them",
        )
