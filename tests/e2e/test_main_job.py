"""The main job: a model that had no replica answers, token by token, and goes away again."""

import contextlib
import io
import signal
import time
import wave

import aiohttp
import openai
import pytest
from harness import CONFIG, chat, model, pods, replicas, running, scrape, until

DELAY_S = 1.0
ARGS = (f"--startup-delay={DELAY_S:.0f}s", "--decode-tokens-per-second=50")
LONG_TOKENS = 1000  # 20 s
SOON = {"holdCommentAfter": "100ms", "holdCommentInterval": "100ms"}
# A cold model may take what its engine takes, and this.
OVERHEAD_S = 10.0


@pytest.fixture
async def local(tmp_path):
    async with running(
        tmp_path,
        model("chat", args=ARGS, maxReplicas=2),
        model("text", engine="OLlama", args=ARGS),
        model("vectors", engine="Infinity", features=("TextEmbedding",)),
        model("ears", engine="FasterWhisper", features=("SpeechToText",)),
        workers=2,
        config={"gateway": CONFIG["gateway"] | SOON},
    ) as local:
        yield local


def wav(seconds: float) -> io.BytesIO:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(int(16000 * seconds)))
    file.seek(0)
    file.name = "speech.wav"
    return file


async def test_models_at_zero_answer_every_kind_of_request(local):
    async with (
        openai.AsyncOpenAI(base_url=local.endpoint, api_key="none", max_retries=0) as client,
        local.kube() as kube,
    ):
        listed = [item.id async for item in client.models.list()]
        assert listed == ["chat", "text"]
        for name in ("chat", "text", "vectors", "ears"):
            assert await replicas(kube, name) == (0, 0, 0)

        with starting_a_replica():
            stream = await client.chat.completions.create(
                model="chat",
                messages=[{"role": "user", "content": "Hello!"}],
                max_tokens=LONG_TOKENS,
                stream=True,
            )
            tokens = (c async for c in stream if c.choices and c.choices[0].delta.content)
            await anext(tokens)
        # Token by token, not all in one piece at the end.
        for _ in range(4):
            await anext(tokens)
        assert await active(local, "chat") == 1, "its end is seconds away"
        await stream.close()
        (pod,) = await pods(kube, "chat")
        assert pod["metadata"]["annotations"]["kubeai.org/mock-engine"] == "true"

        comments, data = await cold_stream(local, "text")
        assert ": waiting for a replica: loading the model" in comments
        assert data[-1] == "data: [DONE]"
        with starting_a_replica():
            completion = await client.completions.create(model="text", prompt="Once", max_tokens=5)
            assert completion.choices[0].text
            assert completion.usage.completion_tokens == 5

        with starting_a_replica():
            embeddings = await client.embeddings.create(model="vectors", input=["one", "two"])
            assert [len(item.embedding) > 1 for item in embeddings.data] == [True, True]
            assert embeddings.data[0].embedding != embeddings.data[1].embedding

        with starting_a_replica():
            transcription = await client.audio.transcriptions.create(model="ears", file=wav(1.0))
            assert transcription.text

        for name in ("chat", "text", "vectors", "ears"):
            await until(
                f"{name} is at zero again", lambda name=name: _gone(kube, name), timeout_s=30
            )
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(
                model="chat",
                messages=[{"role": "user", "content": "Hello!"}],
                extra_headers={"X-KubeAI-Max-Wait": "0s"},
            )
        assert caught.value.status_code == 504
        retry_after_s = int(caught.value.response.headers["Retry-After"])
        assert DELAY_S <= retry_after_s <= DELAY_S + OVERHEAD_S


@contextlib.contextmanager
def starting_a_replica():
    """The block takes no longer than a replica takes to start."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started <= DELAY_S + OVERHEAD_S


async def cold_stream(local, name):
    """The comments and the other lines of a streamed completion of a model without a replica."""
    body = {"model": name, "prompt": "Once", "max_tokens": 5, "stream": True}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{local.endpoint}/completions", json=body) as response,
    ):
        assert response.status == 200
        lines = [line for line in (await response.text()).split("\n") if line]
    comments = [line for line in lines if line.startswith(":")]
    return comments, lines[len(comments) :]


async def active(local, name):
    samples = await scrape(local.metrics)
    return sum(
        value
        for series, value in samples.items()
        if series.startswith("kubeai_inference_requests_active{") and f'"{name}"' in series
    )


async def _gone(kube, name):
    return await replicas(kube, name) == (0, 0, 0) and not await pods(kube, name)


async def test_a_second_start_finds_its_models_and_ctrl_c_leaves_no_process(tmp_path):
    async with running(tmp_path, model("chat", args=ARGS)) as first:
        async with aiohttp.ClientSession() as session:
            answer = await chat(session, first.endpoint, "chat", "hi")
        assert answer.whole
        processes = first.processes()
        assert len(processes) >= 5  # itself, API, kubelet, worker, engine
        assert await first.stop(signal.SIGINT) == 0
        assert first.processes() == {}
    async with running(tmp_path) as second, aiohttp.ClientSession() as session:
        answer = await chat(session, second.endpoint, "chat", "hi")
        assert answer.whole, answer
