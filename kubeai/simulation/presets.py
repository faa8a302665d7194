"""Engines with the figures of real ones, for simulations and the mock engine.

Each says where its figures come from, and is held against measurements in docs/benchmarks.md.
"""

from __future__ import annotations

from kubeai.simulation.engine import EngineConfig

PRESETS: dict[str, EngineConfig] = {
    # Weights of 8 GB and a memory of 300 GB/s, of which a step has three quarters: 35 ms. 16 GFLOP
    # a token, of 242 TFLOPS (FP8, dense) a third: 5,000 a second. Keys and values in BF16, 128 KiB
    # a token, at 85 % of the memory's rate. What 24 GB leave for them: 80,000 tokens. Measured:
    # KubeAI in Go's published benchmark with vLLM V1 on 8 L4s, whose token times and running
    # sequences these figures give (2025).
    "llama-3.1-8b-fp8-l4": EngineConfig(
        max_batch=256,
        step_tokens=16_384,
        prefill_tokens_per_s=5_000.0,
        decode_tokens_per_s=0.0,
        weights_s=0.035,
        context_tokens_per_s=2e6,
        cache_blocks=5_000,
    ),
    # By NVIDIA's published figures for Llama 3.3 70B, FP8, on two H100s (NIM 1.8.0, 5,000 tokens in
    # and 500 out): alone 18.6 ms a token and 407 ms to the first; from 100 at a time on 85 run,
    # which is what fits in FP8 keys and values (160 KiB a token, read at 85 % of 6.7 TB/s).
    "llama-3.3-70b-fp8-h100x2": EngineConfig(
        max_batch=256,
        step_tokens=8_192,
        prefill_tokens_per_s=13_500.0,
        decode_tokens_per_s=0.0,
        weights_s=0.0186,
        context_tokens_per_s=35e6,
        cache_blocks=28_000,
    ),
    # Measured with vLLM 0.32 on CPUs: a Llama of 2 layers and 256 wide, one core an engine, shared
    # with others. What its steps take is vLLM's own work; docs/benchmarks.md has the comparison.
    "tiny-cpu": EngineConfig(
        max_batch=32,
        step_tokens=2_048,
        prefill_tokens_per_s=1_800.0,
        decode_tokens_per_s=0.0,
        weights_s=0.062,
        cache_blocks=199,
        block_tokens=32,
    ),
}
