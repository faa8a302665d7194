"""What downloads weights for engines: the Jobs of a cache, and the loader of adapters."""

from __future__ import annotations

import subprocess

import pytest

from kubeai.api.config.system import parse_config
from kubeai.api.model import decode_model
from kubeai.errors import ModelError
from kubeai.podspec import build_pod, loader_commands
from kubeai.podspec.adapters import SHARED_VARIABLES, fetch_command
from kubeai.podspec.cache import claim, directory, evict_job, job_hash, load_job

CONFIG = parse_config("""
cacheProfiles:
  fast: {sharedFilesystem: {storageClassName: nfs}}
  fixed: {sharedFilesystem: {persistentVolumeName: volume-1}}
  large: {sharedFilesystem: {storageClassName: nfs, storageSize: 2048Gi}}
modelLoading: {image: loader:1}
modelServerPods:
  serviceAccountName: models
  podSecurityContext: {fsGroup: 7}
  securityContext: {runAsUser: 7}
  imagePullSecrets: [{name: pull}]
""")
FOLDER = "/models/m-u1"
ADAPTERS = [{"name": "a", "url": "hf://org/a"}]


def model(engine="VLLM", url="hf://org/name", **spec):
    spec = {"url": url, "engine": engine, "features": ["TextGeneration"], **spec}
    meta = {"name": "m", "namespace": "ns", "uid": "u1"}
    return decode_model({"metadata": meta, "spec": spec})


def containers(pod):
    return {container["name"]: container for container in pod["spec"]["containers"]}


def environment(container):
    return {
        v["name"]: v.get("value", v.get("valueFrom", {}).get("secretKeyRef"))
        for v in container["env"]
    }


# -- cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "expected", "size"),
    [
        ("fast", {"storageClassName": "nfs"}, "10Gi"),
        ("fixed", {"storageClassName": "", "volumeName": "volume-1"}, "10Gi"),
        ("large", {"storageClassName": "nfs"}, "2Ti"),
    ],
)
def test_the_claim_follows_its_cache_profile_and_has_no_owner(profile, expected, size):
    made = claim(model(cacheProfile=profile), CONFIG)
    assert made["metadata"]["name"] == f"shared-model-cache-{profile}"
    assert made["metadata"]["namespace"] == "ns"
    assert "ownerReferences" not in made["metadata"]
    assert made["spec"] == expected | {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": size}},
    }


def test_an_unknown_cache_profile_is_reported():
    with pytest.raises(ModelError, match="'none'") as caught:
        build_pod(model(cacheProfile="none"), CONFIG)
    assert (caught.value.field, caught.value.reason) == ("spec.cacheProfile", "InvalidProfile")


@pytest.mark.parametrize("profile", ["{}", "{sharedFilesystem: {storageClassName: ''}}"])
def test_an_incomplete_cache_profile_is_an_error_of_the_models_using_it(profile):
    config = parse_config(f"cacheProfiles: {{none: {profile}}}")
    with pytest.raises(ModelError, match=r"cacheProfiles\.none\.sharedFilesystem") as caught:
        build_pod(model(cacheProfile="none"), config)
    assert (caught.value.field, caught.value.reason) == ("spec.cacheProfile", "InvalidProfile")
    with pytest.raises(ModelError):
        claim(model(cacheProfile="none"), config)
    assert build_pod(model(), config)


@pytest.mark.parametrize(
    ("engine", "where"),
    [
        ("VLLM", lambda c: c["args"][0].removeprefix("--model=")),
        ("SGLang", lambda c: c["args"][0].removeprefix("--model-path=")),
        ("FasterWhisper", lambda c: c["startupProbe"]["exec"]["command"][-1]),
        ("Infinity", lambda c: environment(c)["INFINITY_MODEL_ID"]),
    ],
)
@pytest.mark.parametrize("url", ["hf://org/name", "s3://b/p", "gs://b/p", "oss://b/p"])
def test_an_engine_mounts_the_cache_read_only(engine, where, url):
    pod = build_pod(model(engine, url, cacheProfile="fast"), CONFIG)
    server = containers(pod)["server"]
    assert where(server) == directory(model()) == FOLDER
    assert "--load-format=runai_streamer" not in server.get("args", [])
    assert {
        "name": "models", "mountPath": FOLDER, "subPath": "models/m-u1", "readOnly": True,
    } in server["volumeMounts"]  # fmt: skip
    assert {
        "name": "models",
        "persistentVolumeClaim": {"claimName": "shared-model-cache-fast"},
    } in pod["spec"]["volumes"]


