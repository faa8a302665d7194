"""Termination of a pod: signals, the grace period, the hook before it, the deadline."""

import asyncio
import signal
import time

from fakes.running_pods import POLITE, PYTHON, SLEEP, is_ready

DEAF = POLITE.replace("SIGTERM, end", "SIGTERM, signal.SIG_IGN")


async def test_a_container_gets_a_signal_before_it_is_killed_and_is_unready_at_once(run):
    pod = run({"command": [*PYTHON, POLITE]})
    await pod.until(lambda: pod.log() == ["up"])
    assert is_ready(pod.status)
    stopping = asyncio.create_task(pod.runner.stop(30))
    await pod.until(lambda: not is_ready(pod.status))
    await stopping
    await pod.over()
    assert pod.log() == ["up", "terminated"]
    assert pod.status["phase"] == "Succeeded"


async def test_a_container_that_ignores_the_signal_is_killed_after_the_grace_period(run):
    pod = run({"command": [*PYTHON, DEAF]})
    await pod.until(lambda: pod.log() == ["up"])
    began = time.monotonic()
    await pod.runner.stop(0.5)
    await pod.over()
    assert time.monotonic() - began >= 0.5
    assert pod.container()["state"]["terminated"]["signal"] == signal.SIGKILL
    assert pod.status["phase"] == "Failed"


async def test_a_second_deletion_can_shorten_the_grace_period(run):
    pod = run({"command": [*PYTHON, DEAF]})
    await pod.until(lambda: pod.log() == ["up"])
    first = asyncio.create_task(pod.runner.stop(600))
    await pod.until(lambda: not is_ready(pod.status))
    await pod.runner.stop(0)
    await asyncio.wait_for(first, 5)
    await pod.over()


async def test_the_pre_stop_hook_runs_before_the_signal(run, tmp_path):
    terminated = tmp_path / "terminated"
    hook = f"import time; time.sleep(0.1); open({str(terminated)!r}, 'w').write('hook')"
    code = POLITE.replace('print("terminated")', f"print(open({str(terminated)!r}).read())")
    pod = run(
        {
            "command": [*PYTHON, code],
            "lifecycle": {"preStop": {"exec": {"command": [*PYTHON, hook]}}},
        }
    )
    await pod.until(lambda: pod.log() == ["up"])
    await pod.runner.stop(30)
    await pod.over()
    assert pod.log() == ["up", "hook"]


async def test_stopping_a_pod_that_cannot_start_ends_at_once(run):
    pod = run({"command": ["kubeai-no-such-program"]})
    await pod.until(lambda: pod.container()["state"]["waiting"].get("message"))
    await pod.runner.stop(30)
    await pod.over()


async def test_stopping_at_any_moment_of_the_start_leaves_nothing_behind(run):
    for delay_s in (0, 0.005, 0.02, 0.05, 0.1):
        pod = run({"command": SLEEP})
        await asyncio.sleep(delay_s)  # not a wait for a state: the test varies this moment
        await pod.runner.stop(0)
        await pod.over()
        assert pod.runner.container("server").process is None


async def test_a_pod_over_its_active_deadline_fails(run):
    pod = run({"command": SLEEP}, activeDeadlineSeconds=1)
    await pod.over()
    assert (pod.status["phase"], pod.status["reason"]) == ("Failed", "DeadlineExceeded")
