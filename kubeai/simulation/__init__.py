"""Simulated inference engines, without sockets or clocks: callers pass in the time.

``engine`` batches and caches like vLLM, ``text`` generates tokens, and ``presets`` hold the
parameters of real engines. The mock engine runs them in real time, benchmarks in virtual time:
``cluster`` simulates the engines behind ``routers`` under the ``sessions`` of ``traffic``, of
``trace_files`` or of ``access_logs``, and produces ``results``; ``replicas`` measures several
KubeAI replicas in front of them. ``fleet`` is a coarser model of a Model's replicas for the
autoscaler: it runs ``traces`` against our rule and those in ``rules``.
"""
