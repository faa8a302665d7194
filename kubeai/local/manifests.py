"""Read, check and apply the manifests given on the command line, as ``kubectl apply`` does.

All manifests are checked before anything starts, as strictly as kubectl's field validation: an
unknown field or a duplicate key is an error that names its location.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import yaml

from kubeai.api.config.strict import closest, repeated_keys
from kubeai.api.crd import model_crd
from kubeai.api.kubernetes_yaml import RESOLVERS
from kubeai.errors import KubeAIError
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS, JOBS, MODELS, NAMESPACES, PVCS, SECRETS, Resource

if TYPE_CHECKING:
    from kubeai.local.apiserver.schema.structural import Schema, UnknownField

SUFFIXES = (".yaml", ".yml", ".json")
FILE_MAX_BYTES = 4 << 20
PROBLEMS_MAX = 20  # invalid fields listed in one error
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
CONFLICT_RETRIES = 5

# The kinds that `kubeai local` accepts; others can be applied with kubectl.
RESOURCES: dict[tuple[str, str], Resource] = {
    (f"{r.group}/{r.version}" if r.group else r.version, r.kind): r
    for r in (MODELS, CONFIGMAPS, SECRETS, PVCS, JOBS, NAMESPACES)
}


class Manifest(NamedTuple):
    """One object of a manifest file."""

    source: str  # "file" or "file (document 2)"
    resource: Resource
    object: dict[str, Any]
    repeated: tuple[tuple[str, int], ...] = ()  # paths of duplicate keys, and their lines

    @property
    def name(self) -> str:
        """``metadata.name``, which `read_manifests` has checked to be there."""
        return str(self.object["metadata"]["name"])


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = RESOLVERS


def read_manifests(paths: Iterable[Path]) -> list[Manifest]:
    """Read all manifests of files and directories (not their subdirectories), in order.

    Raises KubeAIError, which names the location of the problem.
    """
    manifests = [manifest for path in paths for file in _files(path) for manifest in _read(file)]
    _check_fields(manifests)
    return manifests


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not files:
            raise KubeAIError(f"{path}: no manifests ({', '.join(SUFFIXES)}) in this directory")
        return files
    if not path.exists():
        raise KubeAIError(f"{path}: no such file or directory")
    return [path]


def _read(file: Path) -> Iterator[Manifest]:
    try:
        if file.stat().st_size > FILE_MAX_BYTES:
            raise KubeAIError(f"{file}: larger than {FILE_MAX_BYTES} bytes")
        documents = list(_documents(file.read_text(encoding="utf-8")))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        raise KubeAIError(f"{where}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        raise KubeAIError(f"{file}: {error}") from None
    for index, (document, repeated) in enumerate(documents, 1):
        if document is None:
            continue
        source = str(file) if len(documents) == 1 else f"{file} (document {index})"
        yield _check(source, document, repeated)


def _documents(text: str) -> Iterator[tuple[Any, tuple[tuple[str, int], ...]]]:
    """Yield each document's value, as JSON types, and its duplicate keys."""
    loader = _Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            value = loader.construct_document(node)
            value = orjson.loads(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS))
            yield value, tuple(repeated_keys(node))
    finally:
        loader.dispose()


def _check(source: str, document: Any, repeated: tuple[tuple[str, int], ...]) -> Manifest:
    if not isinstance(document, dict):
        raise KubeAIError(f"{source}: must be a mapping, not a {type(document).__name__}")
    for key in ("apiVersion", "kind"):
        if not isinstance(document.get(key), str):
            raise KubeAIError(f"{source}: {key}: missing or not a string")
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        raise KubeAIError(f"{source}: metadata.name: missing or not a string")
    resource = RESOURCES.get((document["apiVersion"], document["kind"]))
    if resource is None:
        known = ", ".join(f"{version}/{kind}" for version, kind in RESOURCES)
        raise KubeAIError(
            f"{source}: {document['apiVersion']}/{document['kind']}: must be one of {known}"
        )
    return Manifest(source, resource, document, repeated)