def test_ollama_has_no_cache():
    with pytest.raises(ModelError, match="OLlama cannot load from hf://"):
        build_pod(model("OLlama", cacheProfile="fast"), CONFIG)


@pytest.mark.parametrize(
    ("url", "variables"),
    [
        ("hf://org/name", {"HF_TOKEN"}),
        ("s3://b/p", {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}),
        ("oss://b/p", {"OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET"}),
        ("gs://b/p", {"GOOGLE_APPLICATION_CREDENTIALS"}),
    ],
)
def test_the_load_job_uses_the_credentials_for_its_url(url, variables):
    env_from = [{"secretRef": {"name": "more"}}]
    # The last two are meant for the engine, and would keep the loader from loading.
    env = {"A": "1", "HF_HUB_OFFLINE": "1", "PATH": "/opt/vllm/bin"}
    job = load_job(model(url=url, cacheProfile="fast", env=env, envFrom=env_from), CONFIG)
    assert job["metadata"]["name"] == "load-cache-m"
    assert job["metadata"]["ownerReferences"][0]["uid"] == "u1"
    assert job["spec"]["ttlSecondsAfterFinished"] == 60
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (1, 1)
    pod = job["spec"]["template"]
    assert pod["spec"]["restartPolicy"] == "OnFailure"
    loader = containers(pod)["loader"]
    assert loader["image"] == "loader:1"
    assert loader["command"] == ["load"]
    assert loader["args"] == [url, FOLDER]
    assert set(environment(loader)) == variables | {"A"}
    assert loader["envFrom"] == env_from
    assert loader["volumeMounts"][0] == {
        "name": "models", "mountPath": "/models", "subPath": "models",
    }  # fmt: skip
    names = {mount["name"] for mount in loader["volumeMounts"]}
    assert names == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_the_evict_job_removes_the_folder_and_its_staging_area_without_a_shell():
    job = evict_job(model(cacheProfile="gone"), CONFIG)
    assert job["metadata"]["name"] == "evict-cache-m"
    assert job["spec"]["ttlSecondsAfterFinished"] == 60
    assert job["spec"]["activeDeadlineSeconds"] == 900
    evictor = containers(job["spec"]["template"])["evictor"]
    assert evictor["command"] == loader_commands.remove(FOLDER, "/models/.m-u1.kubeai-load")
    (mount,) = evictor["volumeMounts"]
    assert mount == {"name": "models", "mountPath": "/models", "subPath": "models"}
    (volume,) = job["spec"]["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": "shared-model-cache-gone"}


