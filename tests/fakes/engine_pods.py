"""Models and the pods that are built from them, for the tests of the engines' pods."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from kubeai.api.config.system import SystemConfig, parse_config
from kubeai.api.model import Engine, decode_model
from kubeai.podspec import build_pod

ENGINES = get_args(Engine)
CONFIG = SystemConfig()
URLS = {"OLlama": "ollama://gemma2:2b"}
each_engine = pytest.mark.parametrize("engine", ENGINES)


def model(engine="VLLM", annotations=None, **spec):
    return decode_model(
        {
            "metadata": {
                "name": "m",
                "namespace": "ns",
                "uid": "u-1",
                "annotations": annotations or {},
            },
            "spec": {
                "url": URLS.get(engine, "hf://org/name"),
                "engine": engine,
                "features": ["TextGeneration"],
                **spec,
            },
        }
    )


def pod(engine="VLLM", config=CONFIG, **spec):
    return build_pod(model(engine, **spec), config)


def hash_label(built):
    return built["metadata"]["labels"]["pod-hash"]


def server(built):
    (container,) = built["spec"]["containers"]
    assert container["name"] == "server"
    return container


def env(built):
    return {variable["name"]: variable.get("value") for variable in server(built)["env"]}


def patched(*patches):
    """A config whose patches apply to all pods."""
    return parse_config(msgspec.json.encode({"modelServerPods": {"jsonPatches": patches}}).decode())


def secret(name, key):
    return {"secretKeyRef": {"name": name, "key": key, "optional": True}}
