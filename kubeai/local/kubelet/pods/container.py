"""Runs one container of a pod: starts, restarts with back-off, probes, hooks and termination.

The pod's runner creates it, and reads its record when it computes the pod's status.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kubeai.errors import KubeAIError
from kubeai.local.kubelet.pods import programs
from kubeai.local.kubelet.pods.environment import (
    container_environment,
    environment_references,
    expand,
)
from kubeai.local.kubelet.pods.host import Host
from kubeai.local.kubelet.pods.pod import (
    Container,
    ContainerStatus,
    Handler,
    Pod,
    PodError,
    Running,
    Terminated,
    Waiting,
)
from kubeai.local.kubelet.pods.probes import Attempt, Loops, ProbeResult
from kubeai.local.kubelet.pods.status import ContainerRecord, timestamp
from kubeai.local.kubelet.pods.termination import termination_message, termination_mounts
from kubeai.local.kubelet.pods.volumes import mounts_of
from kubeai.local.kubelet.runtime.command import Command, ExecResult
from kubeai.local.kubelet.runtime.process import Exit, Launch, Process, StartError
from kubeai.logs import get_logger

log = get_logger(__name__)

POD_UID_VARIABLE = "KUBEAI_POD_UID"
LAST_GRACE_S = 2.0  # minimum time after SIGTERM if the preStop hook used up the grace period
POST_START_TIMEOUT_S = 60.0
_HIDDEN_VARIABLES = ("KUBEAI_", "KUBERNETES_", "KUBECONFIG", "POD_", "CONFIG_PATH")


class PodContext(Protocol):
    """What a container uses of its pod."""

    pod: Pod
    ip: str
    host: Host
    volume_paths: dict[str, Path]
    devices: Mapping[str, tuple[str, ...]]  # of each container that requests GPUs

    def changed(self) -> None:
        """The pod's status may differ."""

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a task that the pod waits for before it has terminated."""


class CrashLoopBackoff:
    """Kubernetes' crash loop back-off: 0, then ``first_s``, doubling up to ``max_s``."""

    def __init__(self, first_s: float, max_s: float, reset_s: float) -> None:
        self._first_s, self._max_s, self._reset_s = first_s, max_s, reset_s
        self._next_s = 0.0

    def after(self, ran_s: float) -> float:
        """Seconds to wait after a run of ``ran_s`` seconds."""
        if ran_s >= self._reset_s:
            self._next_s = 0.0
        wait_s = self._next_s
        self._next_s = min(self._max_s, 2 * wait_s or self._first_s)
        return wait_s


