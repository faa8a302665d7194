"""Ollama: text generation and embeddings, with models from Ollama registries or from a claim."""

from __future__ import annotations

from kubeai.api.model import TARGET_REQUESTS_DEFAULT, Model
from kubeai.api.model_url import ModelURL
from kubeai.podspec.container import MODEL_MOUNT, PORT, Object, Server

PULL_TIMEOUT_S = 10_800

# Ollama pulls through its running server, so the startup probe does it. The script is the same for
# every Model. Values from the Model are passed as arguments ($1 to $4), which the shell does not
# interpret as code. `cp` gives the model its served name without copying weights. `run` with an
# empty prompt loads it into memory and generates nothing; it refuses that for an embedding model.
# The prompt is that of stdin: older versions join it with the prompt of the command line.
STARTUP_SCRIPT = """\
case "$3" in
  pull) ollama pull "$1" ;;
  pull-insecure) ollama pull --insecure "$1" ;;
esac
ollama cp "$1" "$2"
if [ "$4" = load ]; then ollama run "$2" </dev/null; fi
"""


def server(model: Model, url: ModelURL, image: str = "") -> Server:
    """``ollama serve``, which the image starts by itself."""
    env = {
        "OLLAMA_HOST": f"0.0.0.0:{PORT}",
        "OLLAMA_KEEP_ALIVE": "999999h",  # a pod has one model, which stays loaded
    }
    # Ollama reserves memory for each of these. The default is meant for engines that batch, so with
    # it, Ollama's own number applies.
    if model.spec.target_requests != TARGET_REQUESTS_DEFAULT:
        env["OLLAMA_NUM_PARALLEL"] = str(model.spec.target_requests)
    if url.scheme == "pvc":
        env["OLLAMA_MODELS"] = MODEL_MOUNT
    return Server(env=env, startup_probe=_startup_probe(model, url), health_path="/")


def _startup_probe(model: Model, url: ModelURL) -> Object:
    if url.scheme == "pvc":
        source, fetch = url.model, "present"
    else:
        source, fetch = url.ref, _fetch(url)
    load = "load" if "TextGeneration" in model.spec.features else "no-load"
    arguments = [source, model.metadata.name, fetch, load]
    return {
        "exec": {"command": ["sh", "-ec", STARTUP_SCRIPT, "startup", *arguments]},
        "initialDelaySeconds": 1,
        "periodSeconds": 3,
        "failureThreshold": 10,
        "timeoutSeconds": PULL_TIMEOUT_S,
    }


def _fetch(url: ModelURL) -> str:
    if not url.pull:
        return "present"
    return "pull-insecure" if url.insecure else "pull"