@pytest.mark.parametrize("make", [load_job, evict_job])
def test_job_pods_are_not_replicas_and_have_the_common_pod_settings(make):
    pod = make(model(cacheProfile="fast"), CONFIG)["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert "app" not in labels  # the label that a Model's scale selects by
    assert labels["kubeai.org/job"] in ("load-cache", "evict-cache")
    spec = pod["spec"]
    assert spec["serviceAccountName"] == "models"
    assert spec["securityContext"] == {"fsGroup": 7}
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    (container,) = spec["containers"]
    assert container["securityContext"] == {"runAsUser": 7}


@pytest.mark.parametrize("make", [load_job, evict_job])
@pytest.mark.parametrize(
    ("pods", "user"),
    [
        ("{}", {"runAsUser": 0}),
        ("{securityContext: {privileged: false}}", {"runAsUser": 0, "privileged": False}),
        ("{podSecurityContext: {runAsUser: 7}}", None),
        ("{podSecurityContext: {runAsNonRoot: true}}", None),
    ],
)
def test_job_pods_run_as_root_unless_configured(make, pods, user):
    """A fresh volume belongs to root; the image's own user could not write to it."""
    config = parse_config(
        f"modelServerPods: {pods}\n"
        "cacheProfiles: {fast: {sharedFilesystem: {storageClassName: nfs}}}"
    )
    (container,) = make(model(cacheProfile="fast"), config)["spec"]["template"]["spec"][
        "containers"
    ]
    assert container.get("securityContext") == user


@pytest.mark.parametrize("make", [load_job, evict_job])
def test_job_containers_have_the_configured_resources_and_report_why_they_fail(make):
    text = "cacheProfiles: {fast: {sharedFilesystem: {storageClassName: nfs}}}\n"
    settings = "modelLoading: {resources: {requests: {cpu: 1}, limits: {memory: 2Gi}}}"
    job = make(model(cacheProfile="fast"), parse_config(text + settings))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {"requests": {"cpu": "1"}, "limits": {"memory": "2Gi"}}
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    plain = make(model(cacheProfile="fast"), parse_config(text))
    (container,) = plain["spec"]["template"]["spec"]["containers"]
    assert "resources" not in container
    assert job_hash(job) != job_hash(plain)


def test_the_adapters_loader_has_the_configured_resources():
    config = parse_config("modelLoading: {resources: {requests: {cpu: 1}}}")
    built = build_pod(model(adapters=[{"name": "a", "url": "hf://a/b"}], image="i"), config)
    loader = containers(built)["loader"]
    assert loader["resources"] == {"requests": {"cpu": "1"}}


# -- adapters ------------------------------------------------------------------------------------


def test_a_model_with_adapters_has_a_loader_container_beside_its_engine():
    pod = build_pod(model(adapters=ADAPTERS), CONFIG)
    server, loader = containers(pod).values()
    assert loader["name"] == "loader"
    assert loader["image"] == "loader:1"
    assert loader["securityContext"] == {"runAsUser": 7}
    assert {"HF_TOKEN", "AWS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_ID"} < set(environment(loader))
    assert {"name": "adapters", "mountPath": "/adapters"} in loader["volumeMounts"]
    assert {
        "name": "adapters", "mountPath": "/adapters", "readOnly": True,
    } in server["volumeMounts"]  # fmt: skip
    assert {"name": "adapters", "emptyDir": {}} in pod["spec"]["volumes"]
    assert "--enable-lora" in server["args"]
    assert environment(server)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


def test_the_loader_gets_credentials_endpoints_and_proxies_and_nothing_of_the_engine():
    ours = {
        "HF_TOKEN": "t",
        "HF_ENDPOINT": "https://hub.example",
        "HF_HUB_DISABLE_XET": "1",  # as mirrors of the hub need it
        "AWS_ENDPOINT_URL": "$(STORE)/x",
        "AWS_REGION": "eu",
        "OSS_REGION": "eu",
        "GOOGLE_APPLICATION_CREDENTIALS": "/k",
        "https_proxy": "http://proxy",
        "NO_PROXY": "*",
        "SSL_CERT_FILE": "/ca",
        "STORE": "$(HOST)",  # referred to by another
        "HOST": "https://store.example",
    }
    engines = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": "/x",
        "PATH": "/opt/vllm/bin",
        "HOME": "/root",
        "VLLM_API_KEY": "secret",
        "LD_PRELOAD": "x.so",
    }
    env_from = [{"configMapRef": {"name": "settings"}}, {"secretRef": {"name": "keys"}}]
    pod = build_pod(model(adapters=ADAPTERS, env=ours | engines, envFrom=env_from), CONFIG)
    server, loader = containers(pod).values()
    credentials = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "OSS_ACCESS_KEY_ID"}
    credentials |= {"OSS_ACCESS_KEY_SECRET"}
    credentials |= set(SHARED_VARIABLES)  # of the ConfigMap
    assert set(environment(loader)) == ours.keys() | credentials
    assert {name: environment(loader)[name] for name in ours} == ours
    assert loader["envFrom"] == env_from[1:]
    assert engines.keys() <= environment(server).keys()
    assert server["envFrom"] == env_from


