"""What `kubeai local` checks and prints at start, and its config."""

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from fakes.kube import FakeKube
from structlog.testing import capture_logs

from kubeai.api.config.system import load_config
from kubeai.errors import ConfigError, KubeAIError
from kubeai.gateway.cors import CorsPolicy
from kubeai.kube.resources import MODELS, PVCS
from kubeai.local import app, from_url
from kubeai.local.engines import ENGINES, PROGRAMS, Found
from kubeai.local.manifests import Manifest

ENGINES_FOUND = [Found(e, PROGRAMS[e].title, PROGRAMS[e].install, f"/bin/{e}") for e in ENGINES]
URL = "hf://org/name"
DRAFT = from_url.draft(URL, ENGINES_FOUND)


def options(tmp_path):
    return app.Options(
        manifests=(), host="127.0.0.1", port=0, workers=1, data_dir=tmp_path, config=None,
        api_port=0, namespace="default",
    )  # fmt: skip


def manifest(resource, name):
    return Manifest("models.yaml", resource, {"metadata": {"name": name}})


def check(tmp_path, *drafts, manifests=(), volumes=None):
    app._check_drafts(options(tmp_path), drafts, manifests, volumes or {})


def test_a_model_from_a_url_has_a_name_of_its_own(tmp_path):
    check(tmp_path, DRAFT, manifests=[manifest(PVCS, "name"), manifest(MODELS, "other")])
    with pytest.raises(KubeAIError, match=r"--model hf://org/name: .* named name, like that of mo"):
        check(tmp_path, DRAFT, manifests=[manifest(MODELS, "name")])
    other = from_url.draft("hf://elsewhere/Name", ENGINES_FOUND)
    with pytest.raises(KubeAIError, match=r"named name, like that of --model hf://org/name"):
        check(tmp_path, DRAFT, other)


def test_a_claim_of_a_manifest_is_enough_for_a_model_from_it(tmp_path):
    draft = from_url.draft("pvc://weights/small", ENGINES_FOUND)
    check(tmp_path, draft, manifests=[manifest(PVCS, "weights")])
    with pytest.raises(KubeAIError, match="add --volume weights=DIR"):
        check(tmp_path, draft)


class Kube(FakeKube):
    namespace = "default"

    def __init__(self, **models):
        super().__init__()
        for name, url in models.items():
            obj = {"metadata": {"name": name}, "spec": {"url": url, "engine": "VLLM"}}
            self._keep(MODELS, obj, "ADDED")


async def test_an_existing_model_for_other_weights_is_not_overwritten():
    config = app._load_config(None)
    for kube in (Kube(), Kube(name=URL), Kube(other="hf://elsewhere/x")):
        (one,) = await app._models(kube, [DRAFT], 0, config)
        assert (one.name, one.object["spec"]["url"]) == ("name", URL)
    with pytest.raises(KubeAIError, match=r"--model hf://org/name: .*with the url hf://else"):
        await app._models(Kube(name="hf://elsewhere/name"), [DRAFT], 0, config)


def test_each_engine_is_logged_with_its_version_or_with_what_to_install():
    found = [
        Found("OLlama", "Ollama", "see there", "/usr/bin/ollama", "0.17.4", "PATH"),
        Found("VLLM", "vLLM", "pip install vllm"),
    ]
    assert app._found(app.Machine(found, 2, [])) == {
        "Ollama": "0.17.4  /usr/bin/ollama (PATH)",
        "vLLM": "not installed; to install it: pip install vllm",
        "Mock engine": "built in; for Models with image: kubeai/mock-engine",
        "GPUs": "2",
    }
    further = Found("OLlama", "Ollama", "see there", "/x/ollama", "1", "spec.env.PATH of Model m")
    fields = app._found(app.Machine([*found, further], 0, []))
    assert fields["Ollama"].endswith("; 1  /x/ollama (spec.env.PATH of Model m)")
    assert "GPUs" not in fields


def greeting(options, *drafts, models=()):
    """The log at start: event → fields."""
    supervisor = SimpleNamespace(
        keys=None,
        port=9000,
        metrics_address="127.0.0.1:9001",
        config=app._load_config(None),
        operator=SimpleNamespace(models=lambda: models),
    )
    with capture_logs() as logs:
        app._greet(options, supervisor, 9002, app.Machine([], 0, list(drafts)))
    return {log["event"]: log for log in logs}


def test_without_a_model_the_log_says_how_to_get_one(tmp_path):
    assert "--model URL" in greeting(options(tmp_path))["no Model yet"]["message"]
    assert "no Model yet" not in greeting(options(tmp_path), models=["m"])


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "127.0.0.1"),
        ("192.0.2.1", "192.0.2.1"),
        ("::1", "[::1]"),
    ],
)
def test_the_addresses_at_start_are_urls_whatever_the_host(tmp_path, host, shown):
    said = greeting(msgspec.structs.replace(options(tmp_path), host=host), DRAFT)
    assert said["serving"]["endpoint"] == f"http://{shown}:9000/openai/v1"
    assert said["serving"]["console"] == f"http://{shown}:9000/"
    assert f"http://{shown}:9000/openai/v1/" in said["first request"]["command"]


def test_a_profile_of_one_gpu_is_added_unless_the_config_has_it(tmp_path: Path):
    profiles = app._load_config(None).resource_profiles
    assert profiles["nvidia-gpu"].limits == {"nvidia.com/gpu": "1"}
    assert "cpu" in profiles
    file = tmp_path / "config.yaml"
    file.write_text("resourceProfiles: {nvidia-gpu: {limits: {nvidia.com/gpu: 2}}}")
    profiles = app._load_config(file).resource_profiles
    assert profiles["nvidia-gpu"].limits == {"nvidia.com/gpu": "2"}


def test_external_gateways_are_for_clusters(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text("proxy: {mode: external}")
    with pytest.raises(ConfigError, match=r"^proxy\.mode: external is for clusters"):
        app._load_config(file)


class Keys:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@pytest.mark.parametrize(
    ("host", "keys", "words"),
    [
        ("127.0.0.1", None, ""),
        ("::1", None, ""),
        ("localhost", None, ""),
        ("0.0.0.0", None, "anyone who can reach 0.0.0.0 can use the Models"),
        ("192.0.2.1", None, "--require-keys"),
        ("0.0.0.0", Keys(1), ""),
        ("127.0.0.1", Keys(0), "kubeai key create NAME --admin --kubeconfig"),
    ],
)
def test_who_may_use_the_models_is_said_at_start(tmp_path, capsys, host, keys, words):
    chosen = msgspec.structs.replace(options(tmp_path), host=host)
    app._advise_on_keys(chosen, SimpleNamespace(keys=keys))
    said = capsys.readouterr()
    assert (words in said.out + said.err) if words else (said.out + said.err == "")


def test_pages_from_this_machine_may_use_the_api_unless_the_config_says_otherwise(tmp_path):
    policy = CorsPolicy(load_config(None, defaults=app.LOCAL_DEFAULTS).gateway.cors_origins)
    for host in ("localhost", "127.0.0.1"):
        for origin in (f"http://{host}:3000", f"https://{host}:8443", f"http://{host}"):
            assert policy.allows(origin)
    assert not policy.allows("https://chat.example.com")
    (tmp_path / "config.yaml").write_text("gateway: {corsOrigins: []}")
    config = load_config(tmp_path / "config.yaml", defaults=app.LOCAL_DEFAULTS)
    assert config.gateway.cors_origins == ()