def _check_fields(manifests: list[Manifest]) -> None:
    """Raise an error with one line for each unknown field and duplicate key."""
    if not manifests:
        return
    schemas = _schemas()
    problems = [
        f"{manifest.source}: {manifest.resource.kind} {manifest.name}: {problem}"
        for manifest in manifests
        for problem in _problems(manifest, schemas)
    ]
    if len(problems) > PROBLEMS_MAX:
        problems[PROBLEMS_MAX:] = [f"and {len(problems) - PROBLEMS_MAX} more"]
    if problems:
        raise KubeAIError("\n".join(problems))


def _problems(manifest: Manifest, schemas: Mapping[str, Schema]) -> Iterator[str]:
    for path, line in manifest.repeated:
        yield f'duplicate field "{path}" (again on line {line})'
    obj = copy.deepcopy(manifest.object)
    unknown = schemas[manifest.resource.kind].prune_fields(obj)
    for field in schemas["ObjectMeta"].prune_fields(obj["metadata"], embedded=False):
        unknown.append(field._replace(path=("metadata", *field.path)))
    yield from map(_unknown, unknown)


def _unknown(field: UnknownField) -> str:
    from kubeai.local.apiserver.schema.structural import show_path

    *parent, name = field.path
    close = closest(str(name), field.declared)
    hint = f', did you mean "{show_path((*parent, close))}"?' if close else ""
    return f'unknown field "{show_path(field.path)}"{hint}'


def _schemas() -> dict[str, Schema]:
    """Return the schema of each accepted kind, and of ObjectMeta."""
    # Imported here because it takes 35 ms, which a start without manifests does not need.
    from kubeai.local.apiserver.kinds.resources import BUILT_IN, OBJECT_META
    from kubeai.local.apiserver.schema.structural import Schema

    schemas = {r.kind: r.schema for r in BUILT_IN if r.schema is not None}
    (version,) = model_crd()["spec"]["versions"]
    schemas[MODELS.kind] = Schema(version["schema"]["openAPIV3Schema"])
    return {**schemas, "ObjectMeta": OBJECT_META}


async def apply(client: Kube, manifest: Manifest) -> str:
    """Create the object or update it to match the manifest; fields set by others are kept.

    Returns ``created``, ``configured`` or ``unchanged``. A three-way merge on the annotation that
    ``kubectl apply`` keeps, so that both can be used on the same object.
    """
    resource, wanted = manifest.resource, json.loads(json.dumps(manifest.object))
    namespace = wanted["metadata"].get("namespace") or client.namespace
    namespace = namespace if resource.namespaced else ""
    annotations = wanted["metadata"].setdefault("annotations", {})
    annotations[LAST_APPLIED] = json.dumps(manifest.object, separators=(",", ":")) + "\n"
    for _ in range(CONFLICT_RETRIES):
        try:
            try:
                live = await client.get(resource, manifest.name, namespace)
            except ApiError as error:
                if error.status != 404:
                    raise
                await client.create(resource, wanted, namespace)
                return "created"
            last = json.loads(live["metadata"].get("annotations", {}).get(LAST_APPLIED, "{}"))
            patch = merge_patch(last, live, wanted)
            if not patch:
                return "unchanged"
            await client.patch(resource, manifest.name, patch, namespace)
            return "configured"
        except ApiError as error:
            if error.status != 409:
                raise KubeAIError(
                    f"{manifest.source}: {resource.kind} {manifest.name}: {error}"
                ) from None
    raise KubeAIError(f"{manifest.source}: {resource.kind} {manifest.name}: too many conflicts")


def merge_patch(last: Any, live: Any, wanted: Any) -> dict[str, Any]:
    """Return the JSON merge patch from ``live`` to ``wanted``; drops what only ``last`` had."""
    patch: dict[str, Any] = {key: None for key in last if key not in wanted and key in live}
    for key, value in wanted.items():
        have = live.get(key)
        if isinstance(value, dict) and isinstance(have, dict):
            before = last.get(key)
            inner = merge_patch(before if isinstance(before, dict) else {}, have, value)
            if inner:
                patch[key] = inner
        elif have != value or key not in live:
            patch[key] = value
    return patch
