"""The condition of KubeAI's own pod."""

import asyncio
import contextlib

import pytest
from fakes.time import FAKE_TIME

from kubeai.kube.errors import ApiError
from kubeai.kube.resources import PODS
from kubeai.supervisor.pod_condition import TYPE, PodCondition

pytestmark = FAKE_TIME


class FakeKube:
    def __init__(self):
        self.conditions = []
        self.calls = 0
        self.error = None

    async def patch(self, resource, name, patch, namespace, *, subresource, kind):
        self.calls += 1
        assert (resource, name, namespace) == (PODS, "kubeai-0", "ns")
        assert (subresource, kind) == ("status", "strategic")
        if self.error:
            raise self.error
        (condition,) = patch["status"]["conditions"]
        assert condition["type"] == TYPE
        self.conditions.append((condition["status"], condition["message"]))


@contextlib.asynccontextmanager
async def running(kube, problems):
    task = asyncio.create_task(PodCondition(kube, "ns", "kubeai-0", lambda: problems).run())
    try:
        await asyncio.sleep(1)
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_is_written_when_it_changes():
    kube, problems = FakeKube(), ["jobs: requests: refused"]
    async with running(kube, problems):
        assert kube.conditions == [("False", "jobs: requests: refused")]
        await asyncio.sleep(60)
        assert len(kube.conditions) == 1
        problems.clear()
        await asyncio.sleep(6)
        assert kube.conditions[1:] == [("True", "")]


async def test_a_message_that_keeps_changing_is_written_once_a_minute():
    kube, problems = FakeKube(), ["0"]
    async with running(kube, problems):
        for number in range(600):
            problems[0] = str(number)
            await asyncio.sleep(1)
        assert 9 <= len(kube.conditions) <= 12
        problems[0] = "last"
        await asyncio.sleep(70)
        assert kube.conditions[-1] == ("False", "last")


@pytest.mark.parametrize("status", [403, 0], ids=["forbidden", "no response"])
async def test_a_failure_is_repeated_with_back_off(status):
    kube = FakeKube()
    kube.error = ApiError(status, "", "no")
    async with running(kube, []):
        await asyncio.sleep(3600)
        assert 10 < kube.calls < 40
        kube.error = None
        await asyncio.sleep(300)
        assert kube.conditions == [("True", "")]
