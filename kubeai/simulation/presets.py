"""Parameters of real engines, for simulations and the mock engine.

Each preset states its sources; docs/explain/benchmarks.md compares it with measurements.
"""

from __future__ import annotations

from kubeai.simulation.engine import EngineConfig

PRESETS: dict[str, EngineConfig] = {
    # 8 GB of weights at 75 % of 300 GB/s memory bandwidth: 35 ms per step. 16 GFLOP per token at
    # a third of 242 TFLOPS (FP8, dense): 5,000 tokens/s. Keys and values in BF16, 128 KiB per
    # token, read at 85 % of the memory bandwidth. 24 GB leave room for 80,000 tokens. These
    # parameters reproduce the token times and running sequences of the published benchmark of
    # the Go version of KubeAI with vLLM V1 on 8 L4s (2025).
    "llama-3.1-8b-fp8-l4": EngineConfig(
        max_batch=256,
        step_tokens=16_384,
        prefill_tokens_per_s=5_000.0,
        decode_tokens_per_s=0.0,
        weights_s=0.035,
        context_tokens_per_s=2e6,
        cache_blocks=5_000,
    ),
    # From NVIDIA's published results for Llama 3.3 70B, FP8, on two H100s (NIM 1.8.0, 5,000 input
    # and 500 output tokens): a single request takes 407 ms to the first token and 18.6 ms per
    # token; at a concurrency of 100 and more, 85 run, which is what fits in the FP8 KV cache
    # (160 KiB per token, read at 85 % of 6.7 TB/s).
    "llama-3.3-70b-fp8-h100x2": EngineConfig(
        max_batch=256,
        step_tokens=8_192,
        prefill_tokens_per_s=13_500.0,
        decode_tokens_per_s=0.0,
        weights_s=0.0186,
        context_tokens_per_s=35e6,
        cache_blocks=28_000,
    ),
    # Measured with vLLM 0.32 on CPUs: a Llama with 4 layers of width 768, one core per engine, and
    # prompts of 100 to 6,000 tokens. docs/explain/benchmarks.md has the comparison.
    "tiny-cpu": EngineConfig(
        max_batch=32,
        step_tokens=2_048,
        prefill_tokens_per_s=3_770.0,
        attention_pairs_per_s=6.06e6,
        decode_tokens_per_s=0.0,
        weights_s=0.0065,
        cache_blocks=400,
        block_tokens=32,
    ),
}