class ContainerRunner:
    """One container: its runs, probes, hooks and termination."""

    def __init__(self, pod: PodContext, spec: Container, policy: str) -> None:
        self.spec = spec
        self.ip = pod.ip
        initial = "PodInitializing" if pod.pod.spec.init_containers else "ContainerCreating"
        self.record = ContainerRecord(spec.name, spec.image, Waiting(initial))
        self.started = asyncio.Event()  # startup is complete; a sidecar's successor waits for it
        self.process: Process | None = None
        self._pod = pod
        self._host = pod.host
        self._policy = policy
        self._stopping = asyncio.Event()
        self._terminating: Process | None = None
        self._grace_s = 0.0
        self._env: dict[str, str] = {}
        self._has_run = False
        self._finished = False
        self._kill_reason: tuple[str, str] | None = None  # of the kill: reason, message
        timing = pod.host.timing
        self._restart = CrashLoopBackoff(
            timing.restart_first_s, timing.restart_max_s, timing.restart_reset_s
        )

    # -- runs ------------------------------------------------------------------------------------

    def restore(self, status: ContainerStatus, *, rerun: bool) -> None:
        """Restore the state from an earlier kubelet, whose processes are gone.

        ``rerun``: run the container even if it had ended (init containers).
        """
        state, self.record.restarts = status.state, status.restart_count
        ended = state.terminated
        if state.running is not None:
            ended = Terminated(
                137,
                "ContainerStatusUnknown",
                "the kubelet that ran it is gone",
                started_at=state.running.started_at,
                finished_at=timestamp(time.time()),
            )
        self.record.last = ended or status.last_state.terminated
        self._has_run = self.record.last is not None
        if ended is not None and not rerun and not self._restarts_after(ended.exit_code):
            self.record.state, self.record.last = ended, status.last_state.terminated
            self._finished = True

    async def run(self) -> bool:
        """Run until it is not restarted any more; returns whether it succeeded."""
        while not (self._finished or self._stopping.is_set()):
            process = await self._start()
            if process is None:
                break
            began = time.monotonic()
            end = await self._supervise(process)
            if self._stopping.is_set() or not self._restarts_after(end.code):
                break
            await self._back_off(time.monotonic() - began)
        state = self.record.state
        return isinstance(state, Terminated) and state.exit_code == 0

    async def stop(self, grace_s: float) -> None:
        """End it without a restart. Another call can only shorten the grace period."""
        self._grace_s = grace_s if not self._stopping.is_set() else min(grace_s, self._grace_s)
        self._stopping.set()
        if self.process is not None:
            await self._terminate(self.process, self._grace_s)

    def _restarts_after(self, code: int) -> bool:
        return self._policy == "Always" or (self._policy == "OnFailure" and code != 0)

    async def _start(self) -> Process | None:
        """Start it, waiting for missing dependencies; None if it is stopped first."""
        timing = self._host.timing
        wait_s = timing.config_first_s
        if not self._has_run:
            self._set(Waiting("ContainerCreating"))
        while not self._stopping.is_set():
            try:
                launch = await self._build_launch()
                process = await Process.start(launch)
            except (PodError, StartError) as error:
                self._set(Waiting(error.reason, str(error)))
            except (KubeAIError, OSError) as error:
                self._set(Waiting("CreateContainerError", str(error)))
            else:
                self.record.program = f"process://{launch.argv[0]}"
                return process
            await self._sleep(wait_s)
            wait_s = min(timing.config_max_s, 2 * wait_s)
        return None

    async def _supervise(self, process: Process) -> Exit:
        """Supervise one run, from the process's start to its end."""
        self.process, self._kill_reason = process, None
        record, uid = self.record, self._pod.pod.metadata.uid
        if self._has_run:
            record.restarts += 1
        self._has_run = True
        record.container_id = f"process://{uid}/{record.name}/{record.restarts}"
        self._prune_logs()
        self._set_started(startup_over=self.spec.startup_probe is None)
        self._set(Running(timestamp(process.started_s)))
        tasks = [asyncio.create_task(self._watch_health(process))]
        tasks[0].add_done_callback(log_failure)
        if self._stopping.is_set():
            tasks.append(asyncio.create_task(self._terminate(process, self._grace_s)))
        limit = self.spec.memory_limit_bytes()
        try:
            with self._host.memory.watching(process, limit, self._out_of_memory):
                end = await process.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.process = None
        record.ready = record.started = False
        self._set(self._terminated(process, end))
        return end

    def _terminated(self, process: Process, end: Exit) -> Terminated:
        reason, message = "Completed" if end.code == 0 else "Error", end.message
        if self._kill_reason is not None:
            reason, message = self._kill_reason[0] or reason, self._kill_reason[1]
        directory = self._host.pod_directory(self._pod.pod.metadata)
        own = termination_message(
            self.spec, directory, self._log_path(self.record.restarts), end.code
        )
        message = message or own
        return Terminated(
            end.code,
            reason,
            message,
            end.signal,
            timestamp(process.started_s),
            timestamp(end.finished_s),
            self.record.container_id,
        )

    async def _back_off(self, ran_s: float) -> None:
        wait_s = self._restart.after(ran_s)
        if wait_s:
            name = f"container={self.spec.name} pod={self._pod.pod.key}"
            message = f"back-off {wait_s:g}s restarting failed {name}"
            self._set(Waiting("CrashLoopBackOff", message))
            await self._sleep(wait_s)

    async def _sleep(self, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._stopping.wait()

    # -- launch ----------------------------------------------------------------------------------

    async def _build_launch(self) -> Launch:
        pod, spec, ip = self._pod.pod, self.spec, self.ip
        directory = self._host.pod_directory(pod.metadata)
        declared = await self._declared_environment()
        words = [expand(word, declared) for word in (*spec.command, *spec.args)]
        command, args = words[: len(spec.command)], words[len(spec.command) :]
        base = {k: v for k, v in os.environ.items() if not k.startswith(_HIDDEN_VARIABLES)}
        name, _, value = self._host.marker.partition("=")
        self._env = {
            **base,
            "PYTHONUNBUFFERED": "1",  # so that logs appear immediately
            "POD_IP": ip,
            **programs.engine_environment(spec.image, command, ip),
            **{k: programs.bind_to_pod(v, ip) for k, v in declared.items()},
            POD_UID_VARIABLE: pod.metadata.uid,
            name: value,
        }
        if spec.name in self._pod.devices:
            self._env |= self._host.devices.environment(self._pod.devices[spec.name], declared)
        argv = await programs.resolve(
            spec.image, command, args, self._env, ip, self._host.engine_envs
        )
        cwd = spec.working_dir or programs.working_directory(argv)
        if not cwd:
            scratch = directory / ".work" / spec.name
            scratch.mkdir(parents=True, exist_ok=True)
            cwd = str(scratch)
        return Launch(
            argv=tuple(argv),
            env=self._env,
            cwd=cwd,
            log=self._log_path(self.record.restarts + self._has_run),
            mounts=(
                *mounts_of(pod, spec, self._pod.volume_paths, declared),
                *termination_mounts(spec, directory),
            ),
            root=directory / ".root" / spec.name,
            namespace=self._host.namespace,
        )

    async def _declared_environment(self) -> dict[str, str]:
        pod, objects = self._pod.pod, self._host.objects
        maps, secrets = environment_references(self.spec)
        namespace = pod.metadata.namespace
        found = await asyncio.gather(
            *(objects.config_map(namespace, name) for name in maps),
            *(objects.secret(namespace, name) for name in secrets),
        )
        fields = {
            "status.podIP": self.ip,
            "status.podIPs": self.ip,
            "status.hostIP": self._host.ip,
            "status.hostIPs": self._host.ip,
        }
        return container_environment(
            pod,
            self.spec,
            fields,
            dict(zip(maps, found, strict=False)),
            dict(zip(secrets, found[len(maps) :], strict=True)),
        )

    def _log_path(self, run: int) -> Path:
        return self._host.pod_directory(self._pod.pod.metadata) / self.spec.name / f"{run}.log"

    def _prune_logs(self) -> None:
        """Keep the logs of this run and the previous one."""
        old = self._log_path(self.record.restarts - 2)
        for path in (old, old.with_suffix(".log.1")):
            path.unlink(missing_ok=True)

    # -- health ----------------------------------------------------------------------------------

    def port(self, wanted: int | str) -> int:
        """The number of a port that a probe or hook refers to by number or name."""
        return self.spec.port(wanted)

    async def open(self, command: Sequence[str]) -> Command:
        """Start a command alongside the main process; PodError if either is not available."""
        if (process := self.process) is None:
            raise PodError(f"container {self.spec.name} is not running")
        words = [programs.bind_to_pod(word, self.ip) for word in command]
        argv = await programs.locate(words, self._env, self._host.engine_envs)
        return process.open(argv, self._env)

    async def exec(self, command: tuple[str, ...], timeout_s: float) -> ExecResult:
        """Run a command to completion (for an exec probe or a hook)."""
        try:
            opened = await self.open(command)
        except (PodError, OSError) as error:
            return ExecResult(-1, str(error))
        return await opened.result(timeout_s)

    async def _attempt(self, probe: Any) -> Attempt:
        return await self._host.prober.attempt(probe, self)

    async def _watch_health(self, process: Process) -> None:
        """Run postStart, then the startup probe, then the liveness and readiness probes."""
        spec = self.spec
        loops = Loops(self._attempt, asyncio.get_running_loop().time())
        if spec.lifecycle.post_start is not None:
            why = await self._hook(spec.lifecycle.post_start, POST_START_TIMEOUT_S)
            if why:
                await self._unhealthy(process, None, f"postStart hook failed: {why}")
                return
        if spec.startup_probe is not None:
            failure = await loops.startup(spec.startup_probe)
            if failure is not None:
                grace_s = spec.startup_probe.termination_grace_period_seconds
                await self._unhealthy(process, grace_s, f"startup probe failed: {failure}")
                return
            self._set_started(startup_over=True)
            self._pod.changed()
        checks = []
        if spec.readiness_probe is not None:
            checks.append(loops.readiness(spec.readiness_probe, self._readiness))
        if spec.liveness_probe is not None:
            checks.append(self._liveness(process, loops))
        await asyncio.gather(*checks)

    async def _liveness(self, process: Process, loops: Loops) -> None:
        probe = self.spec.liveness_probe
        assert probe is not None
        failure = await loops.liveness(probe)
        grace_s = probe.termination_grace_period_seconds
        await self._unhealthy(process, grace_s, f"liveness probe failed: {failure}")

    def _set_started(self, *, startup_over: bool) -> None:
        self.record.started = startup_over
        if startup_over:
            self.started.set()
        ready = startup_over and self.spec.readiness_probe is None
        self.record.ready = ready and not self._stopping.is_set()

    def _readiness(self, ready: bool, message: str) -> None:
        if self._terminating is not self.process:
            self.record.ready = ready
            pod = self._pod.pod.key
            log.info("container readiness changed", pod=pod, container=self.spec.name, ready=ready)
            self._pod.changed()

    async def _unhealthy(self, process: Process, grace_s: int | None, why: str) -> None:
        pod = self._pod.pod.key
        log.info("probe failed, stopping container", pod=pod, container=self.spec.name, why=why)
        self._kill_reason = ("", why)
        pod_grace_s = self._pod.pod.spec.termination_grace_period_seconds
        # Not awaited: this task is cancelled when the process exits.
        self._pod.spawn(self._terminate(process, pod_grace_s if grace_s is None else grace_s))

    def _out_of_memory(self, used_bytes: int, limit_bytes: int) -> None:
        if self.process is not None:
            self._kill_reason = (
                "OOMKilled",
                f"used {used_bytes} bytes, the limit is {limit_bytes}",
            )
            self.process.kill()

    # -- termination -----------------------------------------------------------------------------

    async def _terminate(self, process: Process, grace_s: float) -> None:
        """Run preStop, send SIGTERM, SIGKILL the tree after ``grace_s``; wait until it is gone."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        timer = loop.call_later(grace_s, process.kill)
        try:
            if self._terminating is not process:
                self._terminating = process
                self.record.ready = False
                self._pod.changed()
                hook = self.spec.lifecycle.pre_stop
                if hook is not None and grace_s > 0:
                    await self._hook(hook, grace_s)
                    if loop.time() > deadline - LAST_GRACE_S:
                        timer.cancel()
                        timer = loop.call_later(LAST_GRACE_S, process.kill)
                process.signal(signal.SIGTERM)
            await process.wait()
        except Exception:
            process.kill()  # it must end despite the error
            raise
        finally:
            timer.cancel()

    async def _hook(self, hook: Handler, timeout_s: float) -> str:
        """Run a lifecycle hook; returns why it failed, or ""."""
        try:
            async with asyncio.timeout(timeout_s):
                if hook.sleep is not None:
                    await asyncio.sleep(hook.sleep.seconds)
                elif hook.exec is not None:
                    result = await self.exec(hook.exec.command, timeout_s)
                    return result.output[-512:] or "failed" if result.code else ""
                elif hook.http_get is not None:
                    outcome, why = await self._host.prober.http(hook.http_get, self, timeout_s)
                    return "" if outcome is ProbeResult.SUCCESS else why
        except TimeoutError:
            return f"not completed within {timeout_s:g} s"
        except PodError as error:
            return str(error)
        return ""

    def _set(self, state: Waiting | Running | Terminated) -> None:
        if isinstance(self.record.state, Terminated):
            self.record.last = self.record.state
        self.record.state = state
        self._pod.changed()


def log_failure(task: asyncio.Task[Any]) -> None:
    """A task's done callback: log the exception that ended it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("pod task failed", exc_info=error)
