"""What one engine's container is, as values: the common shape that all engine files fill in."""

from __future__ import annotations

from typing import Any

import msgspec

from kubeai.api.config import ResourceProfile, Resources

PORT = 8000
PORT_NAME = "http"
SERVER_CONTAINER = "server"
MODEL_MOUNT = "/model"  # where a claim is mounted
# A container that fails leaves the end of its log in the pod's status, for the conditions.
TERMINATION_MESSAGE = "terminationMessagePolicy", "FallbackToLogsOnError"

Object = dict[str, Any]


class Server(msgspec.Struct, kw_only=True):
    """The engine's part of a pod. ``args`` come before the user's, ``more_args`` after them."""

    command: list[str] = []  # empty: the image's own
    args: list[str] = []
    more_args: list[str] = []
    env: dict[str, str] = {}
    pod_fields: dict[str, str] = {}  # variables that take a field of the pod itself
    startup_probe: Object
    health_path: str = "/health"


def literal(text: str) -> str:
    """``text`` for a command, an argument or a variable, where Kubernetes expands ``$(NAME)``."""
    return text.replace("$", "$$")


def container_resources(resources: Resources | ResourceProfile) -> dict[str, dict[str, str]]:
    """Requests and limits as a container has them. Empty ones are left out."""
    amounts = {"requests": resources.requests, "limits": resources.limits}
    return {key: value for key, value in amounts.items() if value}


def http_probe(path: str, *, period_s: int, failures: int, timeout_s: int) -> Object:
    """A probe by HTTP on the engine's port."""
    return {
        "httpGet": {"path": path, "port": PORT_NAME},
        "periodSeconds": period_s,
        "failureThreshold": failures,
        "successThreshold": 1,
        "timeoutSeconds": timeout_s,
    }


def startup_probe(*, failures: int, period_s: int = 2) -> Object:
    """The startup probe of an engine that answers /health once the model is loaded."""
    return http_probe("/health", period_s=period_s, failures=failures, timeout_s=2)
