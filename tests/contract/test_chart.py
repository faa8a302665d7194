"""The Helm chart: what it renders, what it refuses, and a release from installation to its end."""

from __future__ import annotations

import asyncio
import inspect
import re
import secrets
import subprocess
from pathlib import Path

import aiohttp
import pytest
import yaml
from fakes.hub import Hub, Repository
from harness import model, until
from kubelets import Kubelet, is_ready
from operators import chart_role, documented_role
from servers import CONTROL_PLANE, ApiServer, assets, cluster

from kubeai.api.config import parse_config
from kubeai.engines import files
from kubeai.kube import MODELS, PODS, SECRETS, Kube, Resource
from kubeai.operator.adapters import Adapters
from kubeai.operator.claims import Claims
from kubeai.operator.controller import Controller
from kubeai.operator.events import Events
from kubeai.operator.leader import Leader
from kubeai.operator.operator import Operator
from kubeai.operator.scaling import Scaler

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
CHARTS = Path(__file__).parents[2] / "charts"
CHART = CHARTS / "kubeai"
HELM_TIMEOUT_S = 150
RELEASE = "release"  # the namespace of one
DEPLOYMENTS = Resource("apps", "v1", "deployments", "Deployment")
SERVICES = Resource("", "v1", "services", "Service")
ACCOUNT = "spec.serviceAccountName"
# Kinds of others, which a bare API does not have.
FOREIGN = ("PodMonitor",)
ALL_ON = {
    "replicaCount": 3,
    "secrets": {"huggingface": {"token": "t"}, "aws": {"create": False, "name": "mine"}},
    "cacheProfiles": {"fast": {"sharedFilesystem": {"storageClassName": "nfs"}}},
    "podDisruptionBudget": {"maxUnavailable": "50%"},
    "autoscaling": {"enabled": True},
    "resources": {"requests": {"cpu": 1}},
    "ingress": {"enabled": True, "className": "nginx", "tls": [{"hosts": ["a.example"]}]},
    "networkPolicy": {
        "enabled": True,
        "clients": [{"namespaceSelector": {}}],
        "monitoring": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
    },
    "metrics": {
        "prometheusOperator": {
            "vLLMPodMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "podMonitor": {"enabled": True},
        }
    },
    "imagePullSecrets": [{"name": "pull"}],
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "inference"},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/r"}},
    "service": {"type": "NodePort", "nodePort": 30080, "annotations": {"a": "b"}},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "env": [{"name": "A", "value": "b"}],
    "volumes": [{"name": "v", "emptyDir": {}}],
    "volumeMounts": [{"name": "v", "mountPath": "/v"}],
    "gateway": {"holdTimeout": "5m", "bodyMaxBytes": "128Mi"},
    "leaderElection": {"leaseDuration": "20s"},
    "messaging": {"streams": []},
    "modelServerPods": {"jsonPatches": [{"op": "add", "path": "/spec/hostNetwork", "value": True}]},
}


class Helm:
    """The program, against one API and namespace if it needs them."""

    def __init__(self, folder: Path, kubeconfig: str = "", namespace: str = "kubeai") -> None:
        binaries = assets("helm")
        if binaries is None:
            pytest.skip("KUBEBUILDER_ASSETS holds no helm")
        self._program, self._folder = str(binaries / "helm"), folder
        self._environment = {"HOME": str(folder), "KUBECONFIG": kubeconfig, "PATH": "/usr/bin:/bin"}
        self.namespace = namespace

    def __call__(self, *arguments: str, values: dict | None = None, code: int = 0) -> str:
        options = ["--namespace", self.namespace]
        if values is not None:
            file = self._folder / f"{secrets.token_hex(4)}.yaml"
            file.write_text(yaml.safe_dump(values))
            options += ["--values", str(file)]
        done = subprocess.run(
            [self._program, *arguments, *options],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=HELM_TIMEOUT_S,
        )
        print(done.stderr)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr if code else done.stdout

    def render(self, release: str, *arguments: str, values: dict | None = None) -> list[dict]:
        text = self("template", release, str(CHART), *arguments, values=values)
        return [one for one in yaml.safe_load_all(text) if one]


@pytest.fixture
def helm(tmp_path) -> Helm:
    return Helm(tmp_path)


