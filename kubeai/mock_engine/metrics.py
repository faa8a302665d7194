"""The mock engine's ``/metrics``, with vLLM's metric names. Imported on the first scrape.

For SGLang it also has the size of the cache by SGLang's name, which KubeAI reads.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as Base
from typing_extensions import override

from kubeai.mock_engine.request_log import RequestLog
from kubeai.simulation.engine import Engine


class Collector(Base):
    """Reads the engine's own counters on each scrape."""

    def __init__(
        self, engine: Engine, request_log: RequestLog, model: str, emulated: str = "VLLM"
    ) -> None:
        self._emulated = emulated  # an engine of kubeai.mock_engine.options
        self._engine = engine
        self._request_log = request_log
        self._model = model

    @override
    def collect(self) -> Iterable[Metric]:
        engine = self._engine
        used = engine.cache.used / engine.cache.capacity
        yield self._gauge("num_requests_running", "Requests in the batch.", engine.running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", engine.waiting)
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage; 1 means 100 %.", used)
        yield self._cache_config()
        if self._emulated == "SGLang":
            yield self._sglang_cache()
        for name, meaning, value in (
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the cache.",
                engine.prefix_queries,
            ),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", engine.prefix_hits),
            ("prompt_tokens", "Prompt tokens processed.", engine.prompt_tokens),
            ("generation_tokens", "Tokens generated.", engine.output_tokens),
            ("num_preemptions", "Sequences preempted.", engine.preemptions),
            ("request_success", "Sequences finished.", engine.finished),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", meaning, labels=("engine", "model_name"))
            counter.add_metric(("0", self._model), value)
            yield counter
        received = CounterMetricFamily("mock_requests", "POSTs received.", labels=("path",))
        for path, value in self._request_log.received.items():
            received.add_metric((path,), value)
        yield received

    def _sglang_cache(self) -> Metric:
        config = self._engine.config
        tokens = config.cache_blocks * config.block_tokens
        gauge = GaugeMetricFamily(
            "sglang:max_total_num_tokens", "Tokens that the KV cache holds.", labels=["model_name"]
        )
        gauge.add_metric((self._model,), tokens)
        return gauge

    def _cache_config(self) -> Metric:
        config = self._engine.config
        labels = {
            "engine": "0",
            "block_size": str(config.block_tokens),
            "num_gpu_blocks": str(config.cache_blocks),
            "enable_prefix_caching": "True",
            "kv_cache_size_tokens": str(config.cache_blocks * config.block_tokens),
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=list(labels))
        info.add_metric(list(labels.values()), 1)
        return info

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", meaning, labels=("engine", "model_name"))
        gauge.add_metric(("0", self._model), value)
        return gauge
