"""The control-plane process: owns the listeners, the load table and the worker processes.

It publishes routes and API keys to the workers, is notified of held requests, restarts workers that
die, serves ``/metrics``, ``/healthz`` and ``/readyz``, and runs the operator. It handles no
inference requests.
``kubeai serve`` and ``kubeai local`` both run :class:`Supervisor`.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
from collections.abc import Callable, Collection, Sequence
from functools import partial

from aiohttp import web

from kubeai._key_table import KeyTable
from kubeai.api.api_key import ApiKey
from kubeai.api.config.system import SystemConfig
from kubeai.errors import KubeAIError
from kubeai.gateway.tracing import check_tracing
from kubeai.kube.client import Kube
from kubeai.logs import get_logger
from kubeai.operator import Operator
from kubeai.processes import Spawn, spawn_by_exec
from kubeai.routing.channel import Down, Drain
from kubeai.routing.key_publisher import KeyPublisher
from kubeai.routing.keys import KeyDelta
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Route
from kubeai.supervisor.cache_sizes import CacheSizes
from kubeai.supervisor.checks import check_config, check_workers
from kubeai.supervisor.console.app import Console
from kubeai.supervisor.console.state import Fleet, ModelSummary, Worker
from kubeai.supervisor.console.traffic import Traffic
from kubeai.supervisor.key_metrics import KeyLimits
from kubeai.supervisor.listeners import authority, listen, parse_address
from kubeai.supervisor.loads import AllLoads
from kubeai.supervisor.memory import Memory
from kubeai.supervisor.message_streams import MessageStreams
from kubeai.supervisor.metrics import Metrics
from kubeai.supervisor.peers.peers import LOADS_PATH, METRICS_HEADERS, Peers
from kubeai.supervisor.pod_condition import PodCondition
from kubeai.supervisor.usage.book import UsageBook
from kubeai.supervisor.worker_process import MESSENGER, Program, Reports, WorkerProcess

log = get_logger(__name__)

SWEEP_INTERVAL_S = 0.5
# Between the drain timeout and SIGKILL.
EXIT_GRACE_S = 5.0


class Supervisor:
    """Connects the operator to the workers and keeps the worker processes running.

    ``identity`` names this KubeAI replica as the lease holder. ``pod`` is the name of its pod,
    whose labels select the peers (empty: there are none). ``host`` and ``port`` are where
    the ``workers`` processes serve requests (port 0: any free one). ``spawn`` starts a process.
    ``started`` is called once, when every worker accepts requests. ``local``: the Kubernetes API
    is that of ``kubeai local``. KubeAIError if an argument or the config cannot be used.
    """

    synced = False  # whether all Models and API keys are known
    stopping = False
    metrics_address = health_address = ""  # bound ones; empty until `run` serves
    _announced = False  # whether `started` has been called
    _signals = 0  # received so far

    def __init__(
        self,
        kube: Kube,
        config: SystemConfig,
        *,
        namespace: str,
        identity: str,
        pod: str = "",
        host: str = "0.0.0.0",
        port: int = 8000,
        workers: int = 1,
        spawn: Spawn = spawn_by_exec,
        started: Callable[[], None] = lambda: None,
        local: bool = False,
    ) -> None:
        check_workers(workers, config)
        check_config(config)
        check_tracing()
        has_streams = bool(config.messaging.streams)
        self.config = config
        self._memory = Memory.create(workers + has_streams, keys=config.gateway.keys.required)
        self.table, self.index, self.queues, self.key_table, journal = self._memory
        self.publisher = Publisher(self.table, self.index, self.queues)
        # None: requests need no key.
        self.keys: KeyPublisher | None = None
        if self.key_table is not None:
            self.keys = KeyPublisher(self.key_table, self.publisher.advance)
        self.peers = self._make_peers(kube, namespace, identity, pod)
        self._cache_sizes = CacheSizes(self.index, self.publisher)
        self.operator = Operator(
            kube,
            config,
            namespace=namespace,
            identity=identity,
            publish=self._publish,
            loads=AllLoads(self.table, self.publisher, self.peers),
            publish_key=None if self.keys is None else self._publish_key,
        )
        self._usage = UsageBook(
            kube, namespace, identity, keys=self._key_names, models=self.publisher.models
        )
        self._started = started
        # Another gateway sends the requests: there is nothing to serve here.
        listeners = [] if config.external else listen(host, port, workers, "--port")
        self._traffic = Traffic(journal, self.table)
        self._fleet = Fleet(self.operator, self.publisher, self.table, self._traffic)
        self._console: Console | None = None
        if config.gateway.ui.enabled:
            self._console = self._make_console(kube, namespace, local=local)
        self._streams = MessageStreams(config.messaging)
        self._metrics = self._make_metrics()
        self.port: int = listeners[0].getsockname()[1] if listeners else 0
        self._workers, self._messenger = self._make_processes(listeners, workers, spawn)
        self._processes = [*self._workers, *filter(None, [self._messenger])]
        self._pod_condition: PodCondition | None = None
        if pod and has_streams:
            self._pod_condition = PodCondition(kube, namespace, pod, lambda: self._streams.problems)
        self._stop = asyncio.Event()

    # -- the parts of one supervisor ---------------------------------------------------------------

    @property
    def _key_rows(self) -> tuple[KeyTable, KeyPublisher] | None:
        """None: requests need no key."""
        if self.key_table is None or self.keys is None:
            return None
        return self.key_table, self.keys

    def _make_peers(self, kube: Kube, namespace: str, identity: str, pod: str) -> Peers:
        return Peers(
            kube,
            namespace,
            identity,
            self.table,
            self.index,
            self.publisher,
            pod=pod,
            addresses=self.config.fixed_self_metric_addrs,
            keys=self._key_rows,
            queues=self.queues,
        )

    def _make_metrics(self) -> Metrics:
        keys = self._key_rows
        return Metrics(
            self.table,
            self.publisher,
            self.peers.silences_s,
            self._streams if self.config.messaging.streams else None,
            limits=None if keys is None else KeyLimits(*keys),
            usage=None if keys is None else self._usage.collector,
            queues=self.queues,
        )

    def _make_processes(
        self, listeners: Sequence[socket.socket], workers: int, spawn: Spawn
    ) -> tuple[list[WorkerProcess], WorkerProcess | None]:
        """The workers, and the messenger if the config has message streams.

        The messenger's column comes after those of all ``workers``, listeners or not.
        """
        program = Program(self.config.gateway)
        if self._console is not None:
            program = program._replace(console_path=self._console.path)
        reports = Reports(
            self._worker_ready,
            self.operator.demand,
            events=self._metrics.events.report,
            usage=self._usage.add,
        )
        start = partial(WorkerProcess, memory=self._memory, snapshot=self._snapshot, spawn=spawn)
        started = [
            start(column, sock, program=program, reports=reports)
            for column, sock in enumerate(listeners)
        ]
        messaging, streams = self.config.messaging, self._streams
        if not messaging.streams:
            return started, None
        return started, start(
            workers,
            None,
            program=program._replace(module=MESSENGER, messaging=messaging),
            reports=reports._replace(ready=lambda: None, streams=streams.report, end=streams.ended),
        )

    def _make_console(self, kube: Kube, namespace: str, *, local: bool) -> Console:
        return Console(
            kube,
            namespace,
            self._fleet,
            self._traffic,
            workers=self._worker_states,
            stream_problems=lambda: self._streams.problems,
            synced=lambda: self.synced,
            local=local,
            keys=self.keys is not None,
        )

    # -- what the workers and the operator call ------------------------------------------------

    def _publish(self, model: str, route: Route | None) -> None:
        try:
            delta = self.publisher.update(model, route)
        except KubeAIError as error:  # the load table is full: the model keeps its old route
            log.error("route not published", model=model, error=str(error))
            return
        if delta is None:
            return
        if delta.route is not None:
            self._traffic.names.note(delta.route)
        self.peers.rerouted(model)
        self._cache_sizes.rerouted(model)
        self._send(delta)

    def _publish_key(self, name: str, key: ApiKey | None) -> None:
        assert self.keys is not None, "keys are watched only if they are required"
        try:
            delta = self.keys.update(name, key)
        except KubeAIError as error:  # the key table is full: the key does not exist for workers
            log.error("API key not published", secret=name, error=str(error))
            return
        if delta is not None:
            self._key_changed(delta)

    def _key_changed(self, delta: KeyDelta) -> None:
        self.peers.key_changed(delta.name)
        self._send(delta)

    def _send(self, message: Down) -> None:
        """Send a change to all processes that have the state before it."""
        if self.synced:
            for process in self._processes:
                process.send(message)

    def _key_names(self) -> Collection[str] | None:
        """The names of the API keys that exist; None: not known yet."""
        return self.keys.names() if self.keys is not None and self.synced else None

    def _worker_ready(self) -> None:
        """Announce that requests are served, once all workers are ready."""
        if self.ready and not self._announced:
            self._announced = True
            self._started()

    def _worker_states(self) -> list[Worker]:
        return [Worker(w.column, w.ready, w.restarts) for w in self._workers]

    @property
    def ready(self) -> bool:
        """Whether every worker serves requests, with all Models known.

        The messenger does not count: without it, messages wait in their broker.
        """
        return self.synced and not self.stopping and all(w.ready for w in self._workers)

    def models(self) -> list[ModelSummary]:
        """What is shown of each Model, sorted by name. Without the console, rates are 0."""
        self._traffic.read()
        return self._fleet.models()

    # -- lifecycle -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until :meth:`stop` or a signal; then drain, release the lease and return."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        runner = await self._serve_pages()
        if self._console is not None:
            await self._console.start()
        operator = asyncio.create_task(self.operator.run(), name="operator")
        operator.add_done_callback(lambda _: self._stop.set())
        lives = [asyncio.create_task(process.run()) for process in self._processes]
        for life in lives:
            life.add_done_callback(lambda _: self._stop.set())
        background = [
            asyncio.create_task(self._hand_out_routes()),
            asyncio.create_task(self._sweep()),
            asyncio.create_task(self.peers.run(parse_address(self.metrics_address)[1])),
            asyncio.create_task(self._usage.run()),
        ]
        if self._pod_condition is not None:
            background.append(asyncio.create_task(self._pod_condition.run()))
        for task in background:
            task.add_done_callback(self._background_ended)
        try:
            await self._stop.wait()
            self._log_drain()
            self.stopping = True
            for process in self._processes:
                process.stopping = True
            if self._console is not None:
                await self._console.stop()  # the workers would wait for its streams
            # Release the lease now: the drain may last as long as the longest request.
            resigned = asyncio.create_task(self.operator.resign())
            await self._drain(lives)
            await resigned
            await self.operator.stop()
            await asyncio.gather(operator, return_exceptions=True)
        finally:
            for process in self._processes:
                process.kill()
            for task in (operator, *lives, *background):
                task.cancel()
            await asyncio.gather(operator, *lives, *background, return_exceptions=True)
            await self._usage.close()
            self.peers.close()
            await self._cache_sizes.close()
            await runner.cleanup()
            if self._console is not None:
                await self._console.close()
            for worker in self._workers:
                worker.close_listener()
            self._memory.close()
        for task in (operator, *lives, *background):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    def stop(self) -> None:
        """Start draining; ``run`` returns when all workers have exited."""
        self._stop.set()

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._stop.set()  # a bug: exit and be restarted rather than keep running without it

    def _signalled(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1:  # a second signal ends the drain
            if self._signals == 2:
                log.warning("stopping now", message="requests in flight are cut off")
            for process in self._processes:
                process.kill()

    def _log_drain(self) -> None:
        """Say how long the drain may take, and how to end it."""
        gateway = self.config.gateway
        drain_max_s = gateway.drain_accept_s + gateway.drain_timeout_s
        log.info(
            "stopping",
            message=f"waiting up to {drain_max_s:g} s for requests in flight. Ctrl-C or SIGTERM "
            f"again ends them now.",
            drain_max_s=drain_max_s,
            active=self.table.active_total(),
        )

    def _snapshot(self) -> Sequence[Down]:
        if not self.synced:
            return ()
        routes = self.publisher.snapshot()
        return (routes,) if self.keys is None else (routes, self.keys.snapshot(routes.version))

    async def _hand_out_routes(self) -> None:
        await self.operator.synced.wait()
        self.synced = True
        for message in self._snapshot():
            self._send(message)
        if not self._workers:
            self._worker_ready()
        # Objects created at start-up live as long as the process. A collection that scans them
        # again blocks the event loop for 50 ms.
        gc.collect()
        gc.freeze()

    async def _sweep(self) -> None:
        """Free unused rows. Signal demand again, in case a worker's message was lost. Kill
        processes that hang, which would keep rows from being freed."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            for process in self._processes:
                process.check(SWEEP_INTERVAL_S)
            acknowledged = [
                self.table.acknowledged(each.column) for each in self._processes if each.alive
            ]
            self.peers.freed(self.publisher.reclaim(acknowledged))
            if self.keys is not None:
                for delta in self.keys.reclaim(acknowledged, self.publisher.version):
                    self._key_changed(delta)
            for model in self.publisher.models():
                row = self.publisher.row(model)
                if (
                    row is not None
                    and self.table.held(row)
                    and not self.publisher.endpoint_rows(model)
                ):
                    self.operator.demand(model)

    async def _drain(self, lives: list[asyncio.Task[None]]) -> None:
        if not lives:
            return
        gateway = self.config.gateway
        message = Drain(gateway.drain_accept_s, gateway.drain_timeout_s)
        for process in self._processes:
            process.send(message)
        if any(worker.alive for worker in self._workers):
            await asyncio.wait(lives, timeout=gateway.drain_accept_s)
        # The workers close their copies of the listeners now. Close the originals too, or the
        # kernel would keep queueing connections that nobody accepts.
        for worker in self._workers:
            worker.close_listener()
        _, late = await asyncio.wait(lives, timeout=gateway.drain_timeout_s + EXIT_GRACE_S)
        if late:
            log.error("workers did not drain in time, killing them", count=len(late))

    # -- local routes ------------------------------------------------------------------------------

    async def _serve_pages(self) -> web.AppRunner:
        """Serve all local routes on both the metrics and the health address.

        They include the loads that the peers read.
        """
        app = web.Application()
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get(LOADS_PATH, self.peers.serve)
        app.router.add_get("/healthz", self._get_healthz)
        app.router.add_get("/readyz", self._get_readyz)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        self.metrics_address = await _serve(runner, "metricsAddr", self.config.metrics_addr)
        self.health_address = await _serve(runner, "healthAddress", self.config.health_address)
        return runner

    async def _get_metrics(self, request: web.Request) -> web.Response:
        body, content_type = await self._metrics.scrape(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type, **METRICS_HEADERS})

    async def _get_healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _get_readyz(self, request: web.Request) -> web.Response:
        text = "ok\n" if self.ready else "stopping\n" if self.stopping else "not synced\n"
        if "verbose" in request.query and self._messenger is not None:
            problems = [f"message stream {problem}\n" for problem in self._streams.problems]
            text += "".join(problems) or "message streams connected\n"
        return web.Response(status=200 if self.ready else 503, text=text)


async def _serve(runner: web.AppRunner, key: str, address: str) -> str:
    """Serve on an address, and return the bound one. ``key``: of the config, for errors."""
    host, port = parse_address(address)
    try:
        (sock,) = listen(host, port, 1, key)
    except KubeAIError:
        await runner.cleanup()
        raise
    await web.SockSite(runner, sock).start()
    return authority(*sock.getsockname()[:2])