def one(rendered: list[dict], kind: str) -> dict:
    (found,) = [obj for obj in rendered if obj["kind"] == kind]
    return found


def config_of(rendered: list[dict]) -> str:
    found = [obj for obj in rendered if obj["kind"] == "ConfigMap" and "data" in obj]
    return found[0]["data"]["system.yaml"]


# -- what it renders -------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["", *(f.name for f in sorted(CHART.glob("values-*.yaml")))])
def test_the_charts_have_nothing_to_complain_of_and_the_config_is_one(helm, values):
    options = ["--values", str(CHART / values)] if values else []
    helm("lint", str(CHART), "--strict", *options)
    config = parse_config(config_of(helm.render("kubeai", *options)))
    assert config.model_loading.image.startswith("ghcr.io/kubeai-project/kubeai:")
    assert {"cpu", "nvidia-gpu-l4", "amd-gpu-mi300x"} <= config.resource_profiles.keys()
    assert all(profile.image_name for profile in config.resource_profiles.values())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replicaCount": 0}, "/replicaCount"),
        ({"resourceProfilez": {}}, "resourceProfilez"),
        ({"modelAutoscaling": {"interval": 10}}, "/modelAutoscaling/interval"),
        ({"modelRollouts": {"surgee": 1}}, "surgee"),
        ({"gateway": {"bodyMaxBytes": "much"}}, "/gateway/bodyMaxBytes"),
        ({"service": {"type": "Elsewhere"}}, "/service/type"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
        ({"secrets": {"aws": {"create": False}}}, "secrets.aws.name must be set"),
        ({"resourceProfiles": {"cpu": {"requests": {"cpu": "one"}}}}, "/resourceProfiles/cpu/"),
    ],
)
def test_wrong_values_are_refused_by_their_path(helm, values, words):
    assert words in helm("template", "kubeai", str(CHART), values=values, code=1)


def test_names_follow_the_release_where_they_are_not_given(helm):
    values = {"fullnameOverride": ""}
    rendered = helm.render("prod", values=values)
    assert one(rendered, "Deployment")["metadata"]["name"] == "prod-kubeai"
    assert "stateConfigMapName: prod-kubeai-autoscaler-state" in config_of(rendered)
    assert (
        one(helm.render("my-kubeai", values=values), "Service")["metadata"]["name"] == "my-kubeai"
    )
    rendered = helm.render("prod", values=values | {"nameOverride": "llm"})
    assert one(rendered, "Deployment")["metadata"]["name"] == "prod-llm"
    assert one(helm.render("prod"), "Deployment")["metadata"]["name"] == "kubeai"


def test_secrets_hold_what_is_given_and_are_not_made_of_nothing(helm):
    assert [obj for obj in helm.render("kubeai") if obj["kind"] == "Secret"] == []
    given = {"aws": {"accessKeyID": "id", "secretAccessKey": "key"}, "gcp": {"name": "mine"}}
    rendered = helm.render("kubeai", values={"secrets": given})
    secret = one(rendered, "Secret")
    assert secret["metadata"]["name"] == "kubeai-aws"
    assert secret["data"].keys() == {"accessKeyID", "secretAccessKey"}
    names = parse_config(config_of(rendered)).secret_names
    assert (names.aws, names.gcp, names.huggingface) == ("kubeai-aws", "mine", "kubeai-huggingface")


def test_the_operator_may_do_nothing_by_a_wildcard_and_nothing_outside_its_namespace(helm):
    rendered = helm.render("kubeai", values=ALL_ON)
    kinds = {obj["kind"] for obj in rendered}
    assert not {"ClusterRole", "ClusterRoleBinding"} & kinds
    rules = [rule for obj in rendered if obj["kind"] == "Role" for rule in obj["rules"]]
    assert not any("*" in words for rule in rules for words in rule.values())


