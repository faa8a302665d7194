"""The mock engine's command-line options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

import msgspec

from kubeai.api.config.duration import parse_duration
from kubeai.errors import KubeAIError
from kubeai.simulation.engine import EngineConfig
from kubeai.simulation.presets import PRESETS

ENGINES = ("VLLM", "OLlama", "FasterWhisper", "Infinity", "SGLang", "LlamaCpp")
MAX_MODEL_LEN = 32_768


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The options of ``kubeai mock-engine``."""

    engine: str = "VLLM"
    model: str = "mock"
    served_model_names: tuple[str, ...] = ("mock",)
    host: str = "127.0.0.1"
    port: int = 8000
    startup_delay_s: float = 0.0
    max_model_len: int = MAX_MODEL_LEN
    reply_tokens: int = 48  # mean length of replies without a limit; varies by ±50 %
    end_early: bool = False  # whether replies with a limit end by themselves
    die_after_requests: int = 0  # 0: never
    fail_every: int = 0  # 0: never
    config: EngineConfig = EngineConfig()


class UsageError(KubeAIError):
    """A flag has an invalid value."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Parse the flags; also returns the unknown ones, each with its values in one string.

    Pod manifests pass the flags of the emulated engine, so unknown flags are not an error.
    UsageError names the flag whose value is invalid.
    """
    parser = _parser()
    found, unknown = parser.parse_known_args(argv)
    length = found.max_model_len
    given = {
        "max_batch": found.max_batch,
        "step_tokens": found.step_tokens,
        "prefill_tokens_per_s": found.prefill_tokens_per_second,
        "decode_tokens_per_s": found.decode_tokens_per_second,
        "cache_blocks": found.cache_blocks,
    }
    config = msgspec.structs.replace(
        PRESETS[found.preset] if found.preset else EngineConfig(),
        **{name: value for name, value in given.items() if value is not None},
    )
    held = config.cache_blocks * config.block_tokens
    length = min(MAX_MODEL_LEN, held) if length is None else length
    if length > held:
        raise UsageError(
            f"--cache-blocks: {config.cache_blocks} blocks hold {held} tokens, "
            f"less than --max-model-len {length}"
        )
    options = Options(
        engine=found.engine,
        model=found.model,
        served_model_names=tuple(found.served_model_name or (found.model,)),
        host=found.host or os.environ.get("POD_IP") or "127.0.0.1",
        port=found.port,
        startup_delay_s=found.startup_delay,
        max_model_len=length,
        reply_tokens=found.reply_tokens,
        end_early=found.end_early,
        die_after_requests=found.die_after_requests,
        fail_every=found.fail_every,
        config=config,
    )
    return options, _group(unknown)


def _group(unknown: list[str]) -> list[str]:
    groups: list[str] = []
    for word in unknown:
        if word.startswith("-") or not groups or not groups[-1].startswith("-"):
            groups.append(word)
        else:
            groups[-1] += f" {word}"
    return groups


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kubeai mock-engine",
        description="Emulate a vLLM engine: synthetic text, realistic timing, no GPU.",
        epilog="Other flags are ignored, so that the emulated engine's flags can be passed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--engine", choices=ENGINES, default="VLLM", help="engine to emulate (default: VLLM)")
    add("--model", default="mock", help="model path, and its name without --served-model-name")
    add("--served-model-name", nargs="+", metavar="NAME", help="model names accepted in requests")
    add("--host", help="address to listen on (default: $POD_IP, else 127.0.0.1)")
    add("--port", type=_whole(0, 65535), default=8000,
        help="port to listen on, 0 for a free one (default: 8000)")  # fmt: skip
    add("--startup-delay", type=_delay, default=0.0, metavar="DURATION",
        help="answer 503 for this long after the start, e.g. 1m30s")  # fmt: skip
    add("--preset", choices=sorted(PRESETS), help="speed and memory of a real engine; the "
        "flags below override it")  # fmt: skip
    add("--prefill-tokens-per-second", type=_rate, metavar="RATE",
        help="prefill rate of the engine, 0 for instant (default: 8000)")  # fmt: skip
    add("--decode-tokens-per-second", type=_rate, metavar="RATE",
        help="decode rate per sequence, 0 for instant (default: 50)")  # fmt: skip
    add("--max-batch", type=_whole(1, 65536), help="maximum running sequences (default: 256)")
    add("--step-tokens", type=_whole(1, 1 << 20), help="token budget per step (default: 2048)")
    add("--cache-blocks", type=_whole(1, 1 << 24),
        help="KV cache size in blocks of 16 tokens (default: 4096)")  # fmt: skip
    add("--max-model-len", type=_length, metavar="TOKENS",
        help="context length (default: 32768, or what the KV cache holds)")  # fmt: skip
    add("--reply-tokens", type=_whole(1, 1 << 20), default=48,
        help="mean reply length without max_tokens; varies by half (default: 48)")  # fmt: skip
    add("--end-early", action="store_true",
        help="end replies after about --reply-tokens although max_tokens allows more")  # fmt: skip
    add("--die-after-requests", type=_whole(0, 1 << 31), default=0, metavar="N",
        help="kill the process at the request after the Nth; 0: never")  # fmt: skip
    add("--fail-every", type=_whole(0, 1 << 31), default=0, metavar="N",
        help="answer every Nth request with 500; 0: never")  # fmt: skip
    return parser


def _whole(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {high}")
        return value

    return convert


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a non-negative number")
    return value


def _delay(text: str) -> float:
    try:
        seconds = float(text) if text.replace(".", "", 1).isdigit() else parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if seconds < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative")
    return seconds


def _length(text: str) -> int | None:
    """Parse a length in vLLM's notation: 8192, 32k (32,000), 32K (32,768), auto."""
    if text in ("auto", "-1"):
        return None
    scale = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}.get(text[-1:], 1)
    try:
        value = int(float(text[:-1]) * scale) if scale > 1 else int(text)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 8192 or 32k")
    return value
