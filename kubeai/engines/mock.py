"""The mock engine in place of any of the four: made-up answers, real timing, no weights.

It runs only where a manifest or the config names its image, and the pod's annotation says so.
"""

from __future__ import annotations

from kubeai.api.model import Model, ModelURL
from kubeai.engines.server import PORT, Server, literal, startup_probe

IMAGE_NAME = "mock-engine"  # the last part of the image's path, whatever its registry and tag
ANNOTATION = "kubeai.org/mock-engine"
STARTUP_FAILURES = 600


def is_mock(image: str) -> bool:
    """Whether an image is the mock engine's: ``kubeai/mock-engine``, ``host/mock-engine:v1``."""
    path = image.partition("@")[0]
    return path.rpartition("/")[2].partition(":")[0] == IMAGE_NAME


def server(model: Model, url: ModelURL, played: Server) -> Server:
    """The mock that plays ``played``, with that engine's environment and the Model's args."""
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
        # Each second: the mock is for trying things out, and nobody waits for weights.
        startup_probe=startup_probe(failures=STARTUP_FAILURES, period_s=1),
    )
