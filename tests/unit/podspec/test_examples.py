"""The manifests that users copy."""

from typing import get_args

import pytest
import yaml
from repository import REPOSITORY

from kubeai.api.config.system import load_config
from kubeai.api.model import Engine, Model, decode_model
from kubeai.podspec import build_pod

MOCK = sorted((REPOSITORY / "examples").glob("*.yaml"))
REAL = sorted((REPOSITORY / "examples" / "real").glob("*.yaml"))


def models(path) -> list[Model]:
    documents = yaml.safe_load_all(path.read_text())
    return [decode_model(one) for one in documents if one["kind"] == "Model"]


@pytest.mark.parametrize("path", [*MOCK, *REAL], ids=lambda path: path.name)
def test_each_example_gives_a_pod_with_the_default_config(path):
    found = models(path)
    assert found
    for model in found:
        built = build_pod(model, load_config(None))
        assert built["spec"]["containers"]
        mock = built["metadata"]["annotations"].get("kubeai.org/mock-engine")
        assert (mock == "true") == (path in MOCK)


def test_there_is_an_example_for_each_engine():
    assert {model.spec.engine for path in REAL for model in models(path)} == set(get_args(Engine))


def test_the_table_of_the_examples_names_each_of_them():
    text = (REPOSITORY / "examples" / "real" / "README.md").read_text()
    assert [path.name for path in REAL if f"`{path.name}`" not in text] == []
