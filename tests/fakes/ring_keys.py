"""Names of endpoints, and keys to place on a ring."""

import random


def pods(n: int) -> list[str]:
    return [f"model-a-{i:04x}" for i in range(n)]


def keys(n: int, seed: int = 1) -> list[int]:
    source = random.Random(seed)
    return [source.getrandbits(64) for _ in range(n)]
