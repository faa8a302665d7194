"""Make the pictures of the console in docs/how-to/console, each in a light and a dark theme.

    make screenshots        # or: python docs/screenshots.py [NAME …]

It needs Chromium, the extra `browser`, and the fonts Inter and JetBrains Mono. The page shows a
scripted back end, so that the pictures only change with the page. Its texts are KubeAI's own.
"""

from __future__ import annotations

import asyncio
import io
import random
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "browser")]

from browsers import go, open_page, running_browser  # noqa: E402
from fakes.scripted_console import Chat, ScriptedConsole, pod, scripted_console  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.async_api import Page, expect  # noqa: E402

from kubeai._journal import Entry  # noqa: E402
from kubeai.supervisor.console.traffic import request_of  # noqa: E402

PICKS = {  # by the Models' strategies
    "llama-3.1-8b": ["cached", "cached", "cached", "away", "new"],
    "qwen3-coder": ["hashed", "hashed", "bounded"],
    "bge-m3": ["least"],
}
FOLDER = REPOSITORY / "docs/how-to/console"
NO_DITHER = Image.Dither.NONE
FILE_MAX_BYTES = 120_000
COLOURS = 256  # of the pictures that would otherwise be too large
NOW = time.time()
VIEWS = {
    "models": "models",
    "model": "models/llama-3.1-8b",
    "requests": "requests",
    "playground": "playground/llama-3.1-8b",
}
ANSWER = """A prefix cache keeps the keys and values of prompts that were computed before. \
A request that begins with the same tokens skips that part of the prefill:

```python
hit = cache.longest_prefix(tokens)
engine.prefill(tokens[len(hit):])
```

That is why KubeAI sends a conversation to the replica that already has it."""


# -- the scripted world ----------------------------------------------------------------------------


def rates(requests: float, prompt: float, output: float) -> dict[str, Any]:
    return {
        "window_s": 60,
        "requests_per_s": requests,
        "prompt_tokens_per_s": prompt,
        "output_tokens_per_s": output,
    }


def ttft(count: int, p50: float | None, p99: float | None) -> dict[str, Any]:
    return {"window_s": 300, "count": count, "p50": p50, "p99": p99}


def bounds(ready: int, desired: int, low: int, high: int | None) -> dict[str, Any]:
    return {"ready": ready, "desired": desired, "min": low, "max": high}


MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "url": "hf://meta-llama/Llama-3.1-8B-Instruct",
        "strategy": "PrefixCache",
        "adapters": ["legal", "support"],
        "replicas": bounds(3, 3, 1, 6),
        "in_flight": 41,
        "rates": rates(12.4, 18200, 2140),
        "ttft_s": ttft(3720, 0.183, 0.74),
    },
    "llama-3.3-70b": {
        "state": "Starting",
        "reason": "ReplicasStarting",
        "message": "pulling image, 1 of 3",
        "replicas": bounds(0, 3, 0, 4),
        "held": 7,
    },
    "bge-m3": {
        "engine": "Infinity",
        "features": ["TextEmbedding"],
        "strategy": "LeastLoad",
        "replicas": bounds(2, 2, 1, None),
        "in_flight": 6,
        "rates": rates(55, 9100, 0.0),
    },
    "gemma-3-4b": {
        "engine": "OLlama",
        "state": "Scaled to zero",
        "reason": "ScaledToZero",
        "message": "the next request starts a replica",
        "strategy": "LeastLoad",
        "replicas": bounds(0, 0, 0, 2),
    },
    "qwen3-coder": {
        "state": "Degraded",
        "reason": "CrashLoopBackOff",
        "message": "container server keeps exiting (exit code 1): "
        "torch.OutOfMemoryError: CUDA out of memory",
        "replicas": bounds(1, 2, 1, 2),
        "in_flight": 9,
        "rates": rates(1.8, 5200, 190),
        "ttft_s": ttft(540, 0.44, 1.8),
    },
    "whisper-large-v3": {
        "engine": "FasterWhisper",
        "features": ["SpeechToText"],
        "strategy": "LeastLoad",
        "replicas": bounds(1, 1, 0, 2),
        "in_flight": 2,
        "rates": rates(0.4, 0.0, 0.0),
    },
    "mixtral-8x22b": {
        "state": "Failed",
        "reason": "InvalidProfile",
        "message": "spec.resourceProfile: the system config has no resource profile "
        "'nvidia-gpu-h200'",
        "replicas": bounds(0, 1, 1, 1),
    },
}


def models(console: ScriptedConsole) -> None:
    for name, state in MODELS.items():
        console.put(name, **state)


def llama(console: ScriptedConsole) -> None:
    """What the view of one Model shows."""
    steps = [
        (95, 2, 3, average(88.1)),
        (640, 3, 2, f"{average(41.7)}, for longer than the scale-down delay of 30 s"),
        (1500, 2, 3, average(90.4)),
        (3900, 1, 2, average(39.6)),
        (5300, 0, 1, "replicas when the Model was created"),
    ]
    console.detail(
        "llama-3.1-8b",
        pods=[
            pod("model-llama-3.1-8b-5f7c6d-0", address="10.42.1.17:8000", in_flight=15,
                pending_tokens=5120, ring_share=0.34, cached_share=0.81, created_s=NOW - 5300),
            pod("model-llama-3.1-8b-5f7c6d-1", address="10.42.2.9:8000", in_flight=13,
                pending_tokens=2304, ring_share=0.35, cached_share=0.77, created_s=NOW - 1500),
            pod("model-llama-3.1-8b-5f7c6d-2", address="10.42.3.22:8000", in_flight=13,
                pending_tokens=7936, ring_share=0.31, cached_share=0.52, restarts=1,
                created_s=NOW - 95),
        ],
        conditions=[
            {"type": type_, "status": status, "reason": reason, "message": message,
             "last_transition_s": NOW - since}
            for type_, status, reason, message, since in (
                ("Ready", "True", "AllReplicasReady", "3 of 3 replicas are ready", 80),
                ("Progressing", "False", "UpToDate", "all replicas are up to date", 80),
                ("AdaptersLoaded", "True", "Loaded", "3 of 3 ready replicas serve every adapter",
                 72),
                ("Degraded", "False", "AsExpected", "no problems detected", 5200),
            )
        ],
        timeline=[{"time_s": NOW - ago, "from": a, "to": b, "reason": why}
                  for ago, a, b, why in steps],
    )  # fmt: skip


