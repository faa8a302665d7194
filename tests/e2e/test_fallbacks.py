"""Aliases, a canary and a fallback with real processes, until a Model that starts takes over."""

from __future__ import annotations

import openai
from harness import model, running, scrape, until

HELLO = [{"role": "user", "content": "Hello!"}]
FAST = ("--prefill-tokens-per-second=100000", "--decode-tokens-per-second=1000")


async def test_a_small_model_answers_while_a_large_one_starts(tmp_path):
    large = model(
        "large",
        args=("--startup-delay=3s", *FAST),
        minReplicas=0,
        aliases=["gpt-4o"],
        fallbacks=["small"],
        waitBeforeFallback="0s",
        scaleDownDelaySeconds=60,
    )
    small = model("small", args=FAST, minReplicas=1, aliases=["gpt-4o", "meta/small"])
    split = model("split", args=FAST, minReplicas=0, canary={"model": "small", "percent": 100})
    async with (
        running(tmp_path / "local", large, small, split, workers=2) as local,
        openai.AsyncOpenAI(base_url=local.endpoint, api_key="x", max_retries=0) as client,
    ):

        async def ask(name: str) -> tuple[str, str | None]:
            """The model in the response, and the Model that answered if it is another one."""
            raw = await client.chat.completions.with_raw_response.create(
                model=name, messages=HELLO, max_tokens=2
            )
            return raw.parse().model, raw.headers.get("x-kubeai-model")

        async def is_small_up() -> bool:
            try:
                return await ask("meta/small") == ("meta/small", None)
            except openai.APIError:
                return False

        await until("small serves by its alias", is_small_up)
        assert await ask("gpt-4o") == ("gpt-4o", "small")
        assert await ask("split") == ("split", "small")
        listed = [each.id async for each in client.models.list()]
        assert listed == ["large", "gpt-4o", "small", "meta/small", "split"]

        async def has_large_started() -> bool:
            return await ask("gpt-4o") == ("gpt-4o", None)

        await until("large takes over", has_large_started, 30.0)

        async def counted() -> float:
            series = await scrape(local.metrics)
            return sum(n for name, n in series.items() if name.startswith("kubeai_fallbacks_total"))

        assert await until("the fallbacks are counted", counted) >= 1
