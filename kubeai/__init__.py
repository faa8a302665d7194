"""KubeAI: an OpenAI-compatible inference gateway and a model operator for Kubernetes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name):
        # Few processes need the version, and importlib.metadata takes 40 ms to import.
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        from kubeai.errors import DISTRIBUTION

        return version(DISTRIBUTION)