def average(requests: float) -> str:
    """The autoscaler's reason."""
    return f"average of {requests:g} active requests over 600 s, target 32 per replica"


def requests(console: ScriptedConsole) -> None:
    rng = random.Random(7)
    names = ["llama-3.1-8b"] * 5 + ["qwen3-coder"] * 2 + ["bge-m3"]
    for number in range(60):
        name = rng.choice(names)
        embeds = name == "bge-m3"
        prompt = rng.randrange(300, 6000)
        pick = rng.choice(PICKS[name])
        cached = round(prompt * {"cached": 0.86, "hashed": 0.7, "away": 0.1}.get(pick, 0))
        waited = rng.uniform(4, 9) if rng.random() < 0.08 and not embeds else 0.0
        first = waited + 0.05 + (prompt - cached) / 9000
        output = rng.randrange(40, 420)
        entry = Entry(
            began_s=NOW - (60 - number) * 1.7,
            waited_s=waited,
            first_s=first,
            duration_s=first + (0 if embeds else output / 70),
            model_row=0,
            model_generation=0,
            row=0,
            generation=0,
            status=200,
            end="left" if number == 57 else "whole",
            pick=pick,
            retries=int(number == 51),
            streamed=not embeds,
            estimated_tokens=prompt,
            expected_tokens=cached,
            prompt_tokens=prompt,
            cached_tokens=None if embeds else cached,
            output_tokens=None if embeds else output,
            id=f"req-{number}",
        )
        endpoint = f"model-{name}-5f7c6d-{rng.randrange(3)}"
        if number == 55:  # refused: too many requests are held
            entry = entry._replace(
                status=503,
                pick=None,
                first_s=None,
                duration_s=0.003,
                waited_s=0.0,
                cached_tokens=None,
                output_tokens=None,
            )
            endpoint = None
        console.served(msgspec.to_builtins(request_of(entry, name, endpoint, 0.0)))


async def prepare(page: Page, view: str) -> None:
    """What a user does in a view before the picture is taken."""
    await expect(page.locator("#connection")).to_have_text("Live")
    if view == "playground":
        await page.get_by_label("System prompt").fill("You are a concise engineer.")
        await page.get_by_label("Temperature").fill("0.3")
        await page.get_by_role("textbox", name="Message").fill("What does a prefix cache do?")
        await page.get_by_role("textbox", name="Message").press("Enter")
        await expect(page.get_by_text("96 output tokens")).to_be_visible()
    if view == "model":
        await expect(page.get_by_text("10.42.3.22:8000")).to_be_visible()


# Fills the sparklines: a minute's worth of load that rises and falls around its present value.
SAMPLES = """async () => {
    const { store, SAMPLES_MAX } = await import("/ui/static/store.js");
    const present = structuredClone(store.state.models);
    for (let tick = 0; tick < SAMPLES_MAX; tick += 1) {
        store.state.models.forEach((model, index) => {
            const wave = Math.sin(tick / 7 + index * 2) + 0.6 * Math.sin(tick / 2.3 + index);
            const load = 1 + 0.22 * wave;
            model.in_flight = present[index].in_flight * load;
            for (const what of ["prompt_tokens_per_s", "output_tokens_per_s"]) {
                model.rates[what] = present[index].rates[what] * load;
            }
        });
        store.sample();
    }
    store.state.models = present;
    store.dispatchEvent(new Event("state"));
}"""


def save(png: bytes, path: Path) -> None:
    """Write the picture, with a palette if it is too large without one."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.save(path, optimize=True)
    if path.stat().st_size >= FILE_MAX_BYTES:
        few = image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, 4, dither=NO_DITHER)
        few.save(path, optimize=True)
    size = path.stat().st_size
    assert size < FILE_MAX_BYTES, f"{path} has {size} bytes, more than {FILE_MAX_BYTES}"
    print(f"{path.relative_to(REPOSITORY)}  {size // 1024} KiB")


async def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    async with scripted_console() as console, running_browser() as browser:
        usage = {"prompt_tokens": 311, "completion_tokens": 96,
                 "prompt_tokens_details": {"cached_tokens": 288}}  # fmt: skip
        console.chat = Chat.at_once(pieces=tuple(ANSWER), pace_s=0.002, usage=usage)
        console.workers = [{"worker": n, "ready": True, "restarts": 0} for n in range(4)]
        models(console)
        llama(console)
        requests(console)
        for theme in ("light", "dark"):
            async with open_page(browser, f"{console.url}/ui/", color_scheme=theme) as page:
                await page.evaluate(SAMPLES)
                for view in names or VIEWS:
                    await go(page, VIEWS[view])
                    await prepare(page, view)
                    save(await page.screenshot(), FOLDER / f"{view}-{theme}.png")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
