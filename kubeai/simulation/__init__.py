"""What an inference engine does, without one: no I/O, no clock, the time is handed in.

``engine`` batches and caches as vLLM does, ``text`` makes the tokens. The mock engine runs them
in real time; benchmarks and the autoscaler's traces run them in virtual time.
"""
