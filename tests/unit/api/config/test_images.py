"""The default images are chosen in one place, which the chart and the docs follow."""

import re
from typing import get_args

import yaml
from repository import REPOSITORY

from kubeai.api.config.images import DEFAULT_IMAGES
from kubeai.api.config.system import SystemConfig
from kubeai.api.model import Engine


def test_every_engine_has_a_default_image():
    assert set(DEFAULT_IMAGES) == set(get_args(Engine))
    config = SystemConfig()
    for engine, images in DEFAULT_IMAGES.items():
        assert config.model_servers.images(engine) == images
        assert images["default"]


def test_the_charts_images_are_the_default_ones():
    values = yaml.safe_load((REPOSITORY / "charts/kubeai/values.yaml").read_text())
    found = {engine: server["images"] for engine, server in values["modelServers"].items()}
    assert found == DEFAULT_IMAGES


def test_the_docs_list_the_default_images():
    text = (REPOSITORY / "docs/reference/configuration.md").read_text()
    table = text.split("\n## Images\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \| `([^`]+)` \|$", table, re.MULTILINE)
    found: dict[str, dict[str, str]] = {}
    for engine, names, image in rows:
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in found.setdefault(engine, {})
            found[engine][name] = image
    assert found == DEFAULT_IMAGES


def test_a_changed_section_does_not_change_the_defaults():
    SystemConfig().model_servers.images("VLLM")["default"] = "mine"
    assert SystemConfig().model_servers.images("VLLM")["default"] != "mine"
