"""The engine's part of a pod, as a value that each engine module fills in."""

from __future__ import annotations

from typing import Any

import msgspec

from kubeai.api.config.system import ResourceProfile, Resources

PORT = 8000
PORT_NAME = "http"
SERVER_CONTAINER = "server"
MODEL_MOUNT = "/model"  # where a claim or an image with the weights is mounted
# A failing container leaves the end of its log in the pod's status, for the Model's conditions.
TERMINATION_MESSAGE = "terminationMessagePolicy", "FallbackToLogsOnError"

Object = dict[str, Any]


class Server(msgspec.Struct, kw_only=True):
    """The engine's part of a pod. ``args`` come before the user's, ``more_args`` after them."""

    command: list[str] = []  # empty: the image's entrypoint
    args: list[str] = []
    more_args: list[str] = []
    env: dict[str, str] = {}
    pod_fields: dict[str, str] = {}  # variable → field path of the pod (downward API)
    volumes: list[Object] = []
    mounts: list[Object] = []
    startup_probe: Object
    health_path: str = "/health"


def literal(text: str) -> str:
    """Escape ``text`` for a command, argument or variable, where Kubernetes expands ``$(NAME)``."""
    return text.replace("$", "$$")


def container_resources(resources: Resources | ResourceProfile) -> dict[str, dict[str, str]]:
    """A container's requests and limits. Empty ones are left out."""
    amounts = {"requests": resources.requests, "limits": resources.limits}
    return {key: value for key, value in amounts.items() if value}


def http_probe(path: str, *, period_s: int, failures: int, timeout_s: int) -> Object:
    """An HTTP probe on the engine's port."""
    return {
        "httpGet": {"path": path, "port": PORT_NAME},
        "periodSeconds": period_s,
        "failureThreshold": failures,
        "successThreshold": 1,
        "timeoutSeconds": timeout_s,
    }


def startup_probe(*, failures: int, period_s: int = 2) -> Object:
    """The startup probe of an engine that serves /health once the model is loaded."""
    return http_probe("/health", period_s=period_s, failures=failures, timeout_s=2)