def test_the_loader_gets_proxies_and_endpoints_of_config_maps():
    env_from = [
        {"configMapRef": {"name": "settings"}},
        {"configMapRef": {"name": "more", "optional": True}, "prefix": "AWS_"},
        {"configMapRef": {"name": "none"}, "prefix": "VLLM_"},
    ]
    env = {"NO_PROXY": "*"}
    pod = build_pod(model(adapters=ADAPTERS, env=env, envFrom=env_from), CONFIG)
    loader = containers(pod)["loader"]
    references = [
        (variable["name"], found["name"], found["key"], found["optional"])
        for variable in loader["env"]
        if (found := variable.get("valueFrom", {}).get("configMapKeyRef"))
    ]
    assert ("HTTPS_PROXY", "settings", "HTTPS_PROXY", True) in references
    assert ("https_proxy", "settings", "https_proxy", True) in references
    assert ("HF_ENDPOINT", "settings", "HF_ENDPOINT", True) in references
    # Later ones override earlier ones, if they have the key.
    regions = [reference for reference in references if reference[0] == "AWS_REGION"]
    assert regions == [
        ("AWS_REGION", "settings", "AWS_REGION", True),
        ("AWS_REGION", "more", "REGION", True),
    ]
    # A variable of the Model overrides those of ConfigMaps.
    assert "NO_PROXY" not in {name for name, *_ in references}
    assert {place for _, place, *_ in references} == {"settings", "more"}
    assert not {"PATH", "HF_HUB_OFFLINE", "HF_TOKEN", "SSL_CERT_FILE"} & set(SHARED_VARIABLES)


CLAIMS = [
    {"name": "law", "url": "pvc://loras/law/v2/"},
    {"name": "fin", "url": "pvc://loras/fin"},
    {"name": "own", "url": "pvc://a.claim"},
]


def test_adapters_on_claims_are_mounted_read_only_and_linked_where_the_engine_looks():
    pod = build_pod(model(adapters=[*CLAIMS, *ADAPTERS]), CONFIG)
    mounts = [
        {"name": "adapter-claim-0", "mountPath": "/adapter-claims/a.claim", "readOnly": True},
        {"name": "adapter-claim-1", "mountPath": "/adapter-claims/loras", "readOnly": True},
    ]
    for container in containers(pod).values():
        found = [m for m in container["volumeMounts"] if m["name"].startswith("adapter-claim")]
        assert found == mounts
    volumes = {v["name"]: v.get("persistentVolumeClaim") for v in pod["spec"]["volumes"]}
    assert volumes["adapter-claim-0"] == {"claimName": "a.claim"}
    assert volumes["adapter-claim-1"] == {"claimName": "loras"}
    *_, place, folder = fetch_command("law", "pvc://loras/law/v2/")
    assert (place, folder) == ("/adapter-claims/loras/law/v2", "/adapters/law")
    assert fetch_command("own", "pvc://a.claim")[-2] == "/adapter-claims/a.claim"


def test_only_the_claims_of_adapters_change_the_pods():
    def built(*adapters):
        return build_pod(model(adapters=[*ADAPTERS, *adapters]), CONFIG)

    law, fin, own = CLAIMS
    assert built(law) == built(law, fin) == built(fin)
    assert built(law) != built(law, own)
    assert built(law) != built()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("pvc://claim/../x", "must not contain"),
        ("pvc://No_Claim/x", "not a valid PersistentVolumeClaim name"),
        ("pvc://claim/x?model=y", "does not support 'model'"),
    ],
)
def test_an_adapter_that_cannot_be_mounted_is_named(url, why):
    with pytest.raises(ModelError, match=why) as caught:
        build_pod(model(adapters=[*ADAPTERS, {"name": "b", "url": url}]), CONFIG)
    assert caught.value.field == "spec.adapters[1].url"


def test_an_adapters_link_leads_to_its_folder_and_needs_one(tmp_path):
    (tmp_path / "there").mkdir()

    def link(place):
        command = fetch_command("a", "pvc://claim/x")[:-2]
        paths = [str(tmp_path / place), str(tmp_path / f"{place}-link")]
        return subprocess.run([*command, *paths], capture_output=True, text=True, check=False)

    assert link("there").returncode == 0
    assert (tmp_path / "there-link").resolve() == tmp_path / "there"
    failed = link("missing")
    assert failed.returncode == 1
    assert "missing is not a folder of the claim" in failed.stderr
    assert not (tmp_path / "missing-link").is_symlink()


def test_the_list_of_adapters_does_not_change_the_pods():
    more = [*ADAPTERS, {"name": "b", "url": "s3://b/p"}]
    assert build_pod(model(adapters=ADAPTERS), CONFIG) == build_pod(model(adapters=more), CONFIG)


def test_every_mount_has_one_volume():
    spec = {"url": "gs://b/p", "cacheProfile": "fast", "adapters": ADAPTERS}
    pod = build_pod(model(**spec), CONFIG)
    names = [volume["name"] for volume in pod["spec"]["volumes"]]
    assert len(names) == len(set(names))
    for container in pod["spec"]["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(names)
