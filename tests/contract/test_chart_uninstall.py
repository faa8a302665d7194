"""`helm uninstall` keeps Models and their type, and rendered manifests delete none.

On a real API without nodes and controllers: nothing that needs a pod can finish here.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from harness import model, until
from helms import CHART, IMAGE, Helm
from kubectls import Kubectl, found

from kubeai.kube.client import Kube
from kubeai.kube.resources import CRDS, JOBS, MODELS, PVCS, SECRETS, Resource
from kubeai.operator.uninstall import reason_to_refuse

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.kubectl,
    pytest.mark.timeout(240),
    pytest.mark.parametrize("api_server", ["real"], indirect=True),
]
DEPLOYMENTS = Resource("apps", "v1", "deployments", "Deployment")
TYPE = "models.kubeai.org"
JOB = "kubeai-uninstall"
OPT_IN = ("--set", "uninstall.deleteModels=true")
REFUSED = 2
UNINSTALL = ("uninstall", "kubeai", "--timeout", "60s")
# The API has the Models' type already, from no release.
INSTALL = ("install", "kubeai", str(CHART), *IMAGE, "--take-ownership")


def of_an_hour_ago(record: dict) -> dict:
    """What an uninstall that failed then has left: the same record, apart from its time."""
    record = copy.deepcopy(record)
    for manager in record["metadata"]["managedFields"]:
        past = datetime.fromisoformat(manager["time"]) - timedelta(hours=1)
        manager["time"] = past.isoformat()
    return record


class Site:
    """A namespace with a Model and its cache's claim, and another one with a Model."""

    def __init__(self, api, namespace: str, kubeconfig: str, folder: Path) -> None:
        self.api, self.namespace, self.folder = api, namespace, folder
        self.elsewhere = f"{namespace}-elsewhere"
        self.helm = Helm(folder, kubeconfig, namespace)
        self.kubectl = Kubectl(found()["assets"], kubeconfig, folder)
        self.kubeconfig = kubeconfig
        self.kube: Kube

    async def start(self) -> None:
        meta = {"metadata": {"name": self.elsewhere}}
        code, answer = self.api.request("POST", "/api/v1/namespaces", meta)
        assert code == 201, answer
        self.kube = await Kube.connect(self.kubeconfig)
        for namespace in (self.namespace, self.elsewhere):
            await self.kube.create(MODELS, model("m"), namespace)

    async def models(self) -> int:
        found = [(await self.kube.list(MODELS, n))[0] for n in (self.namespace, self.elsewhere)]
        return sum(len(items) for items in found)

    async def job(self) -> dict | None:
        found, _ = await self.kube.list(JOBS, self.namespace)
        return next((job for job in found if job["metadata"]["name"] == JOB), None)

    async def kubeai(self, *arguments: str, kubeconfig: str, namespace: str) -> tuple[int, str]:
        """Exit code and log."""
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "kubeai", *arguments],
            env=os.environ | {"KUBECONFIG": kubeconfig, "POD_NAMESPACE": namespace},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr

    async def run_job(self) -> tuple[int, str]:
        """Run the Job's command with the Job's rights, as its pod would."""
        pod = (await self.kube.get(JOBS, JOB))["spec"]["template"]["spec"]
        account = f"/api/v1/namespaces/{self.namespace}/serviceaccounts"
        path = f"{account}/{pod['serviceAccountName']}/token"
        code, answer = self.api.request("POST", path, {"spec": {}})
        assert code == 201, answer
        server = self.api._replace(token=answer["status"]["token"])
        config = server.kubeconfig(self.folder / "account", self.namespace)
        return await self.kubeai(
            *pod["containers"][0]["args"], kubeconfig=str(config), namespace=self.namespace
        )

    async def record(self) -> dict:
        """Helm's record of the newest revision."""
        records, _ = await self.kube.list(SECRETS, self.namespace, labels="owner=helm,name=kubeai")
        return max(records, key=lambda record: int(record["metadata"]["labels"]["version"]))

    async def complete(self) -> None:
        """What the Job's controller would do once its pod has succeeded."""
        job = await self.kube.get(JOBS, JOB)
        now = job["metadata"]["creationTimestamp"]
        conditions = [
            {"type": kind, "status": "True", "lastTransitionTime": now}
            for kind in ("SuccessCriteriaMet", "Complete")
        ]
        status = {"startTime": now, "completionTime": now, "succeeded": 1, "conditions": conditions}
        await self.kube.patch(JOBS, JOB, {"status": status}, subresource="status")


