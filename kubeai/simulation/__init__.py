"""What an inference engine does, without one: no I/O, no clock, the time is handed in.

``engine`` batches and caches as vLLM does, ``text`` makes the tokens. The mock engine runs them
in real time; benchmarks run them in virtual time. ``replicas`` puts several replicas of KubeAI
before such engines. ``fleet`` is a Model's replicas seen from far off, for the autoscaler: it plays
``traces`` against its rule, and against those in ``rules``.
"""
