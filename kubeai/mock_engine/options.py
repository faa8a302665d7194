"""The mock engine's options, as flags of its command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

import msgspec

from kubeai.api.duration import parse_duration
from kubeai.errors import KubeAIError
from kubeai.simulation.engine import EngineConfig
from kubeai.simulation.presets import PRESETS

ENGINES = ("VLLM", "OLlama", "FasterWhisper", "Infinity")
MAX_MODEL_LEN = 32_768


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What ``kubeai mock-engine`` was asked for."""

    engine: str = "VLLM"
    model: str = "mock"
    served_model_names: tuple[str, ...] = ("mock",)
    host: str = "127.0.0.1"
    port: int = 8000
    startup_delay_s: float = 0.0
    max_model_len: int = MAX_MODEL_LEN
    reply_tokens: int = 48  # of a reply to a request that sets no limit, give or take half
    die_after_requests: int = 0  # 0: never
    fail_every: int = 0  # 0: never
    config: EngineConfig = EngineConfig()


class UsageError(KubeAIError):
    """A flag has a value that it cannot have."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Options, and the flags that were not known, each with its values in one string.

    A pod's manifest carries flags of the engine that is played here, so unknown ones are no error.
    UsageError names the flag whose value is wrong.
    """
    parser = _parser()
    found, rest = parser.parse_known_args(argv)
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
        die_after_requests=found.die_after_requests,
        fail_every=found.fail_every,
        config=config,
    )
    return options, _group(rest)


def _group(rest: list[str]) -> list[str]:
    groups: list[str] = []
    for word in rest:
        if word.startswith("-") or not groups or not groups[-1].startswith("-"):
            groups.append(word)
        else:
            groups[-1] += f" {word}"
    return groups


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kubeai mock-engine",
        description="An engine that answers like vLLM: made-up text, real timing, no GPU.",
        epilog="Flags that are not in this list are ignored: they are the played engine's.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--engine", choices=ENGINES, default="VLLM", help="the engine to play")
    add("--model", default="mock", help="what was loaded; names the model if nothing else does")
    add("--served-model-name", nargs="+", metavar="NAME", help="names that requests may use")
    add("--host", help="address to listen on; default: $POD_IP, else 127.0.0.1")
    add("--port", type=_whole(0, 65535), default=8000, help="0 takes a free one")
    add("--startup-delay", type=_delay, default=0.0, metavar="DURATION",
        help="503 for so long, e.g. 1m30s")  # fmt: skip
    add("--preset", choices=sorted(PRESETS), help="the speed and memory of a real engine; the "
        "flags below change it")  # fmt: skip
    add("--prefill-tokens-per-second", type=_rate, metavar="RATE",
        help="of the whole engine; 0: in no time; default: 8000")  # fmt: skip
    add("--decode-tokens-per-second", type=_rate, metavar="RATE",
        help="of each sequence in the batch; 0: in no time; default: 50")  # fmt: skip
    add("--max-batch", type=_whole(1, 65536), help="sequences that run at once; default: 256")
    add("--step-tokens", type=_whole(1, 1 << 20), help="token budget of a step; default: 2048")
    add("--cache-blocks", type=_whole(1, 1 << 24),
        help="KV memory, in blocks of 16 tokens; default: 4096")  # fmt: skip
    add("--max-model-len", type=_length, metavar="TOKENS",
        help="prompt and reply together; default: 32768, or what the KV memory holds")  # fmt: skip
    add("--reply-tokens", type=_whole(1, 1 << 20), default=48,
        help="length of a reply without max_tokens, give or take half")  # fmt: skip
    add("--die-after-requests", type=_whole(0, 1 << 31), default=0, metavar="N",
        help="after N requests the next one kills the process; 0: never")  # fmt: skip
    add("--fail-every", type=_whole(0, 1 << 31), default=0, metavar="N",
        help="each Nth request is answered 500; 0: never")  # fmt: skip
    return parser


def _whole(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {low} to {high}")
        return value

    return convert


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate, a number of at least 0")
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
    """vLLM's way to write it: 8192, 32k (thousands), 32K (of 1024), auto."""
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
