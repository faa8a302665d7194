"""The chart in place of KubeAI in Go's: its running pods keep their permissions until they end.

On a real API without nodes and controllers.
"""

from __future__ import annotations

import asyncio

import pytest
from helms import CHART, IMAGE, Helm

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import Resource

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(240),
    pytest.mark.parametrize("api_server", ["real"], indirect=True),
]
ROLES = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role")
BINDINGS = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")
MODELS_RULE = {"apiGroups": ["kubeai.org"], "resources": ["models"], "verbs": ["get", "update"]}
EXEC_RULE = {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["*"]}


async def test_pods_of_kubeai_in_go_keep_their_permissions_until_the_next_upgrade(
    namespace, kube_api, tmp_path
):
    helm, kube = Helm(tmp_path, kube_api, namespace), await Kube.connect(kube_api)
    try:
        rules = [MODELS_RULE, EXEC_RULE]
        await kube.create(ROLES, {"metadata": {"name": "kubeai"}, "rules": rules})
        command = ("upgrade", "--install", "kubeai", str(CHART), *IMAGE, "--take-ownership")
        await asyncio.to_thread(helm, *command)
        assert (await kube.get(ROLES, "kubeai-in-go"))["rules"] == rules
        binding = await kube.get(BINDINGS, "kubeai-in-go")
        assert binding["subjects"][0]["name"] == "kubeai"
        assert MODELS_RULE not in (await kube.get(ROLES, "kubeai"))["rules"]
        await asyncio.to_thread(helm, *command)
        for resource in (ROLES, BINDINGS):
            with pytest.raises(ApiError, match="not found"):
                await kube.get(resource, "kubeai-in-go")
    finally:
        await kube.close()
