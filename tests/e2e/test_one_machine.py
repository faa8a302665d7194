"""`kubeai local --model`: local weights, an engine environment, one GPU for two Models."""

import sys

import aiohttp
import openai
import pytest
from harness import chat, model, replicas, running, until

# Runs the mock engine as this environment's vLLM, and shows which weights and GPUs it sees.
PYTHON = """\
#!/bin/sh
shift 2
echo "weights $(/bin/ls /model) gpus $CUDA_VISIBLE_DEVICES"
exec {python} -m kubeai mock-engine --engine=VLLM "$@"
"""
MESSAGES = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with something that can be taken for vLLM."""
    packages = tmp_path / "env" / "lib" / "python3.12" / "site-packages"
    (packages / "vllm").mkdir(parents=True)
    (packages / "vllm" / "__init__.py").touch()
    info = packages / "vllm-0.10.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: vllm\nVersion: 0.10.2\n")
    (tmp_path / "env" / "pyvenv.cfg").touch()
    python = tmp_path / "env" / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return tmp_path / "env"


@pytest.fixture
async def local(tmp_path, environment):
    for name in ("first", "second"):
        (tmp_path / "weights" / name).mkdir(parents=True)
        (tmp_path / "weights" / name / f"{name}.safetensors").touch()
    async with running(
        tmp_path / "local",
        model("unknown", url="pvc://nowhere/x", image=""),
        model("misspelt", url="pvc://weights/frist", image=""),
        arguments=(
            *("--engine-env", f"VLLM={environment}", "--volume", f"weights={tmp_path}/weights"),
            *("--model", "pvc://weights/first", "--model", "pvc://weights/second"),
            *("--gpus", "1", "--swap"),
        ),
    ) as local:
        yield local


async def refusal(client, name):
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=name, messages=MESSAGES)
    assert caught.value.code == "model_cannot_start"
    return caught.value.message


def logs(local, name):
    pods = (local.data_dir / "state" / "pods").glob(f"*_model-{name}-*/server/0.log")
    return "".join(log.read_text() for log in pods)


async def test_two_models_share_a_gpu_and_local_weights(local, tmp_path):
    (machine,) = local.said("engines found")
    assert machine["vLLM"] == f"0.10.2  {tmp_path}/env/bin/python3 (--engine-env)"
    assert machine["GPUs"] == "1"
    first, _ = local.said("first request")
    assert f"curl {local.endpoint}/chat/completions" in first["command"]

    async with local.kube() as kube, aiohttp.ClientSession() as session:
        answer = await chat(session, local.endpoint, "first", "Hello!")
        assert answer.whole, answer
        assert "weights first.safetensors gpus 0" in logs(local, "first")
        # The GPU is in use: the second model gets it once the first has been idle for a moment.
        answer = await chat(session, local.endpoint, "second", "Hello!")
        assert answer.whole, answer
        assert "weights second.safetensors gpus 0" in logs(local, "second")
        assert (await replicas(kube, "first"))[0] == 0

        async def is_ready() -> bool:
            return (await replicas(kube, "second"))[2] == 1

        await until("its status says so", is_ready)

    async with openai.AsyncOpenAI(base_url=local.endpoint, api_key="x", max_retries=0) as client:
        assert "--volume nowhere=DIR" in await refusal(client, "unknown")
        assert f"{tmp_path}/weights/frist does not exist" in await refusal(client, "misspelt")
    assert not (tmp_path / "weights" / "frist").exists()
    await until("the log names the swap", lambda: "to make room for second" in "".join(local.log))
