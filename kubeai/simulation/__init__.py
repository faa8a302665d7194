"""What an inference engine does, without one: no sockets, no clock, the time is handed in.

``engine`` batches and caches as vLLM does, ``text`` makes the tokens, ``presets`` are the figures
of real engines. The mock engine runs them in real time; benchmarks run them in virtual time:
``cluster`` is what is behind one gateway, under ``traffic``, and tells ``records``; ``replicas``
puts several replicas of KubeAI before such engines. ``fleet`` is a Model's replicas seen from far
off, for the autoscaler: it plays ``traces`` against its rule, and against those in ``rules``.
"""