@pytest.fixture
async def site(api_server, namespace, kube_api, tmp_path) -> AsyncIterator[Site]:
    if "assets" not in found():
        pytest.skip("KUBEBUILDER_ASSETS holds no kubectl")
    site = Site(api_server, namespace, kube_api, tmp_path)
    await site.start()
    yield site
    await site.kube.close()


async def test_uninstall_needs_no_pod_and_keeps_all_models_and_their_type(site):
    await asyncio.to_thread(site.helm, *INSTALL)
    assert site.helm("get", "hooks", "kubeai").strip() == "", "a hook would wait for its pod"
    await asyncio.to_thread(site.helm, "uninstall", "kubeai", "--wait")
    assert await site.models() == 2
    assert (await site.kube.list(DEPLOYMENTS, site.namespace))[0] == []
    assert json.loads(site.helm("list", "--all", "--output", "json")) == []
    await asyncio.to_thread(site.helm, "install", "kubeai", str(CHART), *IMAGE)
    # Without its type in the chart, too.
    options = ("--reuse-values", "--set", "crds.enabled=false")
    await asyncio.to_thread(site.helm, "upgrade", "kubeai", str(CHART), *options)
    assert await site.models() == 2
    kept = await site.kube.get(CRDS, TYPE)
    assert kept["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


async def test_manifests_applied_without_helm_delete_nothing(site):
    manifests = site.helm("template", "kubeai", str(CHART), *IMAGE, *OPT_IN)
    await asyncio.to_thread(site.kubectl, "apply", "-f", "-", given=manifests)
    code, log = await site.run_job()
    assert code == REFUSED, log
    assert "has no Secret for a Helm release kubeai" in log
    # Nor where there is a release of that name, which is not being uninstalled.
    await asyncio.to_thread(site.helm, *INSTALL, *OPT_IN)
    for _ in range(2):
        code, log = await site.run_job()
        assert code == REFUSED, log
        assert "Helm is not uninstalling release kubeai, its status is deployed" in log
        await asyncio.to_thread(site.helm, "upgrade", "kubeai", str(CHART), *IMAGE, *OPT_IN)
    assert await site.models() == 2


async def test_models_are_deleted_on_uninstall_if_the_values_opt_in(site):
    labels = {"app.kubernetes.io/managed-by": "kubeai"}
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    claim = {"metadata": {"name": "shared-model-cache-c", "labels": labels}, "spec": spec}
    await site.kube.create(PVCS, claim)
    await asyncio.to_thread(site.helm, *INSTALL, *OPT_IN)
    uninstalling = asyncio.create_task(asyncio.to_thread(site.helm, *UNINSTALL))
    job = await until("Helm has created the hook's Job", site.job)
    record = await site.record()
    assert reason_to_refuse("kubeai", [record], job) == ""
    assert "was created at" in reason_to_refuse("kubeai", [of_an_hour_ago(record)], job)
    code, log = await site.run_job()
    assert code == 0, log
    assert await site.models() == 1, "the other namespace's"
    claims, _ = await site.kube.list(PVCS, site.namespace)
    assert [c for c in claims if "deletionTimestamp" not in c["metadata"]] == []
    await site.complete()
    await uninstalling
    # The other namespace's, by hand.
    by_hand = {"kubeconfig": site.kubeconfig, "namespace": site.elsewhere}
    assert (await site.kubeai("uninstall", "--yes", **by_hand))[0] == 0
    assert await site.models() == 0
