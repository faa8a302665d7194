"""The mock engine, in place of any engine: made-up responses, real timing, no weights.

It runs only if a manifest or the config names its image. An annotation marks its pods.
"""

from __future__ import annotations

from kubeai.api.model import Model
from kubeai.api.model_url import ModelURL
from kubeai.podspec.container import PORT, Server, literal, startup_probe
from kubeai.podspec.images import parse_image

IMAGE_NAME = "mock-engine"  # the last part of the image's path, whatever its registry and tag
ANNOTATION = "kubeai.org/mock-engine"
STARTUP_FAILURES = 600


def is_mock(image: str) -> bool:
    """Whether an image is the mock engine's: ``kubeai/mock-engine``, ``host/mock-engine:v1``."""
    return parse_image(image).name == IMAGE_NAME


def server(model: Model, url: ModelURL, played: Server) -> Server:
    """The mock of the engine ``played``, with that engine's environment and the Model's args."""
    name = model.metadata.name
    return Server(
        command=["kubeai", "mock-engine"],
        args=[
            f"--engine={model.spec.engine}",
            f"--model={literal(url.original)}",
            f"--served-model-name={name}",
            f"--port={PORT}",
        ],
        env=played.env,
        pod_fields={"POD_IP": "status.podIP"},  # where it listens
        # Every second: the mock has no weights to load, and users try things out with it.
        startup_probe=startup_probe(failures=STARTUP_FAILURES, period_s=1),
    )
