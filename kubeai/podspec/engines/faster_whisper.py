"""FasterWhisper: speech to text, by speaches or by faster-whisper-server, its former name.

An image is one of speaches if the last part of its path contains ``speaches``. All others are taken
for faster-whisper-server, which has its one model in a variable and answers /health only when it is
loaded. speaches loads any model of its Hugging Face cache on request, requires the name of the
model in each form, and unloads a model that is idle for 300 s. So its model is never unloaded, and
the startup probe fetches and loads it: until then the pod is not ready.
"""

from __future__ import annotations

import json

from kubeai.api.model import Model
from kubeai.api.model_url import ModelURL
from kubeai.podspec.cache import weights
from kubeai.podspec.container import PORT, Object, Server, literal, startup_probe
from kubeai.podspec.images import parse_image

STARTUP_FAILURES = 900  # 30 minutes
LOAD_TIMEOUT_S = 1800
HUB_MOUNT = "/hub"  # the Hugging Face cache for weights from a volume
_VOLUME = "hub"
_KEEP_LOADED = "-1"

# The script is the same for every Model. $1: the model's name in speaches; $2: the folder of its
# weights, if they are not on a hub. speaches knows only models in a Hugging Face cache with a model
# card, so the folder's files are linked into one. Its images have Python, but not always curl.
STARTUP_SCRIPT = """\
import os, pathlib, sys, urllib.error, urllib.parse, urllib.request
name, folder = sys.argv[1:3]
if folder:
    repository = pathlib.Path(os.environ["HF_HUB_CACHE"], "models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / "local"
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("local")
    (snapshot / "README.md").write_text(
        "---\\nlibrary_name: ctranslate2\\ntags: [automatic-speech-recognition]\\n---\\n")
    for file in pathlib.Path(folder).iterdir():
        link = snapshot / file.name
        if not link.exists():
            link.symlink_to(file)
host = os.environ["UVICORN_HOST"]
if set(host) == {"0", "."}:  # spelled like this because `kubeai local` replaces that address
    host = "127.0.0.1"
key = os.environ.get("API_KEY")
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
def ask(method, path, *fine):
    url = f"http://{host}:{os.environ['UVICORN_PORT']}{path}/{urllib.parse.quote(name)}"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        opener.open(urllib.request.Request(url, method=method, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code not in fine:
            sys.exit(f"{method} {path}: {error.code} {error.read(1000).decode(errors='replace')}")
        return error.code
    except OSError as error:
        sys.exit(f"{method} {path}: {error}")
if ask("GET", "/v1/models", 404) == 404:
    ask("POST", "/v1/models")
ask("POST", "/api/ps", 409)
"""


def is_speaches(image: str) -> bool:
    """Whether an image is one of speaches, by its name: ``ghcr.io/speaches-ai/speaches:0.8.3``."""
    return "speaches" in parse_image(image.lower()).name


def form_model(model: Model, url: ModelURL, image: str) -> str:
    """The ``model`` of a form at the engine; empty: forms must have none.

    faster-whisper-server rejects every name but that of its model. speaches needs the name.
    """
    return _speaches_name(model, url) if is_speaches(image) else ""


def server(model: Model, url: ModelURL, image: str = "") -> Server:
    """The image's own server, configured by its environment."""
    if is_speaches(image):
        return _speaches(model, url)
    return Server(
        env={"WHISPER__MODEL": weights(model, url), "ENABLE_UI": "false"},
        startup_probe=startup_probe(failures=STARTUP_FAILURES),
    )


def _speaches(model: Model, url: ModelURL) -> Server:
    name, local = _speaches_name(model, url), _is_local(model, url)
    env = {
        "ENABLE_UI": "false",
        "STT_MODEL_TTL": _KEEP_LOADED,
        "WHISPER__TTL": _KEEP_LOADED,  # its name before 0.9
        "UVICORN_HOST": "0.0.0.0",
        "UVICORN_PORT": str(PORT),
    }
    if local:
        env |= {"HF_HUB_CACHE": HUB_MOUNT, "HF_HUB_OFFLINE": "1"}
    else:
        env["PRELOAD_MODELS"] = json.dumps([literal(name)])  # from 0.9 on: fetched before it serves
    return Server(
        env=env,
        volumes=[{"name": _VOLUME, "emptyDir": {}}] if local else [],
        mounts=[{"name": _VOLUME, "mountPath": HUB_MOUNT}] if local else [],
        startup_probe=_load_probe(name, weights(model, url) if local else ""),
    )


def _is_local(model: Model, url: ModelURL) -> bool:
    return url.scheme != "hf" or bool(model.spec.cache_profile)


def _speaches_name(model: Model, url: ModelURL) -> str:
    """The model's name in speaches: that of its repository, or one of KubeAI's for a folder."""
    return f"kubeai/{model.metadata.name}" if _is_local(model, url) else url.ref


def _load_probe(name: str, folder: str) -> Object:
    # Kubernetes expands $(NAME) in the commands of probes, too.
    command = ["python3", "-c", STARTUP_SCRIPT, literal(name), folder]
    return {
        "exec": {"command": command},
        "periodSeconds": 2,
        "failureThreshold": STARTUP_FAILURES,
        "timeoutSeconds": LOAD_TIMEOUT_S,
    }
