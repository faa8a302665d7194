"""Which paths and methods are served."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.openai.routes import Kind, classify, route_table


@pytest.mark.parametrize(
    "path",
    [
        "chat/completions",
        "completions",
        "embeddings",
        "rerank",
        "audio/transcriptions",
        "responses",
        "messages",
    ],
)
@pytest.mark.parametrize("base", ["/openai/v1", "/v1"])
def test_listed_paths_accept_only_post(base, path):
    target = classify("POST", f"{base}/{path}")
    assert (target.status, target.kind) == (200, Kind(f"/v1/{path}"))
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "post", "PATCH", "CONNECT", ""):
        assert classify(method, f"{base}/{path}") == (405, None, "", None, ("POST",))


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
        assert base + target.partition("?")[0] in route_table
