"""What an inference engine does, without one: no I/O, no clock, the time is handed in.

``engine`` batches and caches as vLLM does, ``text`` makes the tokens. The mock engine runs them
in real time; benchmarks run them in virtual time. ``fleet`` is a Model's replicas as the autoscaler
sees them: it plays ``traces`` against a rule, its own or one of ``rules``.
"""
