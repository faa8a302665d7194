"""Reads how many tokens each engine's KV cache holds, so that the prefix index knows evictions.

vLLM reports it at ``/metrics``, and so does SGLang with ``--enable-metrics``. Neither changes it
while it runs, so it is read once for each endpoint. Only Models with the strategy PrefixCache use
the index, so only their endpoints are read. The metrics of llama.cpp and Ollama do not have it.
Promises: an endpoint whose size cannot be read keeps the Publisher's default; an engine that hangs
or misreports affects nothing but its own entries in the index.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client.parser import text_string_to_metric_families

from kubeai._prefix import PrefixIndex
from kubeai.kube.backoff import Backoff
from kubeai.logs import get_logger
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint

log = get_logger(__name__)

METRIC = "vllm:cache_config_info"
SGLANG_METRIC = "sglang:max_total_num_tokens"
READS_MAX = 16  # at a time
READ_TIMEOUT_S = 5.0
METRICS_MAX_BYTES = 8 << 20
ATTEMPTS_MAX = 5
RETRY_FIRST_S, RETRY_MAX_S = 1.0, 30.0
CACHE_MAX_TOKENS = 1 << 31

_Lease = tuple[int, int]  # an endpoint's row and generation: those of a new pod are new


class SizeUnknown(Exception):
    """Why an engine's cache size could not be read."""


class CacheSizes:
    """Reads the size of each new endpoint's cache and sets it in the index."""

    def __init__(self, index: PrefixIndex, publisher: Publisher) -> None:
        self._index = index
        self._publisher = publisher
        self._reads: dict[str, dict[_Lease, asyncio.Task[None]]] = {}  # model → its endpoints'
        self._slots = asyncio.Semaphore(READS_MAX)
        self._session: aiohttp.ClientSession | None = None

    def rerouted(self, model: str) -> None:
        """The model's route has changed: read its new endpoints, forget those that are gone."""
        route = self._publisher.route(model)
        indexed = route is not None and route.strategy == "PrefixCache"
        engine = route.engine if route is not None and indexed else ""
        endpoints = route.endpoints if route is not None and engine in READERS else ()
        known = self._reads.pop(model, {})
        reads = {}
        for each in endpoints:
            lease = each.row, each.generation
            reads[lease] = (
                known.pop(lease)
                if lease in known
                else asyncio.create_task(self._read_size(each, engine))
            )
        for task in known.values():
            task.cancel()
        if reads:
            self._reads[model] = reads

    async def close(self) -> None:
        """Stop reading."""
        tasks = [task for reads in self._reads.values() for task in reads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _read_size(self, endpoint: Endpoint, engine: str) -> None:
        backoff = Backoff(RETRY_FIRST_S, RETRY_MAX_S)
        while True:
            try:
                async with self._slots:
                    tokens = await self._read_metrics(endpoint.address, engine)
            except SizeUnknown as error:
                wait_s = backoff.next_s()
                if backoff.failures == ATTEMPTS_MAX:
                    log.info("cache size unknown", endpoint=endpoint.name, error=str(error))
                    return
                await asyncio.sleep(wait_s)
            else:
                self._index.set_cache(endpoint.row, tokens)
                log.info("cache size read", endpoint=endpoint.name, tokens=tokens)
                return

    async def _read_metrics(self, address: str, engine: str) -> int:
        metric, read = READERS[engine]
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=READ_TIMEOUT_S)
            self._session = aiohttp.ClientSession(timeout=timeout)
        url, lines, read_bytes = f"http://{address}/metrics", [], 0
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status != 200:
                    raise SizeUnknown(f"/metrics: status {response.status}")
                async for line in response.content:
                    read_bytes += len(line)
                    if read_bytes > METRICS_MAX_BYTES:
                        raise SizeUnknown(f"/metrics has more than {METRICS_MAX_BYTES:,} bytes")
                    if line.startswith(metric.encode()):
                        lines.append(line.decode(errors="replace"))
        except (aiohttp.ClientError, HttpProcessingError, TimeoutError) as error:
            raise SizeUnknown(f"/metrics: {error!r}") from None
        return read("".join(lines))


def cache_tokens(text: str) -> int:
    """How many tokens a vLLM server's KV caches keep, from its metrics; or SizeUnknown.

    0: prefix caching is off. A server with data parallelism has a line for each of its engines.
    """
    sizes, blocks_tokens = {}, 0
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name != METRIC:
                    continue
                labels = sample.labels
                if labels.get("enable_prefix_caching") == "False":
                    return 0
                # That of one engine, in recent versions. Older ones have only the blocks, those of
                # all engines on each line, which are too many where layers differ in their cache.
                size = labels.get("kv_cache_size_tokens", "None")
                if size != "None":
                    sizes[labels.get("engine")] = int(size)
                blocks_tokens = int(labels["num_gpu_blocks"]) * int(labels["block_size"])
    except (KeyError, ValueError) as error:
        raise SizeUnknown(f"{METRIC}: {error!r}") from None
    return _checked(sum(sizes.values()) or blocks_tokens, METRIC)


def sglang_cache_tokens(text: str) -> int:
    """How many tokens an SGLang server's KV caches keep, from its metrics; or SizeUnknown.

    A server with data parallelism has a line for each of its ranks. Those of tensor parallelism
    share one cache.
    """
    sizes: dict[str | None, int] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == SGLANG_METRIC:
                    rank = sample.labels.get("dp_rank")
                    sizes[rank] = max(sizes.get(rank, 0), int(sample.value))
    except (ValueError, OverflowError) as error:
        raise SizeUnknown(f"{SGLANG_METRIC}: {error!r}") from None
    return _checked(sum(sizes.values()), SGLANG_METRIC)


def _checked(tokens: int, metric: str) -> int:
    if not 1 <= tokens <= CACHE_MAX_TOKENS:
        raise SizeUnknown(f"{metric}: {tokens:,} tokens" if tokens else f"/metrics has no {metric}")
    return tokens


# By engine: the metric, and what reads it.
READERS: dict[str, tuple[str, Callable[[str], int]]] = {
    "VLLM": (METRIC, cache_tokens),
    "SGLang": (SGLANG_METRIC, sglang_cache_tokens),
}
