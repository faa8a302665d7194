"""Fetches, loads and unloads a Model's LoRA adapters in the engines of its pods.

Owns at most one task per pod while this KubeAI replica leads. The task has the loader container
fetch the files (which takes minutes, so it is not part of a reconcile), calls the engine, and
updates the pod's label. The label is set to ``loading`` before the engine is called and to the hash
of the URL once it serves the adapter, so after a crash the next leader knows what an engine may
have loaded.
Promises: a pod without the hash in its label gets no request for that adapter; a changed URL is
rolled out one pod at a time and stops at the first pod where it fails; a restarted engine gets its
adapters again. Used by the controller.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import aiohttp
import msgspec

from kubeai.api.model import Model, ModelStatusAdapter
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.fencing import fence
from kubeai.kube.resources import PODS
from kubeai.logs import get_logger
from kubeai.operator.adapter_steps import AdaptersView, Wanted, steps
from kubeai.operator.leader import NotLeader, Writes
from kubeai.operator.pod_trouble import MESSAGE_MAX_CHARS
from kubeai.operator.pods import Pod, PodObject
from kubeai.podspec import adapters as engine

log = get_logger(__name__)
FETCH_TIMEOUT_S = 3600.0
REMOVE_TIMEOUT_S = 60.0
ENGINE_TIMEOUT_S = 300.0  # vLLM reads the files before it answers
ANSWER_MAX_BYTES = 64 << 10
RETRY_FIRST_S, RETRY_MAX_S = 2.0, 120.0
API_KEY_VARIABLE = "VLLM_API_KEY"


class AdapterError(Exception):
    """Why an adapter could not be fetched, loaded or unloaded in a pod."""


class _Failure(msgspec.Struct):
    """A failed adapter in one pod; ``until_s``: when it is retried."""

    backoff: Backoff
    hash: str  # of the URL; empty when the adapter could not be unloaded
    why: str = ""
    until_s: float = 0.0


class _Work(msgspec.Struct):
    """State kept for one pod. It need not survive a restart."""

    task: asyncio.Task[None] | None = None
    loading: frozenset[str] = frozenset()  # adapters that the last task set out to load
    fetched: dict[str, str] = {}  # adapter → hash of the URL whose files are complete in the pod
    version: int = 0  # the pod's resourceVersion after our last write
    failures: dict[str, _Failure] = {}  # by adapter


class Adapters:
    """``changed(model)`` is called when a task has ended."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        writes: Writes,
        changed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._writes = writes
        self._changed = changed
        self._clock = clock
        self._works: dict[str, dict[str, _Work]] = {}  # model → incarnation → work
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    def look(self, model: Model, pods: Sequence[Pod]) -> tuple[AdaptersView, float | None]:
        """Start the work that the pods need. Returns the state and seconds until a retry is due."""
        pods = [pod for pod in pods if pod.counts and pod.uid]
        name = model.metadata.name
        works = self._works.setdefault(name, {})
        for gone in works.keys() - {pod.incarnation for pod in pods}:
            _cancel(works.pop(gone))
        wait_s: float | None = None
        for pod in pods:
            left_s = self._begin(model, pod, pods, works.setdefault(pod.incarnation, _Work()))
            wait_s = left_s if wait_s is None else min(wait_s, left_s or wait_s)
        if not pods:
            del self._works[name]
        return _view(model, pods, works), wait_s

    def _begin(self, model: Model, pod: Pod, pods: list[Pod], work: _Work) -> float | None:
        """Start the pod's task if it needs one. Returns seconds until the next retry is due."""
        todo = steps(model, pod, self._busy(pod, pods))
        needed = dict.fromkeys(todo.drop, "") | {one.name: one.hash for one in todo.load}
        for name, failure in list(work.failures.items()):
            if needed.get(name) != failure.hash:  # it was for a former URL: forget its back-off
                del work.failures[name]
        if work.task is not None or pod.version < work.version:
            return None
        now_s = self._clock()
        backing_off = {name: f.until_s for name, f in work.failures.items() if f.until_s > now_s}
        # Files are fetched while the engine is still starting. A pod without a loader, or without
        # the adapter's claim, is older than the Model's first such adapter and will be replaced.
        due = [one for one in todo.load if one.name not in backing_off]
        fetch = [
            one
            for one in due
            if work.fetched.get(one.name) != one.hash
            and pod.has_loader
            and engine.claim_of(one.url) in ("", *pod.claims)
        ]
        load = [one for one in due if work.fetched.get(one.name) == one.hash and pod.ready]
        drop = [name for name in todo.drop if name not in backing_off and pod.ready]
        if fetch or load or drop:
            work.loading = frozenset(one.name for one in todo.load)
            work.task = asyncio.get_running_loop().create_task(
                self._run(model, pod, work, drop, load, fetch)
            )
            self._tasks.add(work.task)
            work.task.add_done_callback(self._tasks.discard)
        return min(backing_off.values()) - now_s if backing_off else None

    def _busy(self, pod: Pod, pods: list[Pod]) -> set[str]:
        """Adapters that other pods are loading, including labels not yet observed."""
        works, busy = self._works[pod.model], set()
        for other in pods:
            if other is pod:
                continue
            busy |= {name for name, value in other.adapters if value == engine.LOADING}
            work = works.get(other.incarnation)
            if work is not None and (work.task is not None or other.version < work.version):
                busy |= work.loading
        return busy

    def forget(self, model: str) -> None:
        """The Model is gone."""
        for work in self._works.pop(model, {}).values():
            _cancel(work)

    def stopped_leading(self) -> None:
        """This KubeAI replica is no longer the leader: cancel all tasks."""
        for model in list(self._works):
            self.forget(model)

    async def stop(self) -> None:
        """Cancel all tasks and close the session."""
        self.stopped_leading()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    # -- one pod ---------------------------------------------------------------------------------

    async def _run(
        self,
        model: Model,
        pod: Pod,
        work: _Work,
        drop: list[str],
        load: list[Wanted],
        fetch: list[Wanted],
    ) -> None:
        """Process the adapters one by one. A failure does not stop the others."""
        key = model.spec.env.get(API_KEY_VARIABLE, "")
        try:
            if pod.adapters and not pod.adapters_current:  # the engine restarted and lost them
                labels = {name: engine.LOADING for name, _ in pod.adapters}
                await self._label(pod, work, labels)
                pod = msgspec.structs.replace(pod, adapters=tuple(labels.items()))
            for name in drop:
                await self._try(pod, work, name, "", self._drop(pod, work, name, key))
            for one in load:
                await self._try(pod, work, one.name, one.hash, self._load(pod, work, one, key))
            for one in fetch:
                await self._try(pod, work, one.name, one.hash, self._fetch(pod, work, one))
        except NotLeader:
            return
        except ApiError as error:  # from that first label; retried at the next reconcile
            log.warning("cannot update adapters", pod=pod.name, error=str(error))
            await asyncio.sleep(RETRY_FIRST_S)
        finally:
            work.task = None
        self._changed(pod.model)

    async def _try(
        self, pod: Pod, work: _Work, name: str, hash_: str, attempt: Coroutine[Any, Any, None]
    ) -> None:
        try:
            await attempt
        except NotLeader:
            raise
        except Exception as error:
            if not isinstance(error, AdapterError | ApiError):
                log.exception("unexpected adapter error", pod=pod.name, adapter=name)
            failure = work.failures.get(name)
            if failure is None or failure.hash != hash_:
                failure = work.failures[name] = _Failure(Backoff(RETRY_FIRST_S, RETRY_MAX_S), hash_)
            failure.why = f"adapter {name} on pod {pod.name}: {error}"[:MESSAGE_MAX_CHARS]
            failure.until_s = self._clock() + failure.backoff.next_s()
            log.warning("adapter not loaded", model=pod.model, error=failure.why)

    async def _fetch(self, pod: Pod, work: _Work, one: Wanted) -> None:
        if one.name in pod.loaded:  # files that the engine has loaded are about to change
            await self._label(pod, work, {one.name: engine.LOADING})
        work.fetched.pop(one.name, None)
        # Existing files may belong to another URL or be incomplete.
        await self._exec(pod, engine.remove_command(one.name), REMOVE_TIMEOUT_S)
        await self._exec(pod, engine.fetch_command(one.name, one.url), FETCH_TIMEOUT_S)
        work.fetched[one.name] = one.hash
        log.info("adapter fetched", pod=pod.name, adapter=one.name, url=one.url)

    async def _load(self, pod: Pod, work: _Work, one: Wanted, key: str) -> None:
        label = dict(pod.adapters).get(one.name)
        if label != engine.LOADING:
            await self._label(pod, work, {one.name: engine.LOADING})
        if label is not None:  # the engine may already have an adapter of that name
            await self._call(pod, engine.unload_call(one.name), key)
        await self._call(pod, engine.load_call(one.name), key)
        await self._label(pod, work, {one.name: one.hash})
        log.info("adapter loaded", pod=pod.name, adapter=one.name, url=one.url)

    async def _drop(self, pod: Pod, work: _Work, name: str, key: str) -> None:
        if dict(pod.adapters)[name] != engine.LOADING:
            await self._label(pod, work, {name: engine.LOADING})
        await self._call(pod, engine.unload_call(name), key)
        if pod.has_loader:
            await self._exec(pod, engine.remove_command(name), REMOVE_TIMEOUT_S)
        work.fetched.pop(name, None)
        await self._label(pod, work, {name: None})
        log.info("adapter unloaded", pod=pod.name, adapter=name)

    async def _label(self, pod: Pod, work: _Work, values: Mapping[str, str | None]) -> None:
        labels = {engine.LABEL_PREFIX + name: value for name, value in values.items()}
        annotations = {engine.RESTARTS_ANNOTATION: str(pod.restarts)}
        name, uid = pod.pods[0]
        patch = {"metadata": {"uid": uid, "labels": labels, "annotations": annotations}}
        async with self._writes:
            obj = await self._kube.patch(PODS, name, patch, self._namespace, type=PodObject)
        work.version = obj.metadata.version

    async def _exec(self, pod: Pod, command: list[str], timeout_s: float) -> None:
        """Run a command in each of the replica's pods, whose engines all read the files."""
        runs = (self._exec_in(name, command, timeout_s) for name, _ in pod.pods)
        for outcome in await asyncio.gather(*runs, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _exec_in(self, name: str, command: list[str], timeout_s: float) -> None:
        self._writes.check()
        result = await self._kube.exec(
            name,
            command,
            container=engine.LOADER_CONTAINER,
            namespace=self._namespace,
            timeout_s=timeout_s,
        )
        if result.exit_code:
            said = " ".join(result.output.split())[-MESSAGE_MAX_CHARS // 2 :]
            raise AdapterError(f"{' '.join(command)} exited with {result.exit_code}: {said}")

    async def _call(self, pod: Pod, call: engine.Call, key: str) -> None:
        """Send one request to the pod's engine. AdapterError if it fails or is not answered."""
        self._writes.check()
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=ENGINE_TIMEOUT_S, sock_connect=5.0),
                trace_configs=[fence(self._writes.check)],
            )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"http://{pod.address}{call.path}"
        try:
            async with self._session.post(url, json=call.body, headers=headers) as response:
                answer = (await response.content.read(ANSWER_MAX_BYTES)).decode(errors="replace")
                why = engine.refusal(call, response.status, answer)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._writes.check()
            why = f"{call.path}: {error or type(error).__name__}"
        if why:
            raise AdapterError(why)


def _cancel(work: _Work) -> None:
    if work.task is not None:
        work.task.cancel()


def _view(model: Model, pods: Sequence[Pod], works: dict[str, _Work]) -> AdaptersView:
    ready = [pod for pod in pods if pod.serves]
    wanted = {(a.name, engine.url_hash(a.url)) for a in model.spec.adapters}
    complete = [pod for pod in ready if pod.adapters_current and wanted <= set(pod.adapters)]
    failed: dict[str, ModelStatusAdapter] = {}
    for work in works.values():
        for name, failure in work.failures.items():
            failed.setdefault(name, ModelStatusAdapter(name=name, message=failure.why))
    return AdaptersView(len(ready), len(complete), tuple(failed.values()))
