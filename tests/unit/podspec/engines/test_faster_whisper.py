"""FasterWhisper's pods: speaches, and faster-whisper-server by the name of its image."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from fakes.engine_pods import env, model, pod, server

from kubeai.api.config.system import SystemConfig, parse_config
from kubeai.local.kubelet.pods.programs import bind_to_pod
from kubeai.podspec import form_model
from kubeai.podspec.engines.faster_whisper import STARTUP_SCRIPT, is_speaches

FORMER = "fedirz/faster-whisper-server:latest-cpu"


@pytest.mark.parametrize(
    ("image", "speaches"),
    [
        ("ghcr.io/speaches-ai/speaches:0.8.3-cpu", True),
        ("registry.example:5000/mirror/speaches", True),
        ("registry.example/our-speaches:v1@sha256:00", True),
        (FORMER, False),
        ("ghcr.io/speaches-ai/other:1", False),
        ("registry.example/whisper:speaches", False),
    ],
)
def test_the_name_of_the_image_says_whether_it_is_speaches(image, speaches):
    assert is_speaches(image) == speaches
    assert ("WHISPER__MODEL" in env(pod("FasterWhisper", image=image))) != speaches


def test_faster_whisper_server_is_configured_by_its_environment():
    built = pod("FasterWhisper", image=FORMER, args=["--x"])
    assert env(built) == {"WHISPER__MODEL": "org/name", "ENABLE_UI": "false", "HF_TOKEN": None}
    assert server(built)["args"] == ["--x"]
    claim = pod("FasterWhisper", image=FORMER, url="pvc://claim")
    assert env(claim)["WHISPER__MODEL"] == "/model"


def test_speaches_keeps_the_model_of_a_hub_loaded():
    assert env(pod("FasterWhisper")) == {
        "ENABLE_UI": "false",
        "STT_MODEL_TTL": "-1",
        "WHISPER__TTL": "-1",
        "UVICORN_HOST": "0.0.0.0",
        "UVICORN_PORT": "8000",
        "PRELOAD_MODELS": '["org/name"]',
        "HF_TOKEN": None,
    }


@pytest.mark.parametrize(
    ("spec", "folder"),
    [({"url": "pvc://claim/x"}, "/model"), ({"cacheProfile": "c"}, "/models/m-u-1")],
)
def test_speaches_loads_weights_of_a_volume_without_a_hub(spec, folder):
    config = parse_config("cacheProfiles: {c: {sharedFilesystem: {storageClassName: nfs}}}")
    built = pod("FasterWhisper", config, **spec)
    assert (env(built)["HF_HUB_OFFLINE"], env(built)["HF_HUB_CACHE"]) == ("1", "/hub")
    assert "PRELOAD_MODELS" not in env(built)
    assert {"name": "hub", "mountPath": "/hub"} in server(built)["volumeMounts"]
    probe = server(built)["startupProbe"]["exec"]["command"]
    assert probe == ["python3", "-c", STARTUP_SCRIPT, "kubeai/m", folder]


def test_the_startup_probe_waits_as_long_as_a_model_may_take():
    probe = server(pod("FasterWhisper"))["startupProbe"]
    assert probe["exec"]["command"][3:] == ["org/name", ""]
    assert (probe["periodSeconds"], probe["failureThreshold"]) == (2, 900)
    assert probe["timeoutSeconds"] == 1800


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, "org/name"),
        ({"url": "pvc://claim"}, "kubeai/m"),
        ({"image": FORMER}, ""),
        ({"image": "kubeai/mock-engine"}, ""),
        ({"resourceProfile": "missing:1"}, ""),
    ],
)
def test_forms_have_the_models_name_at_speaches_only(spec, expected):
    assert form_model(model("FasterWhisper", **spec), SystemConfig()) == expected
    assert form_model(model("VLLM"), SystemConfig()) == ""


# -- the startup probe's script --------------------------------------------------------------------


class Speaches(BaseHTTPRequestHandler):
    """Answers as speaches does: 404 for a model that is not there, 409 for one that is loaded."""

    def answer(self):
        state: dict[str, Any] = vars(self.server)["state"]
        call = f"{self.command} {self.path}"
        state["calls"].append((call, self.headers.get("Authorization")))
        status = 200
        if call == "GET /v1/models/org/name" and not state["there"]:
            status = 404
        if self.path.startswith("/api/ps/"):
            status = state["load"]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"the reason")

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def speaches():
    web: Any = HTTPServer(("127.0.0.1", 0), Speaches)
    web.state = {"calls": [], "there": False, "load": 201}
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield web
    web.shutdown()
    thread.join()
    web.server_close()


def start(web, *arguments, **more):
    environment = {
        "UVICORN_HOST": "0.0.0.0",
        "UVICORN_PORT": str(web.server_port),
        "HTTP_PROXY": "http://127.0.0.1:1",
        **more,
    }
    command = [sys.executable, "-c", STARTUP_SCRIPT, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def calls(web):
    return [call for call, _ in web.state["calls"]]


def test_the_kubelet_of_kubeai_local_leaves_the_script_alone():
    assert bind_to_pod(STARTUP_SCRIPT, "127.9.9.9") == STARTUP_SCRIPT


def test_the_probe_fetches_and_loads_the_model(speaches):
    done = start(speaches, "org/name", "", API_KEY="key")
    assert (done.returncode, done.stderr) == (0, "")
    assert calls(speaches) == [
        "GET /v1/models/org/name",
        "POST /v1/models/org/name",
        "POST /api/ps/org/name",
    ]
    assert {key for _, key in speaches.state["calls"]} == {"Bearer key"}


@pytest.mark.parametrize("status", [201, 409])
def test_a_model_that_is_there_or_loaded_is_not_fetched_again(speaches, status):
    speaches.state |= {"there": True, "load": status}
    assert start(speaches, "org/name", "").returncode == 0
    assert calls(speaches) == ["GET /v1/models/org/name", "POST /api/ps/org/name"]


def test_a_probe_that_fails_says_why(speaches):
    speaches.state["load"] = 500
    done = start(speaches, "org/name", "")
    assert done.returncode == 1
    assert "POST /api/ps: 500 the reason" in done.stderr
    speaches.server_port = 1  # nothing listens there
    assert "refused" in start(speaches, "org/name", "").stderr


def test_the_files_of_a_volume_are_linked_into_a_hugging_face_cache(speaches, tmp_path):
    folder, hub = tmp_path / "weights", tmp_path / "hub"
    folder.mkdir()
    for name in ("model.bin", "config.json", "README.md"):
        (folder / name).write_text(name)
    for _ in range(2):  # a probe may run again
        done = start(speaches, "kubeai/m", str(folder), HF_HUB_CACHE=str(hub))
        assert done.returncode == 0, done.stderr
    repository = hub / "models--kubeai--m"
    revision = (repository / "refs" / "main").read_text()
    snapshot = repository / "snapshots" / revision
    assert (snapshot / "model.bin").read_text() == "model.bin"
    card = (snapshot / "README.md").read_text()
    assert "library_name: ctranslate2" in card
    assert "automatic-speech-recognition" in card
    assert (folder / "README.md").read_text() == "README.md"
    assert json.dumps(calls(speaches)[-1]) == '"POST /api/ps/kubeai/m"'
