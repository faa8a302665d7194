"""FasterWhisper (faster-whisper-server): speech to text."""

from __future__ import annotations

from kubeai.api.model import Model
from kubeai.api.model_url import ModelURL
from kubeai.podspec.cache import weights
from kubeai.podspec.container import Server, startup_probe

STARTUP_FAILURES = 900  # 30 minutes


def server(model: Model, url: ModelURL) -> Server:
    """The image's own server, configured by its environment."""
    return Server(
        env={"WHISPER__MODEL": weights(model, url), "ENABLE_UI": "false"},
        startup_probe=startup_probe(failures=STARTUP_FAILURES),
    )
