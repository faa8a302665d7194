"""The relay's modules import each other in one direction only.

import-linter does not read compiled modules.
"""

import re

import pytest
from repository import REPOSITORY

FOLDER = REPOSITORY / "kubeai/gateway/relay"
LAYERS = [
    {"_socket", "_text"},
    {"_chunked", "_head", "_relay", "_renaming", "_usage_filter"},
    {"_request_body", "_request_head", "_response_body", "_response_head"},
    {"_exchange"},
    {"_downstream", "_early", "_pool", "_upstream"},
    {"_tunnel"},
]
IMPORT = re.compile(r"^ *from kubeai\.([\w.]+) c?import", re.MULTILINE)


def test_every_module_has_a_layer():
    modules = {path.stem for end in ("pyx", "pxd") for path in FOLDER.glob(f"*.{end}")}
    assert modules == set().union(*LAYERS)


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_a_module_imports_only_lower_layers(layer):
    allowed = {f"gateway.relay.{name}" for lower in LAYERS[:layer] for name in lower} | {
        "_clock",
        "openai._json",
    }
    for name in LAYERS[layer]:
        text = "".join(path.read_text() for path in FOLDER.glob(f"{name}.p[yx][xd]"))
        assert set(IMPORT.findall(text)) - {f"gateway.relay.{name}"} <= allowed
