"""A container's environment variables, under Kubernetes' rules. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kubeai.local.kubelet.pods.pod import (
    Container,
    EnvVar,
    Pod,
    PodError,
    ResourceFieldRef,
    quantity_nanos,
)

Data = Mapping[str, bytes]  # of a ConfigMap or Secret


def environment_references(container: Container) -> tuple[set[str], set[str]]:
    """Names of the ConfigMaps and Secrets that the container's environment refers to."""
    maps: set[str] = set()
    secrets: set[str] = set()
    for source in container.env_from:
        if source.config_map_ref:
            maps.add(source.config_map_ref.name)
        if source.secret_ref:
            secrets.add(source.secret_ref.name)
    for variable in container.env:
        if variable.value_from and variable.value_from.config_map_key_ref:
            maps.add(variable.value_from.config_map_key_ref.name)
        if variable.value_from and variable.value_from.secret_key_ref:
            secrets.add(variable.value_from.secret_key_ref.name)
    return maps, secrets


def container_environment(
    pod: Pod,
    container: Container,
    fields: Mapping[str, str],
    maps: Mapping[str, Data | None],
    secrets: Mapping[str, Data | None],
) -> dict[str, str]:
    """The environment from the manifest: envFrom, then env, with ``$(VAR)`` expanded.

    ``fields``: values of fieldRefs that are not in the manifest (status.podIP, …). ``maps`` and
    ``secrets``: the data of each referenced object, None if it does not exist. PodError if
    something that is not optional is missing.
    """
    env: dict[str, str] = {}
    for source in container.env_from:
        for kind, ref, objects in (
            ("configmap", source.config_map_ref, maps),
            ("secret", source.secret_ref, secrets),
        ):
            if ref is not None:
                data = _found(kind, ref.name, ref.optional, objects)
                env |= {source.prefix + key: _text(value) for key, value in data.items()}
    for variable in container.env:
        if variable.value_from is None:
            env[variable.name] = expand(variable.value, env)
            continue
        value = _value_from(pod, container, variable, fields, maps, secrets)
        if value is not None:
            env[variable.name] = value
    return env


def _value_from(
    pod: Pod,
    container: Container,
    variable: EnvVar,
    fields: Mapping[str, str],
    maps: Mapping[str, Data | None],
    secrets: Mapping[str, Data | None],
) -> str | None:
    source = variable.value_from
    assert source is not None
    if source.field_ref is not None:
        return _field(pod, source.field_ref.field_path, fields)
    if source.resource_field_ref is not None:
        return _resource_field(pod, container, source.resource_field_ref)
    for kind, ref, objects in (
        ("configmap", source.config_map_key_ref, maps),
        ("secret", source.secret_key_ref, secrets),
    ):
        if ref is None:
            continue
        data = _found(kind, ref.name, ref.optional, objects)
        if ref.key in data:
            return _text(data[ref.key])
        if not ref.optional:
            raise PodError(f"couldn't find key {ref.key} in {kind} {ref.name!r}")
        return None
    raise PodError(f"env {variable.name}: valueFrom has no supported source")


def _found(kind: str, name: str, optional: bool, objects: Mapping[str, Data | None]) -> Data:
    data = objects.get(name)
    if data is None and not optional:
        raise PodError(f"{kind} {name!r} not found")
    return data or {}


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _field(pod: Pod, path: str, fields: Mapping[str, str]) -> str:
    meta = pod.metadata
    match = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if match:
        return (meta.labels if match[1] == "labels" else meta.annotations).get(match[2], "")
    known = {
        "metadata.name": meta.name,
        "metadata.namespace": meta.namespace,
        "metadata.uid": meta.uid,
        "spec.nodeName": pod.spec.node_name,
        "spec.serviceAccountName": pod.spec.service_account_name,
        **fields,
    }
    if path not in known:
        raise PodError(f"fieldRef {path!r} is not supported")
    return known[path]


def _resource_field(pod: Pod, container: Container, ref: ResourceFieldRef) -> str:
    containers = (*pod.spec.containers, *pod.spec.init_containers)
    of = next((c for c in containers if c.name == ref.container_name), container)
    kind, _, name = ref.resource.partition(".")
    amounts = of.resources.limits if kind == "limits" else of.resources.requests
    if name not in amounts:
        raise PodError(f"resourceFieldRef {ref.resource!r}: container {of.name} does not set it")
    divisor = quantity_nanos(ref.divisor) or 10**9  # "0" is how Kubernetes writes the default
    return str(-(-quantity_nanos(amounts[name]) // divisor))


_REFERENCE = re.compile(r"\$(?:\$|\(([^()]*)\))")


def expand(text: str, env: Mapping[str, str]) -> str:
    """Expand ``$(VAR)``; unknown ones are kept. ``$$`` becomes ``$``, so ``$$(VAR)`` is literal."""

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        return "$" if name is None else env.get(name, match[0])

    return _REFERENCE.sub(replace, text)
