"""Runs one pod: from its manifest to processes, probes and a status.

Owns a pod's containers and their files in the pod's directory. Independent of the API: it gets the
objects that the pod refers to from :class:`~.volumes.Objects` and reports status changes through a
callback. Called by agent.py; tests call it with plain pods.

Lifecycle: volumes → init containers in order (sidecars are started and keep running) → containers,
each restarted under its policy with back-off → when all have ended, the sidecars are ended.
``stop`` ends it earlier: preStop, SIGTERM, the grace period, SIGKILL to every descendant.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kubeai.errors import KubeAIError
from kubeai.local.kubelet.pods import programs
from kubeai.local.kubelet.pods.pod import (
    Condition,
    Container,
    ContainerStatus,
    Handler,
    ObjectMeta,
    Pod,
    PodError,
    Running,
    Terminated,
    Waiting,
    container_environment,
    environment_references,
    expand,
)
from kubeai.local.kubelet.pods.probes import Attempt, Loops, Outcome, Prober
from kubeai.local.kubelet.pods.status import PodOutcome, Record, pod_status, timestamp
from kubeai.local.kubelet.pods.termination import termination_message, termination_mounts
from kubeai.local.kubelet.pods.volumes import Objects, mounts_of, prepare_volumes
from kubeai.local.kubelet.runtime.command import Command, ExecResult
from kubeai.local.kubelet.runtime.memory import MemoryGuard
from kubeai.local.kubelet.runtime.process import (
    Exit,
    Launch,
    Process,
    StartError,
)
from kubeai.logs import get_logger

log = get_logger(__name__)

POD_UID_VARIABLE, NODE_VARIABLE = "KUBEAI_POD_UID", "KUBEAI_NODE_DIR"
LAST_GRACE_S = 2.0  # minimum time after SIGTERM if the preStop hook used up the grace period
POST_START_TIMEOUT_S = 60.0
_HIDDEN_VARIABLES = ("KUBEAI_", "KUBERNETES_", "KUBECONFIG", "POD_", "CONFIG_PATH")


class Timing(msgspec.Struct, frozen=True):
    """Delays between starts; tests shorten them."""

    restart_first_s: float = 10.0
    restart_max_s: float = 300.0
    restart_reset_s: float = 600.0  # a run of this length resets the back-off
    config_first_s: float = 1.0  # retry if a referenced object is missing
    config_max_s: float = 60.0


class Host(msgspec.Struct):
    """State shared by all pods of a kubelet."""

    data_dir: Path
    objects: Objects
    prober: Prober
    memory: MemoryGuard
    timing: Timing = Timing()
    ip: str = "127.0.0.1"
    namespace: str = "auto"  # of mounts; see runtime/shim/mounts.py

    def pod_directory(self, meta: ObjectMeta) -> Path:
        return self.data_dir / "pods" / f"{meta.namespace}_{meta.name}_{meta.uid}"

    @property
    def marker(self) -> str:
        """An environment variable that marks every process of this data directory."""
        return f"{NODE_VARIABLE}={self.data_dir.resolve()}"


class RestartBackoff:
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
    """One container: its runs and their record. A probe's Target."""

    def __init__(self, pod: PodRunner, spec: Container, policy: str) -> None:
        self.spec = spec
        self.ip = pod.ip
        initial = "PodInitializing" if pod.pod.spec.init_containers else "ContainerCreating"
        self.record = Record(spec.name, spec.image, Waiting(initial))
        self.started = asyncio.Event()  # startup is complete; a sidecar's successor waits for it
        self.process: Process | None = None
        self._pod = pod
        self._host = pod.host
        self._policy = policy
        self._stopping = asyncio.Event()
        self._ending: Process | None = None
        self._grace_s = 0.0
        self._env: dict[str, str] = {}
        self._has_run = False
        self._over = False
        self._cause: tuple[str, str] | None = None  # of the kill: reason, message
        timing = pod.host.timing
        self._restart = RestartBackoff(
            timing.restart_first_s, timing.restart_max_s, timing.restart_reset_s
        )

    # -- runs ------------------------------------------------------------------------------------

    def remember(self, status: ContainerStatus, *, again: bool) -> None:
        """Restore the state from an earlier kubelet, whose processes are gone.

        ``again``: run the container even if it had ended (init containers).
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
        if ended is not None and not again and not self._restarts_after(ended.exit_code):
            self.record.state, self.record.last = ended, status.last_state.terminated
            self._over = True

    async def run(self) -> bool:
        """Run until it is not restarted any more; returns whether it succeeded."""
        while not (self._over or self._stopping.is_set()):
            process = await self._start()
            if process is None:
                break
            began = time.monotonic()
            end = await self._live(process)
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
            await self._end(self.process, self._grace_s)

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
                launch = await self._plan()
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

    async def _live(self, process: Process) -> Exit:
        """Supervise one run, from the process's start to its end."""
        self.process, self._cause = process, None
        record, uid = self.record, self._pod.pod.metadata.uid
        if self._has_run:
            record.restarts += 1
        self._has_run = True
        record.container_id = f"process://{uid}/{record.name}/{record.restarts}"
        self._prune_logs()
        self._up(startup_over=self.spec.startup_probe is None)
        self._set(Running(timestamp(process.started_s)))
        tasks = [asyncio.create_task(self._watch_health(process))]
        tasks[0].add_done_callback(_tell_failure)
        if self._stopping.is_set():
            tasks.append(asyncio.create_task(self._end(process, self._grace_s)))
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
        if self._cause is not None:
            reason, message = self._cause[0] or reason, self._cause[1]
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

    async def _plan(self) -> Launch:
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
        cwd = spec.working_dir
        if not cwd:
            scratch = directory / ".work" / spec.name
            scratch.mkdir(parents=True, exist_ok=True)
            cwd = str(scratch)
        return Launch(
            argv=tuple(await programs.resolve(spec.image, command, args, self._env, ip)),
            env=self._env,
            cwd=cwd,
            log=self._log_path(self.record.restarts + self._has_run),
            mounts=(
                *mounts_of(pod, spec, self._pod.places, declared),
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
        return self.spec.port(wanted)

    async def open(self, command: Sequence[str]) -> Command:
        """Start a command alongside the main process; PodError if either is not available."""
        if (process := self.process) is None:
            raise PodError(f"container {self.spec.name} is not running")
        words = [programs.bind_to_pod(word, self.ip) for word in command]
        return process.open(await programs.locate(words, self._env), self._env)

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
            self._up(startup_over=True)
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

    def _up(self, *, startup_over: bool) -> None:
        self.record.started = startup_over
        if startup_over:
            self.started.set()
        ready = startup_over and self.spec.readiness_probe is None
        self.record.ready = ready and not self._stopping.is_set()

    def _readiness(self, ready: bool, message: str) -> None:
        if self._ending is not self.process:
            self.record.ready = ready
            log.info("readiness", pod=self._pod.pod.key, container=self.spec.name, ready=ready)
            self._pod.changed()

    async def _unhealthy(self, process: Process, grace_s: int | None, why: str) -> None:
        log.info("unhealthy", pod=self._pod.pod.key, container=self.spec.name, why=why)
        self._cause = ("", why)
        pod_grace_s = self._pod.pod.spec.termination_grace_period_seconds
        # Not awaited: this task is cancelled when the process exits.
        self._pod.spawn(self._end(process, pod_grace_s if grace_s is None else grace_s))

    def _out_of_memory(self, used_bytes: int, limit_bytes: int) -> None:
        if self.process is not None:
            self._cause = ("OOMKilled", f"used {used_bytes} bytes, the limit is {limit_bytes}")
            self.process.kill()

    # -- termination -----------------------------------------------------------------------------

    async def _end(self, process: Process, grace_s: float) -> None:
        """Run preStop, send SIGTERM, SIGKILL the tree after ``grace_s``; wait until it is gone."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        timer = loop.call_later(grace_s, process.kill)
        try:
            if self._ending is not process:
                self._ending = process
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
                    return "" if outcome is Outcome.SUCCESS else why
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


class PodRunner:
    """A pod on this machine. ``changed`` is called whenever :meth:`status` may differ."""

    def __init__(self, pod: Pod, ip: str, host: Host, changed: Callable[[], None]) -> None:
        self.pod = pod
        self.ip = ip
        self.host = host
        self.changed = changed
        self.places: dict[str, Path] = {}
        self.over = asyncio.Event()  # no process is left, and none will be started
        self._stopping = asyncio.Event()
        self._deadline = float("inf")
        self._initialized = False
        self._outcome: PodOutcome | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._start_time = pod.status.start_time or timestamp(time.time())
        self._conditions: dict[str, Condition] = {c.type: c for c in pod.status.conditions}
        policy = pod.spec.restart_policy
        init_policy = "Never" if policy == "Never" else "OnFailure"
        self._init = [
            ContainerRunner(self, spec, spec.restart_policy or init_policy)
            for spec in pod.spec.init_containers
        ]
        self._main = [ContainerRunner(self, spec, policy) for spec in pod.spec.containers]
        self._sidecars = [c for c in self._init if c.spec.restart_policy == "Always"]
        self._remember()

    def _remember(self) -> None:
        status = self.pod.status
        for statuses, containers, again in (
            (status.init_container_statuses, self._init, True),
            (status.container_statuses, self._main, False),
        ):
            by_name = {s.name: s for s in statuses}
            for container in containers:
                if container.spec.name in by_name:
                    container.remember(by_name[container.spec.name], again=again)

    # -- lifecycle -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until all containers have ended for good, or :meth:`stop`; leaves no process."""
        alarm: asyncio.TimerHandle | None = None
        if (limit_s := self.pod.spec.active_deadline_seconds) is not None:
            loop = asyncio.get_running_loop()
            alarm = loop.call_later(limit_s, self._out_of_time)
        try:
            if await self._prepare() and await self._initialize():
                self._initialized = True
                self.changed()
                await asyncio.gather(*(container.run() for container in self._main))
        except Exception:
            log.exception("pod runner failed", pod=self.pod.key)
            self._outcome = PodOutcome("Failed", "KubeletError", "see the kubelet's log")
            self.spawn(self.stop(0))
        finally:
            if alarm is not None:
                alarm.cancel()
        await self._end_sidecars()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._stopping.is_set() and self._outcome is None:
            self._outcome = PodOutcome("Succeeded" if self._all_well() else "Failed")
        self.over.set()
        self.changed()

    def _all_well(self) -> bool:
        states = [c.record.state for c in self._main]
        return all(isinstance(state, Terminated) and state.exit_code == 0 for state in states)

    async def stop(self, grace_s: float) -> None:
        """End all containers; another call can only shorten the grace period."""
        loop = asyncio.get_running_loop()
        self._deadline = min(self._deadline, loop.time() + grace_s)
        self._stopping.set()
        ending = [c for c in (*self._init, *self._main) if c not in self._sidecars]
        await asyncio.gather(*(c.stop(grace_s) for c in ending))
        await self._end_sidecars()

    def spawn(self, work: Any) -> None:
        """Run a task alongside the containers; the pod is not over before it ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_tell_failure)

    async def _prepare(self) -> bool:
        timing = self.host.timing
        wait_s = timing.config_first_s
        while not self._stopping.is_set():
            try:
                directory = self.host.pod_directory(self.pod.metadata)
                directory.mkdir(parents=True, exist_ok=True)
                self.places = await prepare_volumes(
                    self.pod, directory, self.host.data_dir / "volumes", self.host.objects
                )
                return True
            except (KubeAIError, OSError) as error:
                reason = error.reason if isinstance(error, PodError) else "ContainerCreating"
                for container in (*self._init, *self._main):
                    if isinstance(container.record.state, Waiting):
                        container.record.state = Waiting(reason, str(error))
                self.changed()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stopping.wait()
            wait_s = min(timing.config_max_s, 2 * wait_s)
        return False

    async def _initialize(self) -> bool:
        """Run the init containers in order; False if one failed for good, or on stop."""
        for container in self._init:
            if self._stopping.is_set():
                return False
            if container in self._sidecars:
                self.spawn(container.run())
                await self._first_of(container.started, self._stopping)
            elif not await container.run():
                return False
        return not self._stopping.is_set()

    @staticmethod
    async def _first_of(*events: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _end_sidecars(self) -> None:
        """End the sidecars in reverse order, within the remaining grace period."""
        loop = asyncio.get_running_loop()
        for container in reversed(self._sidecars):
            grace_s = float(self.pod.spec.termination_grace_period_seconds)
            if self._stopping.is_set():
                grace_s = min(grace_s, self._deadline - loop.time())
            await container.stop(max(0.0, grace_s))

    def _out_of_time(self) -> None:
        message = "Pod was active on the node longer than the specified deadline"
        self._outcome = PodOutcome("Failed", "DeadlineExceeded", message)
        self.spawn(self.stop(self.pod.spec.termination_grace_period_seconds))

    # -- status ----------------------------------------------------------------------------------

    def update(self, pod: Pod) -> None:
        """Take the API's newer version: labels, annotations, others' conditions."""
        self.pod = pod

    async def leave(self, grace_s: float) -> None:
        """End the processes but keep the pod for the next kubelet, because this one exits."""
        self._outcome = self._outcome or PodOutcome(str(self.status()["phase"]))
        going = [c.record for c in (*self._init, *self._main) if c.process is not None]
        await self.stop(grace_s)
        await self.over.wait()
        for record in going:
            if isinstance(record.state, Terminated):  # by the kubelet, not by a failure
                record.last = msgspec.structs.replace(record.state, reason="KubeletStopped")
            record.state = Waiting("KubeletStopped", "will be restarted with the kubelet")
        self.changed()

    def container(self, name: str) -> ContainerRunner | None:
        every = (*self._init, *self._main)
        return next((c for c in every if c.spec.name == name), None)

    def status(self) -> Mapping[str, Any]:
        """The pod's current status for the API."""
        status = pod_status(
            self.pod,
            [c.record for c in self._init],
            [c.record for c in self._main],
            sidecars=frozenset(c.spec.name for c in self._sidecars),
            initialized=self._initialized,
            ip=self.ip,
            host_ip=self.host.ip,
            start_time=self._start_time,
            now=timestamp(time.time()),
            before=self._conditions,
            outcome=self._outcome,
        )
        for condition in status["conditions"]:
            since = condition.get("lastTransitionTime")
            self._conditions[condition["type"]] = Condition(
                condition["type"], condition["status"], last_transition_time=since
            )
        return status


def _tell_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("pod task failed", exc_info=error)
