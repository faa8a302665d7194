"""Real clients on the routes beyond chat: speech, images, translations, tokens, scores."""

import base64
import io
import json
import wave

import anthropic
import httpx
import openai
import pytest
from fakes.mock_engine import FAST, serving
from fakes.wire import Message, Wire, answer, post
from fakes.world import World

from kubeai.gateway.local_routes import make_app

PNG = b"\x89PNG\r\n\x1a\n"
PNG_FILE = ("image.png", PNG + b"x" * 5000, "image/png")


@pytest.fixture
async def mock():
    async with serving(*FAST) as served:
        yield served


@pytest.fixture
async def world(mock):
    world = await World.start(local_routes=make_app)
    world.route("m", {"0": mock.url.removeprefix("http://")})
    yield world
    await world.close()


@pytest.fixture
async def client(world):
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{world.port}/openai/v1", api_key="none", max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def http(world):
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.port}") as http:
        yield http


async def test_speech_is_made_and_passed_on_unchanged(client, mock):
    asked = {"model": "m", "voice": "alloy", "input": "two words", "response_format": "wav"}
    speech = await client.audio.speech.create(**asked)
    assert speech.response.headers["content-type"] == "audio/wav"
    with wave.open(io.BytesIO(speech.content)) as file:
        assert file.getnframes() > 0
    async with mock.session.post("/v1/audio/speech", json=asked) as response:
        assert await response.read() == speech.content
    async with client.audio.speech.with_streaming_response.create(
        model="m", voice="alloy", input="two words", response_format="pcm"
    ) as stream:
        assert b"".join([piece async for piece in stream.iter_bytes()]) == speech.content[44:]


async def test_audio_is_translated(client):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8000, 8000, "NONE", ""))
        out.writeframes(bytes(16000))
    translation = await client.audio.translations.create(
        model="m", file=("a.wav", file.getvalue(), "audio/wav")
    )
    assert "1.00 s of audio" in translation.text


async def test_images_are_made_edited_and_varied(client, world):
    made = await client.images.generate(model="m", prompt="a cat", n=2)
    edited = await client.images.edit(model="m", image=PNG_FILE, mask=PNG_FILE, prompt="a hat")
    several = await client.images.edit(model="m", image=[PNG_FILE, PNG_FILE], prompt="a hat")
    varied = await client.images.create_variation(model="m", image=PNG_FILE)
    for images in (made, edited, several, varied):
        for each in images.data:
            assert base64.b64decode(each.b64_json).startswith(PNG)
    assert len(made.data) == 2
    assert world.outcomes("m")["2xx"] == 4


async def test_an_edit_may_be_json(http, mock):
    body = {"model": "m", "prompt": "a hat", "images": [{"image_url": "data:"}]}
    for path in ("/v1/images/edits", "/openai/v1/images/edits"):
        found = await http.post(path, json=body)
        assert found.status_code == 200
        assert found.json()["data"][0]["b64_json"]
    missing = await http.post("/v1/images/edits", json={"prompt": "a hat"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "model")


async def test_an_edit_is_a_form_whatever_its_boundary_is(http):
    lines = (b"--json", b'Content-Disposition: form-data; name="model"', b"", b"nope", b"--json--")
    headers = {"Content-Type": "multipart/form-data; boundary=json"}
    body = b"\r\n".join((*lines, b""))
    found = await http.post("/v1/images/edits", content=body, headers=headers)
    assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_found")


async def test_an_edit_with_two_content_types_is_refused(http):
    types = ("multipart/form-data; boundary=b", "application/json")
    headers = [("Content-Type", each) for each in types]
    found = await http.post("/v1/images/edits", content=b'{"model":"m"}', headers=headers)
    assert found.status_code == 400
    assert "more than one Content-Type" in found.json()["error"]["message"]


async def test_a_large_image_is_streamed_to_the_engine(client, mock):
    large = ("image.png", PNG + bytes(3 << 20), "image/png")
    edited = await client.images.edit(model="m", image=large, prompt="a hat")
    assert edited.data[0].b64_json


async def test_tokens_of_messages_are_counted(world):
    async with anthropic.AsyncAnthropic(
        base_url=f"http://127.0.0.1:{world.port}/openai", api_key="none", max_retries=0
    ) as client:
        hello = [{"role": "user", "content": "Hello"}]
        short = await client.messages.count_tokens(model="m", messages=hello)
        long = await client.messages.count_tokens(model="m", messages=hello, system="Be terse")
        assert 0 < short.input_tokens < long.input_tokens
        with pytest.raises(anthropic.NotFoundError) as caught:
            await client.messages.count_tokens(model="nope", messages=hello)
        assert caught.value.type == "not_found_error"


@pytest.mark.parametrize("base", ["", "/openai", "/v1", "/openai/v1"])
async def test_tokens_are_made_and_read(http, base):
    made = (await http.post(f"{base}/tokenize", json={"model": "m", "prompt": "Hello é"})).json()
    assert made["count"] == len(made["tokens"]) > 0
    body = {"model": "m", "tokens": made["tokens"]}
    assert (await http.post(f"{base}/detokenize", json=body)).json() == {"prompt": "Hello é"}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/rerank", {"query": "a", "documents": ["a", "b"]}, "results"),
        ("/v1/rerank", {"query": "a", "documents": ["a", "b"]}, "results"),
        ("/v2/rerank", {"query": "a", "documents": ["a", "b"]}, "results"),
        ("/score", {"text_1": "a", "text_2": ["a", "b"]}, "data"),
        ("/v1/score", {"queries": "a", "documents": ["a", "b"]}, "data"),
        ("/generative_scoring", {"query": "a", "items": ["a", "b"]}, "data"),
        ("/pooling", {"input": ["a", "b"]}, "data"),
        ("/classify", {"input": ["a", "b"]}, "data"),
        ("/v1/chat/completions/batch", {"messages": [[{"content": "a"}]] * 2}, "choices"),
        ("/v2/embed", {"texts": ["a", "b"]}, "texts"),
    ],
)
async def test_ranks_scores_and_batches_have_an_answer_for_each_input(
    http, world, path, body, field
):
    for base in ("", "/openai"):
        found = await http.post(base + path, json={"model": "m", **body})
        assert (found.status_code, len(found.json()[field])) == (200, 2), found.text
    assert world.outcomes("m")["2xx"] == 2


async def test_an_adapter_is_sent_by_its_own_name(start):
    world = await start()
    asked = []

    async def script(wire: Wire, request: Message) -> None:
        asked.append(json.loads(request.body)["model"])
        await wire.send(answer())

    world.route("m", {"0": (await world.engine(script), ["a"])}, adapters=("a",))
    client = await world.client()
    for path in ("/tokenize", "/v1/score", "/v1/messages/count_tokens", "/v1/audio/speech"):
        await client.send(post(path, b'{"model":"m_a"}'))
        assert (await client.answer()).status == 200
    assert asked == ["a"] * 4
