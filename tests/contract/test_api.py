"""API behaviour that clients rely on, on both APIs: names, bodies, errors and discovery."""

from __future__ import annotations

import pytest
from servers import ApiServer
from widgets import Collection, until, widget

# Objects.


def test_a_created_object_has_its_metadata(widgets: Collection, namespace: str):
    made = widgets.make(widget(metadata={"labels": {"a": "b"}}))
    metadata = made["metadata"]
    assert metadata["namespace"] == namespace
    assert metadata["generation"] == 1
    assert {"uid", "creationTimestamp", "resourceVersion"} <= set(metadata)
    assert "deletionTimestamp" not in metadata
    assert widgets("GET", "w")[1]["spec"] == made["spec"]


def test_creating_an_existing_name_conflicts(widgets: Collection):
    widgets.make(widget())
    answer = widgets.refused(409, "POST", "", widget())
    assert answer["reason"] == "AlreadyExists"
    assert answer["message"] == 'widgets.test.kubeai.org "w" already exists'


def test_a_generated_name_begins_with_its_prefix(configs: Collection):
    names = {configs.make({"metadata": {"generateName": "c-"}})["metadata"]["name"] for _ in "abc"}
    assert len(names) == 3
    assert all(name.startswith("c-") and len(name) == 7 for name in names)


@pytest.mark.parametrize("name", ["Up", "a_b", "-a", "a" * 254, ""])
def test_bad_names_are_refused(configs: Collection, name: str):
    answer = configs.refused(422, "POST", "", {"metadata": {"name": name}})
    assert answer["details"]["causes"][0]["field"] == "metadata.name"


def test_missing_objects_are_not_found(widgets: Collection, api_server: ApiServer):
    for method, body in (("GET", None), ("DELETE", None), ("PATCH", {}), ("PUT", widget("none"))):
        answer = widgets.refused(404, method, "none", body)
        assert answer["reason"] == "NotFound"
        assert answer["message"] == 'widgets.test.kubeai.org "none" not found'
    path = "/api/v1/namespaces/nowhere/configmaps"
    code, answer = api_server.request("POST", path, {"metadata": {"name": "c"}})
    assert (code, answer["message"]) == (404, 'namespaces "nowhere" not found')


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/api/v1/foos", 404),
        ("GET", "/api/v1/namespaces/default/foos/x", 404),
        ("PATCH", "/api/v1/namespaces/default/pods/x/foo", 404),
        ("PUT", "/api/v1/configmaps", 405),
        ("POST", "/api/v1/namespaces/default/configmaps/x", 405),
    ],
)
def test_unserved_path_returns_status_with_details(
    api_server: ApiServer, method: str, path: str, code: int
):
    got, answer = api_server.request(method, path, {}, "application/merge-patch+json")
    assert (got, answer["kind"], answer["code"]) == (code, "Status", code)
    assert answer["details"] == {}  # kubectl dereferences it


@pytest.mark.parametrize(
    "accept", ["application/xml", "application/json;as=Foo;v=v1;g=meta.k8s.io", "text/html"]
)
def test_unsupported_media_type_is_not_acceptable(
    configs: Collection, api_server: ApiServer, accept: str
):
    for method, body in (("GET", None), ("POST", {"metadata": {"name": "c"}})):
        code, answer = api_server.request(method, configs.path, body, accept=accept)
        assert (code, answer["kind"], answer["reason"]) == (406, "Status", "NotAcceptable")
    assert configs("GET", "")[1]["items"] == []
    for path in ("/version", "/api/v1", "/apis"):
        code, answer = api_server.request("GET", path, accept="application/xml")
        assert (code, answer["reason"]) == (406, "NotAcceptable")


def test_requests_without_the_token_are_unauthorized(api_server: ApiServer):
    code, answer = api_server._replace(token="wrong").request("GET", "/api/v1/namespaces")
    assert (code, answer["reason"]) == (401, "Unauthorized")


def test_bad_bodies_are_refused(configs: Collection, api_server: ApiServer, namespace: str):
    configs.refused(400, "POST", "", [1])
    configs.refused(400, "POST", "", {"metadata": {"name": "c"}, "data": {"a": 1}})
    configs.refused(400, "POST", "", {"metadata": {"name": "c", "namespace": "other"}})
    configs.refused(400, "POST", "", {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "c"}})
    code, answer = api_server.request("POST", configs.path, {}, "text/plain")
    assert (code, answer["reason"]) == (415, "UnsupportedMediaType")


# Discovery.


def test_discovery_lists_resources(definition, api_server: ApiServer):
    listed = api_server.request("GET", "/apis/test.kubeai.org/v1")[1]["resources"]
    assert [entry["name"] for entry in listed] == ["widgets", "widgets/status", "widgets/scale"]
    assert listed[0]["shortNames"] == ["wd"]
    assert listed[2]["kind"] == "Scale"
    core = {entry["name"]: entry for entry in api_server.request("GET", "/api/v1")[1]["resources"]}
    assert {"pods", "pods/log", "pods/status", "configmaps", "secrets", "nodes"} <= set(core)
    assert core["pods"]["shortNames"] == ["po"]
    exec_ = {key: core["pods/exec"][key] for key in ("kind", "namespaced", "singularName")}
    assert exec_ == {"kind": "PodExecOptions", "namespaced": True, "singularName": ""}
    assert {"create", "get"} <= set(core["pods/exec"]["verbs"])
    groups = api_server.request("GET", "/apis")[1]["groups"]
    assert "test.kubeai.org" in [group["name"] for group in groups]


def test_aggregated_discovery_lists_a_resource_with_its_subresources(
    definition, api_server: ApiServer
):
    accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
    code, answer = api_server.request("GET", "/apis", accept=accept)
    assert (code, answer["kind"]) == (200, "APIGroupDiscoveryList")
    groups = {item["metadata"]["name"]: item for item in answer["items"]}
    (resource,) = groups["test.kubeai.org"]["versions"][0]["resources"]
    assert resource["resource"] == "widgets"
    assert resource["scope"] == "Namespaced"
    assert resource["responseKind"]["kind"] == "Widget"
    assert [sub["subresource"] for sub in resource["subresources"]] == ["status", "scale"]


def test_openapi_describes_schema_and_patch_types(definition, api_server: ApiServer):
    index = until(
        lambda: api_server.request("GET", "/openapi/v3")[1]["paths"].get("apis/test.kubeai.org/v1")
    )
    code, document = api_server.request("GET", index["serverRelativeURL"])
    assert code == 200
    path = "/apis/test.kubeai.org/v1/namespaces/{namespace}/widgets/{name}"
    patch = document["paths"][path]["patch"]
    assert "fieldValidation" in [parameter["name"] for parameter in patch["parameters"]]
    assert patch["x-kubernetes-group-version-kind"]["kind"] == "Widget"
    schemas = document["components"]["schemas"]
    (schema,) = [value for name, value in schemas.items() if name.endswith(".Widget")]
    assert schema["properties"]["spec"]["properties"]["size"]["maximum"] == 9