# What each of the operator's rights is for: a function, and the call in it.
NEEDS = {
    "models get": (Controller._patch_model, "get(MODELS"),
    "models list": (Operator._follow_models, "follow(MODELS"),
    "models watch": (Operator._follow_models, "follow(MODELS"),
    "models patch": (Scaler._scale, "patch(MODELS"),
    "models/status patch": (Controller._patch_status, "patch(MODELS"),
    # For `blockOwnerDeletion`, where OwnerReferencesPermissionEnforcement runs.
    "models/finalizers update": (files.owner_reference, "blockOwnerDeletion"),
    "pods get": (Controller._is_ours, "get(PODS"),
    "pods list": (Operator._follow_pods, "follow(PODS"),
    "pods watch": (Operator._follow_pods, "follow(PODS"),
    "pods create": (Controller._create, "create(PODS"),
    "pods patch": (Controller._annotate, "patch(PODS"),
    "pods delete": (Controller._delete, "delete(PODS"),
    "pods/exec get": (Adapters._exec, "exec("),
    "pods/exec create": (Adapters._exec, "exec("),
    "configmaps get": (Controller._ensure_files, "get(CONFIGMAPS"),
    "configmaps create": (Controller._ensure_files, "create(CONFIGMAPS"),
    "configmaps patch": (Controller._ensure_files, "patch(CONFIGMAPS"),
    "configmaps delete": (Controller._ensure_files, "delete(CONFIGMAPS"),
    "persistentvolumeclaims get": (Claims._create_claim, "get(PVCS"),
    "persistentvolumeclaims list": (Claims.run, "follow(PVCS"),
    "persistentvolumeclaims watch": (Claims.run, "follow(PVCS"),
    "persistentvolumeclaims create": (Claims._create_claim, "create(PVCS"),
    "persistentvolumeclaims patch": (Claims._annotate, "patch(PVCS"),
    "jobs get": (Claims._create_job, "get(JOBS"),
    "jobs list": (Claims.run, "follow(JOBS"),
    "jobs watch": (Claims.run, "follow(JOBS"),
    "jobs create": (Claims._create_job, "create(JOBS"),
    "jobs delete": (Claims._delete_job, "delete(JOBS"),
    "leases get": (Leader._look, "get(LEASES"),
    "leases create": (Leader._write, "create(LEASES"),
    "leases update": (Leader._write, "update(LEASES"),
    "events create": (Events._send, "create(EVENTS"),
    "events patch": (Events._send, "patch(EVENTS"),
}


def test_each_right_of_the_operator_is_needed_by_a_call_and_told_in_the_docs():
    """That they are enough the other contract tests show: on the real API they run with them."""
    rights = {
        f"{resource} {verb}"
        for rule in chart_role()
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert rights == NEEDS.keys()
    for right, (function, call) in NEEDS.items():
        source = re.sub(r"\s", "", inspect.getsource(function))
        assert call in source, right
    by_resource = lambda rules: sorted(rules, key=lambda rule: rule["resources"])  # noqa: E731
    assert by_resource(chart_role()) == by_resource(documented_role())


# -- the API takes it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> ApiServer:
    if assets(*CONTROL_PLANE, "helm") is None:
        pytest.skip("KUBEBUILDER_ASSETS holds no whole control plane, or no helm")
    accounts = [f"{RELEASE}:{name}" for name in ("kubeai", "kubeai-uninstall")]
    with cluster(tmp_path_factory.mktemp("cluster") / "servers", accounts=accounts) as server:
        yield server


@pytest.fixture
def namespace(api) -> str:
    """One in which pods that are not "restricted" are refused."""
    name = f"test-{secrets.token_hex(4)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": name, "labels": labels}
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": meta})
    assert code == 201, answer
    return name


@pytest.mark.parametrize("values", [{}, ALL_ON], ids=["default", "all-on"])
def test_the_api_accepts_every_manifest_and_its_pods_are_restricted(helm, api, namespace, values):
    rendered = helm.render("kubeai", "--namespace", namespace, values=values)
    for obj in rendered:
        if obj["kind"] in FOREIGN:
            continue
        code, answer = _try(api, namespace, obj)
        assert code == 201, (obj["kind"], answer)
        template = obj.get("spec", {}).get("template")
        if template and obj["kind"] in ("Deployment", "Job"):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            pod["metadata"] = pod["metadata"] | {"name": "p"}
            code, answer = _try(api, namespace, pod)
            assert code == 201, answer
    assert set(FOREIGN) <= {obj["kind"] for obj in rendered} or not values


