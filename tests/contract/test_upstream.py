"""Every Model that KubeAI in Go publishes is accepted, by both APIs.

UPSTREAM names a clone of its repository (kubeai-project/kubeai). The manifests of all its releases
are read: files, documentation, and the catalogue of its chart. Skipped without it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

UPSTREAM = os.environ.get("UPSTREAM", "")
pytestmark = pytest.mark.skipif(not UPSTREAM, reason="UPSTREAM names no clone of KubeAI in Go")
FENCED = re.compile(r"^```ya?ml.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
CATALOGUES = ("charts/models/values.yaml", "charts/kubeai/charts/models/values.yaml")
PLACEHOLDERS = ("$", "<", "...")
# What upstream's own newest API refuses as well: a part of a Model, adapters on Ollama, a field
# that adapters had before their first release.
REFUSED = {
    "docs/how-to/configure-autoscaling.md",
    "hack/dev-models/kind-cpu-adapters.yaml",
    "test/e2e-manual/gke-vllm-adapters/model.yaml",
}


def git(*arguments: str) -> str:
    command = ("git", "-C", UPSTREAM, *arguments)
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def revisions() -> list[str]:
    """The releases since Models have their present form, and the newest revision."""
    tags = [tag for tag in git("tag", "--list", "v0.*").split() if minor(tag) >= 10]
    return [*tags, "HEAD"]


def minor(tag: str) -> int:
    match = re.match(r"v0\.(\d+)\.", tag)
    return int(match[1]) if match else 0


def texts() -> Iterator[tuple[str, str, str]]:
    """Place, path and text of each version of a file that may contain Models."""
    seen = set()
    for revision in revisions():
        for line in git("ls-tree", "-r", revision).splitlines():
            blob, path = line.split()[2], line.partition("\t")[2]
            if path.endswith((".yaml", ".yml", ".md")) and blob not in seen:
                seen.add(blob)
                yield f"{revision}:{path}", path, git("cat-file", "blob", blob)


def documents(path: str, text: str) -> Iterator[Any]:
    parts = FENCED.findall(text) if path.endswith(".md") else [text]
    for part in parts:
        try:
            yield from yaml.safe_load_all(part)
        except yaml.YAMLError:
            continue  # a template, or a part of a file


def models() -> dict[str, dict[str, Any]]:
    """The specs by where they were found; each only once."""
    found: dict[str, dict[str, Any]] = {}
    seen = set()

    def add(place: str, spec: Any) -> None:
        text = yaml.safe_dump(spec)
        if text not in seen and not any(mark in str(spec.get("url")) for mark in PLACEHOLDERS):
            seen.add(text)
            found[place] = spec

    for place, path, text in texts():
        for document in documents(path, text):
            if not isinstance(document, dict):
                continue
            if path in CATALOGUES:
                for name, entry in (document.get("catalog") or {}).items():
                    spec = {k: v for k, v in (entry or {}).items() if k != "enabled"}
                    add(f"{place}:{name}", spec)
            elif (document.get("apiVersion"), document.get("kind")) == ("kubeai.org/v1", "Model"):
                name = (document.get("metadata") or {}).get("name", "")
                add(f"{place}:{name}", document.get("spec") or {})
    return found


def path_of(place: str) -> str:
    return place.split(":")[1]


def test_every_published_model_is_accepted(api_server, namespace):
    path = f"/apis/kubeai.org/v1/namespaces/{namespace}/models"
    refused, accepted = {}, 0
    for number, (place, spec) in enumerate(models().items()):
        spec.pop("labels", None)
        spec.pop("annotations", None)
        metadata = {"name": f"m-{number}"}
        body = {"apiVersion": "kubeai.org/v1", "kind": "Model", "metadata": metadata, "spec": spec}
        code, answer = api_server.request("POST", f"{path}?dryRun=All", body)
        if code == 201:
            accepted += 1
        else:
            refused[place] = answer["message"]
    assert {place: why for place, why in refused.items() if path_of(place) not in REFUSED} == {}
    assert accepted > 50
