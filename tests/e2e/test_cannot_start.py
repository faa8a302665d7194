"""Requests to Models that cannot start are answered with the reason, and not held."""

import openai
import pytest
from harness import model, running, until

from kubeai.kube.resources import MODELS

MESSAGES = [{"role": "user", "content": "Hello!"}]
# A request that is held ends with the client's timeout, which is not an answer.
CLIENT_TIMEOUT_S = 60.0


@pytest.fixture
async def local(tmp_path):
    async with running(
        tmp_path,
        model("missing", engine="OLlama", image="ollama/ollama"),
        model("misnamed", resourceProfile="no-such-profile:1"),
        model("crashing", args=("--max-batch=none",)),
        env={"PATH": "/nonexistent"},  # without Ollama
        config={"gateway": {"startFailureGrace": "1s", "drainAccept": "0s"}},
    ) as local:
        yield local


async def refusal(client, name):
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(model=name, messages=MESSAGES)
    error = caught.value
    assert (error.status_code, error.type) == (503, "server_error")
    return error


async def answers(client, name):
    """Whether it does, once the gateway has heard of an edit of the Model."""
    try:
        completion = await client.chat.completions.create(model=name, messages=MESSAGES)
    except openai.InternalServerError:
        return False
    return bool(completion.choices[0].message.content)


async def test_model_that_cannot_start_returns_503_with_the_reason(local):
    async with (
        openai.AsyncOpenAI(
            base_url=local.endpoint, api_key="none", max_retries=0, timeout=CLIENT_TIMEOUT_S
        ) as client,
        local.kube() as kube,
    ):
        error = await refusal(client, "missing")
        assert error.code == "model_cannot_start"
        assert "EngineNotInstalled: ollama is not installed on this machine" in error.message
        error = await refusal(client, "misnamed")
        assert error.code == "model_cannot_start"
        assert "InvalidProfile: spec.resourceProfile" in error.message
        assert "'no-such-profile'" in error.message
        error = await refusal(client, "crashing")
        assert error.code == "model_unavailable"
        assert "CrashLoopBackOff: container server" in error.message
        assert int(error.response.headers["Retry-After"]) > 0

        await kube.patch(MODELS, "misnamed", {"spec": {"resourceProfile": "cpu:1"}}, "default")
        await until("the repaired Model answers", lambda: answers(client, "misnamed"))
