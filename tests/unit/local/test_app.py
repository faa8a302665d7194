"""The config of `kubeai local`."""

from kubeai.api.config.system import load_config
from kubeai.gateway.cors import CorsPolicy
from kubeai.local.app import LOCAL_DEFAULTS


def test_pages_from_this_machine_may_use_the_api_unless_the_config_says_otherwise(tmp_path):
    policy = CorsPolicy(load_config(None, defaults=LOCAL_DEFAULTS).gateway.cors_origins)
    for host in ("localhost", "127.0.0.1"):
        for origin in (f"http://{host}:3000", f"https://{host}:8443", f"http://{host}"):
            assert policy.allows(origin)
    assert not policy.allows("https://chat.example.com")
    (tmp_path / "config.yaml").write_text("gateway: {corsOrigins: []}")
    config = load_config(tmp_path / "config.yaml", defaults=LOCAL_DEFAULTS)
    assert config.gateway.cors_origins == ()