def _try(api: ApiServer, namespace: str, obj: dict) -> tuple[int, dict]:
    """What the API would say to it, unknown fields and fields given twice being errors."""
    version, kind = obj["apiVersion"], obj["kind"]
    plural = {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"}.get(
        kind, f"{kind.lower()}s"
    )
    base = f"/apis/{version}" if "/" in version else f"/api/{version}"
    inside = "" if kind == "CustomResourceDefinition" else f"/namespaces/{namespace}"
    path = f"{base}{inside}/{plural}?dryRun=All&fieldValidation=Strict"
    return api.request("POST", path, obj)


# -- a release -------------------------------------------------------------------------------------


class Site:
    """A namespace, a kubelet whose processes are real, and KubeAI's releases there.

    KubeAI's pods run as the chart's account: what the role lacks it cannot do.
    """

    def __init__(self, api: ApiServer, namespace: str, folder: Path) -> None:
        self.api, self.namespace, self.folder = api, namespace, folder
        self.kubeconfig = str(api.kubeconfig(folder / "kubeconfig", namespace))
        self.helm = Helm(folder, self.kubeconfig, namespace)
        self.kube: Kube
        self._kubelet = Kubelet(
            api,
            self.kubeconfig,
            folder / "kubelet",
            f"machine-{namespace}",
            *("--label", f"belongs-to={namespace}"),
            bind=False,
        )

    async def start(self) -> None:
        await asyncio.to_thread(self._kubelet.start)
        self.kube = await Kube.connect(self.kubeconfig)
        await self.give_tokens()

    async def close(self) -> None:
        await self.kube.close()
        self._kubelet.clean_up()
        self.api.request("DELETE", f"/api/v1/nodes/{self._kubelet.node}")

    @property
    def values(self) -> dict:
        """On this machine a pod has an address of its own, but listens where it is told to."""
        here = {"belongs-to": self.namespace}
        return {
            "nodeSelector": here,
            "env": [
                {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "ACCOUNT", "valueFrom": {"fieldRef": {"fieldPath": ACCOUNT}}},
                {"name": "KUBECONFIG", "value": "/app/account/$(ACCOUNT)"},
            ],
            "args": ["--host=$(POD_IP)"],
            "volumes": [{"name": "account", "secret": {"secretName": "account"}}],
            "volumeMounts": [{"name": "account", "mountPath": "/app/account"}],
            "resourceProfiles": {"cpu": {"nodeSelector": here, "requests": {"cpu": "10m"}}},
            "cacheProfiles": {"shared": {"sharedFilesystem": {"storageClassName": RELEASE}}},
            "modelAutoscaling": {"interval": "1s", "timeWindow": "5s"},
            "gateway": {"drainAccept": "0s", "drainTimeout": "5s"},
            "terminationGracePeriodSeconds": 10,
        }

    async def install(self, values: dict | None = None) -> None:
        await asyncio.to_thread(
            self.helm,
            *("upgrade", "--install", "kubeai", str(CHART), "--wait"),
            values=self.values | (values or {}),
        )

    async def give_tokens(self) -> None:
        """What the admission plug-in for service accounts and a kubelet's projected volume do."""
        files = {}
        for account, token in self.api.accounts.items():
            server, name = self.api._replace(token=token), account.partition(":")[2]
            files[name] = server.kubeconfig(self.folder / name, self.namespace).read_text()
        await self.kube.create(SECRETS, {"metadata": {"name": "account"}, "stringData": files})

    async def _addresses(self) -> list[str]:
        """What the Service leads to: its EndpointSlices cannot hold loopback's addresses."""
        service = await self.kube.get(SERVICES, "kubeai")
        selector = ",".join(f"{key}={value}" for key, value in service["spec"]["selector"].items())
        (target,) = [port["targetPort"] for port in service["spec"]["ports"]]
        found, _ = await self.kube.list(PODS, self.namespace, labels=selector)
        return [
            f"{pod['status']['podIP']}:{port['containerPort']}"
            for pod in found
            if is_ready(pod) and "deletionTimestamp" not in pod["metadata"]
            for port in pod["spec"]["containers"][0]["ports"]
            if port["name"] == target
        ]

    def make_volume(self) -> None:
        """What a class of shared file systems would make for the claim."""
        spec = {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "10Gi"},
            "storageClassName": RELEASE,
            "hostPath": {"path": str(self.folder / "volume")},
        }
        volume = {"metadata": {"name": RELEASE}, "spec": spec}
        code, answer = self.api.request("POST", "/api/v1/persistentvolumes", volume)
        assert code == 201, answer

    async def ask(self, name: str) -> str:
        """A chat, as a client of the Service has it once the gateway knows the Model."""
        address, *_ = await until("the Service leads somewhere", self._addresses)
        endpoint = f"http://{address}/openai/v1"
        question = {"model": name, "messages": [{"role": "user", "content": "Hello!"}]}
        async with aiohttp.ClientSession() as session:

            async def known() -> bool:
                async with session.get(f"{endpoint}/models") as answer:
                    return name in [one["id"] for one in (await answer.json())["data"]]

            await until("the gateway knows the Model", known)
            chat = session.post(f"{endpoint}/chat/completions", json=question | {"max_tokens": 4})
            async with chat as answer:
                assert answer.status == 200, await answer.text()
                return (await answer.json())["choices"][0]["message"]["content"]

    def objects(self) -> dict[str, list[str]]:
        """All that is in the namespace, but for what every namespace has, and Events."""
        found: dict[str, list[str]] = {}
        for path in self._collections():
            _, answer = self.api.request("GET", path)
            for obj in answer.get("items") or ():
                if obj["metadata"]["name"] not in ("kube-root-ca.crt", "default", "account"):
                    found.setdefault(path.rsplit("/", 1)[1], []).append(obj["metadata"]["name"])
        return found

    def _collections(self) -> list[str]:
        paths = []
        _, groups = self.api.request("GET", "/apis")
        versions = [g["preferredVersion"]["groupVersion"] for g in groups["groups"]]
        for base in ("/api/v1", *(f"/apis/{version}" for version in versions)):
            _, listed = self.api.request("GET", base)
            paths += [
                f"{base}/namespaces/{self.namespace}/{r['name']}"
                for r in listed.get("resources") or ()
                if r["namespaced"] and "list" in r["verbs"] and r["name"] != "events"
            ]
        return paths


