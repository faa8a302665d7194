"""The two APIs that the contract tests run against: the embedded one, and a real kube-apiserver.

`kube_api` is the path of a kubeconfig whose namespace is made for the test alone; the Models CRD
is installed. The servers themselves are started once a session. The real one runs where
KUBEBUILDER_ASSETS holds etcd and kube-apiserver (see tests/cluster); it has no controllers.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import kubectls
import pytest
from helms import Helm
from operators import Nodes, World, as_operator
from servers import ApiServer, assets, embedded, install_models, real
from widgets import WIDGETS, Collection, until

from kubeai.kube.client import Kube

NO_ASSETS = "KUBEBUILDER_ASSETS holds no etcd and kube-apiserver"

# A mark skips before the fixture is asked for, so that the embedded API is not restarted each time.
REAL = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        assets("etcd", "kube-apiserver") is None,
        reason=NO_ASSETS,
    ),
]


@pytest.fixture(scope="session", params=["embedded", pytest.param("real", marks=REAL)])
def api_server(request, tmp_path_factory) -> Iterator[ApiServer]:
    """Both APIs in turn, shared by the tests of a session."""
    if request.param == "real" and assets("etcd", "kube-apiserver") is None:
        pytest.skip(NO_ASSETS)  # a module that asks for "real" itself has no such mark
    start = real if request.param == "real" else embedded
    with start(tmp_path_factory.mktemp("api") / request.param) as server:
        install_models(server)
        yield server


@pytest.fixture
def namespace(api_server: ApiServer) -> str:
    """A namespace that no other test uses."""
    name = f"test-{secrets.token_hex(4)}"
    path = "/api/v1/namespaces"
    code, answer = api_server.request("POST", path, {"metadata": {"name": name}})
    assert code == 201, answer
    return name


@pytest.fixture
def kube_api(api_server: ApiServer, namespace: str, tmp_path: Path) -> str:
    """The path of a kubeconfig for one of the two APIs."""
    return str(api_server.kubeconfig(tmp_path / "kubeconfig", namespace))


@pytest.fixture
async def world(kube_api: str, api_server: ApiServer, namespace: str, tmp_path: Path):
    """The test's namespace, whose pods become ready by themselves; no operator runs in it yet."""
    kube = await Kube.connect(kube_api)
    operator_api = as_operator(api_server, namespace)
    account = operator_api.kubeconfig(tmp_path / "account", namespace)
    world = World(kube, Nodes(kube), await Kube.connect(str(account)))
    world.operator_api = operator_api
    try:
        yield world
    finally:
        await world.close()


@pytest.fixture(scope="session")
def definition(api_server: ApiServer) -> None:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    code, answer = api_server.request("POST", path, WIDGETS)
    assert code == 201, answer
    until(lambda: api_server.request("GET", "/apis/test.kubeai.org/v1/widgets")[0] == 200)


@pytest.fixture
def widgets(definition, api_server: ApiServer, namespace: str) -> Collection:
    return Collection(api_server, f"/apis/test.kubeai.org/v1/namespaces/{namespace}/widgets")


@pytest.fixture
def pods(api_server: ApiServer, namespace: str) -> Collection:
    return Collection(api_server, f"/api/v1/namespaces/{namespace}/pods")


@pytest.fixture
def configs(api_server: ApiServer, namespace: str) -> Collection:
    return Collection(api_server, f"/api/v1/namespaces/{namespace}/configmaps")


@pytest.fixture
def jobs(api_server: ApiServer, namespace: str) -> Collection:
    return Collection(api_server, f"/apis/batch/v1/namespaces/{namespace}/jobs")


@pytest.fixture(params=["assets", "path"])
def kubectl(request, kube_api: str, tmp_path: Path) -> kubectls.Kubectl:
    programs = kubectls.found()
    if request.param not in programs:
        pytest.skip(f"no kubectl ({request.param})")
    return kubectls.Kubectl(programs[request.param], kube_api, tmp_path)


@pytest.fixture
def helm(tmp_path: Path) -> Helm:
    return Helm(tmp_path)
