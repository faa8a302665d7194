"""The comparison with nginx runs and measures both; whether it is fast, only a quiet run tells."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from repository import REPOSITORY

SCRIPT = REPOSITORY / "bench" / "gateway_vs_nginx.py"


@pytest.mark.nginx
@pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="nginx is not installed",
)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_the_comparison_with_nginx_measures_both(tmp_path):
    results = tmp_path / "results.json"
    cores = map(str, sorted(os.sched_getaffinity(0))[:2])
    command = [sys.executable, SCRIPT, "--rounds", "1", "--seconds", "0.3", "--json", results]
    command += ["--only", "chat", "--only", "burst", "--cores", *cores]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(results.read_text())
    assert told.keys() == {"chat", "burst"}
    for result in told.values():
        assert result["ratio"] == pytest.approx(result["kubeai_us"] / result["nginx_us"])
        assert min(result["nginx_us"], result["kubeai_us"], result["kubeai_rate"]) > 0
    assert "request of 800 bytes" in done.stdout
