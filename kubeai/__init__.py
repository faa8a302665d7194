"""KubeAI: an OpenAI-compatible inference gateway and a model operator for Kubernetes."""

from importlib.metadata import version

__version__ = version("kubeai")
