"""The format of error responses."""

import json

from kubeai.openai.errors import error_body, model_not_found


def test_errors_have_openais_shape():
    error = json.loads(error_body("no \ud800", "server_error", "c", "p"))
    assert error == {
        "error": {"message": "no ?", "type": "server_error", "param": "p", "code": "c"}
    }
    missing = model_not_found("x" * 100_000)
    assert missing.status == 404
    assert len(missing.body()) < 1000
    assert json.loads(missing.body())["error"]["code"] == "model_not_found"
