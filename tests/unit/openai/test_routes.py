"""Which paths and methods are served."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.openai.request import SHAPES
from kubeai.openai.routes import Kind, classify, path_template, route_table

INFERENCE = [kind for kind in Kind if kind.is_json or kind.is_form]
LISTS = [Kind.MODELS, Kind.OLLAMA_TAGS, Kind.OLLAMA_PS, Kind.OLLAMA_VERSION]


@pytest.mark.parametrize("kind", [*INFERENCE, Kind.OLLAMA_SHOW])
@pytest.mark.parametrize("base", ["/openai", ""])
def test_inference_routes_accept_only_post(base, kind):
    target = classify("POST", f"{base}{kind.value}")
    assert (target.status, target.kind) == (200, kind)
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "post", "PATCH", "CONNECT", ""):
        assert classify(method, f"{base}{kind.value}") == (405, None, "", None, ("POST",))


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("base", ["/openai", ""])
def test_lists_are_read_only(base, kind):
    for method in ("GET", "HEAD"):
        assert classify(method, f"{base}{kind.value}").kind is kind
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert classify(method, f"{base}{kind.value}") == (405, None, "", None, ("GET", "HEAD"))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/rerank", Kind.RERANK),
        ("/v2/rerank", Kind.RERANK),
        ("/score", Kind.SCORE),
        ("/v1/generative_scoring", Kind.GENERATIVE_SCORING),
        ("/v1/pooling", Kind.POOLING),
        ("/v1/classify", Kind.CLASSIFY),
        ("/v1/tokenize", Kind.TOKENIZE),
        ("/v1/detokenize", Kind.DETOKENIZE),
    ],
)
def test_a_route_may_have_further_paths(path, kind):
    assert classify("POST", path) == (200, kind, "", None, ())
    assert classify("POST", "/openai" + path).kind is kind


def test_each_route_is_of_one_sort():
    for kind in Kind:
        sorts = [kind.is_local, kind.is_form, kind.is_json, kind.is_stored, kind is Kind.REALTIME]
        assert sum(sorts) == 1, kind
    assert {kind for kind in Kind if kind.is_json} | {Kind.IMAGE_EDITS} == set(SHAPES)
    assert classify("GET", "/v1/realtime?model=m") == (200, Kind.REALTIME, "model=m", None, ())
    assert classify("POST", "/v1/realtime").allow == ("GET",)


@pytest.mark.parametrize("base", ["/openai/v1", "/v1"])
def test_stored_responses_are_read_and_cancelled_by_their_id(base):
    found = classify("GET", f"{base}/responses/resp_a-1?stream=true")
    assert found == (200, Kind.STORED_RESPONSE, "stream=true", "resp_a-1", ())
    found = classify("POST", f"http://h{base}/responses/resp_a-1/cancel")
    assert found == (200, Kind.CANCEL_RESPONSE, "", "resp_a-1", ())
    for method in ("POST", "DELETE", "PUT", "HEAD"):
        assert classify(method, f"{base}/responses/resp_1").allow == ("GET",)
    assert classify("GET", f"{base}/responses/resp_1/cancel").allow == ("POST",)


def test_the_id_of_a_response_is_no_part_of_the_paths_template():
    assert path_template("/v1/responses/resp_v1/cancel") == "/v1/responses/{id}/cancel"
    assert path_template("/openai/v1/responses/resp_a") == "/openai/v1/responses/{id}"
    assert path_template("/v1/chat/completions") == "/v1/chat/completions"


@pytest.mark.parametrize(
    "id",
    [
        "",
        "render",
        "resp_",
        "resp_a/b",
        "resp_a.b",
        "..",
        "resp_a%2Fcancel",
        "resp_a/input_items",
        "resp_a/cancel/",
        "resp_a;b",
        "resp_é",
        "resp_" + "a" * 129,
    ],
)
def test_an_odd_id_of_a_response_is_not_found(id):
    for method in ("GET", "POST"):
        assert classify(method, f"/v1/responses/{id}").status == 404
        assert classify(method, f"/v1/responses/{id}/cancel").status == 404


@pytest.mark.parametrize("base", ["/openai/v1", "/v1"])
def test_models_are_read_only(base):
    assert classify("GET", f"{base}/models").kind is Kind.MODELS
    assert classify("HEAD", f"{base}/models").kind is Kind.MODELS
    assert classify("GET", f"{base}/models/m_a?x=1") == (200, Kind.MODELS, "x=1", "m_a", ())
    assert classify("POST", f"{base}/models").status == 405
    assert classify("DELETE", f"{base}/models/m").allow == ("GET", "HEAD")


def test_the_query_is_separated_from_the_path():
    assert classify("POST", "/openai/v1/completions?a=1&b=/../x?c") == (
        200,
        Kind.COMPLETIONS,
        "a=1&b=/../x?c",
        None,
        (),
    )


def test_an_absolute_target_is_reduced_to_its_path():
    url = "http://host:8000/openai/v1/completions"
    assert classify("POST", url).kind is Kind.COMPLETIONS
    assert classify("POST", "HTTP://u@h/openai/v1/completions?q").query == "q"
    assert classify("POST", "ftp://h/openai/v1/completions").status == 404
    assert classify("POST", "http://h").status == 404


@pytest.mark.parametrize(
    "target",
    [
        "",
        "*",
        "/",
        "/chat/completions",
        "/v1",
        "/v1/load_lora_adapter",
        "/api",
        "/api/",
        "/api/pull",
        "/v1/api/chat",
        "/openai/v1/api/chat",
        "/v2/chat/completions",
        "/openai/metrics",
        "/v1/openai/v1/chat/completions",
        "/v1/models/",
        "/v1/models/a/b",
        "/openai/v1",
        "/openai/v1/",
        "/openai/v1/chat",
        "/openai/v1/load_lora_adapter",
        "/openai/v1/../metrics",
        "/openai/v1/chat/completions/",
        "/openai/v1/chat//completions",
        "//openai/v1/chat/completions",
        "/openai/v1/./chat/completions",
        "/openai/v1/models/../chat/completions",
        "/openai/v1/x/../chat/completions",
        "/openai/v1/chat%2Fcompletions",
        "/openai/v1/%63hat/completions",
        "/openai/v1/chat/completions%00",
        "/openai/v1/chat/completions%3Fx",
        "/openai/v1/chat/completions;x=1",
        "/openai/v1/chat/completions#f",
        "/openai/v1/chat\\completions",
        "/OPENAI/v1/chat/completions",
        "/openai/v1/Chat/completions",
        " /openai/v1/chat/completions",
        "/openai/v1/chat/completions ",
        "/openai/v1/models/",
        "/openai/v1/models/a/b",
        "openai/v1/chat/completions",
        "/openai/v1/metrics",
        "/metrics",
    ],
)
def test_every_other_spelling_is_not_found(target):
    assert classify("POST", target).status == 404
    assert classify("GET", target).status == 404


@given(
    st.sampled_from(["/openai/v1/", "/v1/", "/"]),
    st.text(alphabet="/openaivchtmpls%2Ff.?#;1", max_size=40),
)
def test_only_the_table_reaches_an_engine(base, target):
    found = classify("POST", base + target)
    if found.status == 200:
        path = base + target.partition("?")[0]
        assert path in route_table or found.id