@pytest.fixture
async def site(api, tmp_path) -> Site:
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": RELEASE}})
    assert code == 201, answer
    site = Site(api, RELEASE, tmp_path)
    await site.start()
    yield site
    await site.close()


@pytest.fixture
async def hub() -> Hub:
    hub = Hub()
    await hub.start()
    yield hub
    await hub.stop()


async def test_a_release_is_installed_serves_is_upgraded_and_leaves_nothing(site, hub):
    """With Models that run, one of them from a cache that the chart's own loader has filled."""
    before = site.objects()
    site.make_volume()
    hub.repositories["mock/cached"] = Repository({"config.json": b"{}", "model.bin": b"w" * 9})
    await site.install()
    await site.kube.create(MODELS, model("m", scaleDownDelaySeconds=300))
    from_hub = {"cacheProfile": "shared", "env": {"HF_ENDPOINT": hub.url}}
    await site.kube.create(MODELS, model("cached", scaleDownDelaySeconds=300, **from_hub))
    for name in ("m", "cached"):
        assert await site.ask(name)
        await until(f"{name}'s status says so", lambda name=name: _is_settled(site, name))
    (loaded,) = site.folder.rglob("model.bin")  # a kubelet of processes has claims of its own
    assert loaded.read_bytes() == b"w" * 9
    engines = await _engines(site)
    await site.install(values={"podAnnotations": {"release": "second"}, "replicaCount": 2})
    deployment = await site.kube.get(DEPLOYMENTS, "kubeai")
    assert deployment["status"]["readyReplicas"] == 2
    assert await site.ask("m")
    assert await _engines(site) == engines, "an upgrade of KubeAI touches no engine"
    await asyncio.to_thread(site.helm, "uninstall", "kubeai", "--wait")
    gone = lambda: site.objects() == before  # noqa: E731
    await until("nothing is left", gone, 60)
    code, _ = site.api.request("GET", "/apis/kubeai.org/v1/models")
    assert code == 404, "the definition is gone, too"
    assert not loaded.exists()


async def _is_settled(site: Site, name: str) -> bool:
    found = await site.kube.get(MODELS, name)
    return found.get("status", {}).get("replicas") == {"all": 1, "ready": 1}


async def _engines(site: Site) -> list[str]:
    found, _ = await site.kube.list(PODS, site.namespace, labels="model=m")
    return sorted(pod["metadata"]["uid"] for pod in found)
