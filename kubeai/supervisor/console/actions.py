"""What the console does in the Kubernetes API: it reads, scales, applies and deletes Models, and
follows logs. Errors are :class:`ErrorResponse`, with the API's message. Called by app.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import yaml

from kubeai.api.config.strict import repeated_keys
from kubeai.api.kubernetes_yaml import Loader, check_structure
from kubeai.api.model import API_VERSION, KIND
from kubeai.errors import quoted
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import ACCESS_REVIEWS, MODELS
from kubeai.openai.errors import ErrorResponse
from kubeai.operator.view import ModelView
from kubeai.supervisor.console.state import Can

MANAGER = "kubeai-console"
DOCUMENTS_MAX = 100
CAN_CACHED_S = 60.0
CAN_TIMEOUT_S = 2.0
# What the API server writes in metadata. Without these, the manifest can be applied again.
_SERVER_FIELDS = (
    "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation",
    "managedFields", "resourceVersion", "selfLink", "uid",
)  # fmt: skip
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else "")


_Dumper.add_representer(str, _text)


class Actions:
    """Changes Models in one namespace. ``local``: the API is this machine's, which allows all."""

    def __init__(self, kube: Kube, namespace: str, *, local: bool) -> None:
        self._kube = kube
        self._namespace = namespace
        self._local = local
        self._can = Can(True, True, True) if local else Can()
        self._can_until_s = 0.0

    async def can(self) -> Can:
        """The changes that are allowed, as of the last minute."""
        if not self._local and time.monotonic() >= self._can_until_s:
            self._can_until_s = time.monotonic() + CAN_CACHED_S
            with contextlib.suppress(ApiError, TimeoutError):  # what was known stays
                async with asyncio.timeout(CAN_TIMEOUT_S):
                    scale, patch, create, delete = await asyncio.gather(
                        self._allows("patch", "scale"),
                        self._allows("patch"),
                        self._allows("create"),
                        self._allows("delete"),
                    )
                self._can = Can(scale, patch and create, delete)
        return self._can

    async def _allows(self, verb: str, subresource: str = "") -> bool:
        attributes = {
            "namespace": self._namespace,
            "verb": verb,
            "group": MODELS.group,
            "resource": MODELS.plural,
            "subresource": subresource,
        }
        review = {"metadata": {}, "spec": {"resourceAttributes": attributes}}
        answer = await self._kube.create(ACCESS_REVIEWS, review)
        return bool(answer.get("status", {}).get("allowed"))

    async def manifest(self, name: str) -> str:
        """A Model's manifest as YAML, as it could be applied again; empty if it cannot be read."""
        try:
            model = await self._kube.get(MODELS, name, self._namespace)
        except ApiError:
            return ""
        metadata = {k: v for k, v in model["metadata"].items() if k not in _SERVER_FIELDS}
        annotations = metadata.pop("annotations", {})
        annotations.pop(_LAST_APPLIED, None)
        if annotations:
            metadata["annotations"] = annotations
        text: str = yaml.dump(
            {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": model["spec"]},
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
        )
        return text

    async def scale(self, view: ModelView, replicas: int) -> None:
        """Set spec.replicas of a Model, within its bounds."""
        spec = view.model.spec
        if not spec.autoscaling_disabled and replicas < spec.min_replicas:
            raise _invalid(f"replicas: {replicas} is less than minReplicas ({spec.min_replicas})")
        if (
            not spec.autoscaling_disabled
            and spec.max_replicas is not None
            and replicas > spec.max_replicas
        ):
            raise _invalid(f"replicas: {replicas} is more than maxReplicas ({spec.max_replicas})")
        patch = {"spec": {"replicas": replicas}}
        try:
            await self._kube.patch(MODELS, view.name, patch, self._namespace, subresource="scale")
        except ApiError as error:
            raise refusal(error) from error

    async def apply(self, text: str) -> list[str]:
        """Apply manifests of Models, one after the other. Returns their names."""
        # In a thread: a large text takes a while.
        manifests = await asyncio.to_thread(lambda: list(self._manifests(text)))
        if not manifests:
            raise _invalid("There is no manifest.")
        applied: list[str] = []
        for manifest in manifests:
            name = manifest["metadata"]["name"]
            try:
                await self._kube.apply(MODELS, manifest, self._namespace, manager=MANAGER)
            except ApiError as error:
                done = f" Applied before it: {', '.join(applied)}." if applied else ""
                raise refusal(error, f"Model {quoted(name)}: {error}.{done}") from error
            applied.append(name)
        return applied

    async def delete(self, name: str) -> None:
        """Delete a Model."""
        try:
            await self._kube.delete(MODELS, name, self._namespace)
        except ApiError as error:
            raise refusal(error) from error

    def _manifests(self, text: str) -> Iterator[dict[str, Any]]:
        """The documents, checked to be Models of our namespace."""
        for number, value in enumerate(_documents(text), 1):
            if value is None:
                continue
            if number > DOCUMENTS_MAX:
                raise _invalid(f"There are more than {DOCUMENTS_MAX} documents.")
            where = f"document {number}"
            if not isinstance(value, dict):
                raise _invalid(f"{where}: must be a mapping")
            kind = value.get("apiVersion"), value.get("kind")
            if kind != (API_VERSION, KIND):
                raise _invalid(f"{where}: must be of kind {KIND} and apiVersion {API_VERSION}")
            metadata = value.get("metadata")
            name = metadata.get("name") if isinstance(metadata, dict) else None
            if not isinstance(metadata, dict) or not isinstance(name, str) or not name:
                raise _invalid(f"{where}: metadata.name: missing or not a string")
            namespace = metadata.get("namespace", self._namespace)
            if namespace != self._namespace:
                raise _invalid(
                    f"{where}: metadata.namespace: must be {self._namespace}, where Models are "
                    f"served, not {quoted(str(namespace))}"
                )
            yield value


def _documents(text: str) -> Iterator[Any]:
    """The values of YAML documents. A key that a map has twice is an error."""
    try:
        check_structure(text)
        for node in yaml.compose_all(text, Loader=Loader):
            for path, line in repeated_keys(node):
                raise _invalid(f"{path}: duplicate key (line {line})")
        for value in yaml.load_all(text, Loader=Loader):
            yield msgspec.to_builtins(value)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _invalid(f"{place}invalid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise _invalid(f"invalid YAML: {error}") from None


def _invalid(message: str) -> ErrorResponse:
    return ErrorResponse(message, status=422, code="invalid")


def refusal(error: ApiError, message: str = "") -> ErrorResponse:
    """The Kubernetes API's error as a response of ours."""
    message = message or str(error)
    if error.status == 404:
        return ErrorResponse(message, status=404, code="not_found")
    if error.status == 403:
        return ErrorResponse(message, status=403, code="forbidden")
    if error.status == 409:
        return ErrorResponse(message, status=409, code="conflict")
    if 400 <= error.status < 500:
        return ErrorResponse(message, status=422, code="invalid")
    return ErrorResponse(f"The Kubernetes API failed: {message}", status=502, code="bad_gateway")
