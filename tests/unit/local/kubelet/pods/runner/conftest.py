"""Pods with real processes."""

import pytest
from fakes.running_pods import FAST, Objects, Running

from kubeai.local.kubelet.pods.addresses import PodAddress
from kubeai.local.kubelet.pods.host import Host
from kubeai.local.kubelet.pods.pod import decode_pod
from kubeai.local.kubelet.pods.probes import Prober
from kubeai.local.kubelet.pods.runner import PodRunner
from kubeai.local.kubelet.runtime.memory import MemoryGuard


@pytest.fixture
async def host(tmp_path):
    prober = Prober()
    yield Host(tmp_path, Objects(), prober, MemoryGuard(poll_interval_s=0.05), FAST)
    await prober.close()


@pytest.fixture
async def run(host):
    """Runs pods; ends them with the test."""
    started = []

    def run(*containers, status=None, annotations=None, **spec):
        pod = decode_pod(
            {
                "metadata": {"name": f"p{len(started)}", "namespace": "default", "uid": "u"},
                "spec": {
                    "containers": [{"name": "server", "image": "i", **c} for c in containers],
                    "terminationGracePeriodSeconds": 5,
                    **spec,
                },
                "status": status or {},
            }
        )
        address = PodAddress.claim()
        running = Running(None)
        running.runner = PodRunner(pod, address.ip, host, running.changed)
        started.append((running, address))
        running.start()
        return running

    yield run
    for running, address in started:
        await running.runner.stop(0)
        await running.over()
        address.release()
