"""Infinity's pod."""

from fakes.engine_pods import env, pod, server


def test_infinity_is_configured_by_its_environment():
    built = pod("Infinity", args=["--x"])
    assert server(built)["args"] == ["v2", "--x"]
    assert env(built) == {
        "INFINITY_MODEL_ID": "org/name",
        "INFINITY_SERVED_MODEL_NAME": "m",
        "INFINITY_URL_PREFIX": "/v1",
        "INFINITY_ENGINE": "torch",
        "INFINITY_PORT": "8000",
        "HF_TOKEN": None,
    }
    assert env(pod("Infinity", url="pvc://claim"))["INFINITY_MODEL_ID"] == "/model"
