"""The option ``--engine-env``."""

import pytest
from fakes.installed_engines import environment, program

from kubeai.errors import KubeAIError
from kubeai.local.engine_env import read_engine_envs


async def test_ollamas_folder_needs_no_python(tmp_path):
    program(tmp_path / "bin" / "ollama")
    assert await read_engine_envs([f"OLLAMA={tmp_path}"]) == {"OLlama": tmp_path}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("VLLM", "must be NAME=DIR"),
        ("VLLM=", "must be NAME=DIR"),
        ("VLM={}", "unknown engine 'VLM'; did you mean 'VLLM'"),
        ("VLLM={}/missing", "/missing is not a directory"),
        ("VLLM={}", "is not a virtual environment: it has no bin/python3"),
        ("VLLM={}/other", "vLLM .module vllm. is not installed in .*pip install vllm"),
        ("Infinity={}/other", "has no program bin/infinity_emb; install it there"),
        ("OLlama={}", "has no program bin/ollama"),
    ],
)
async def test_a_wrong_environment_is_an_error_that_names_the_option(tmp_path, value, message):
    environment(tmp_path / "other", "other", "other")
    with pytest.raises(KubeAIError, match=f"^--engine-env .*{message}"):
        await read_engine_envs([value.format(tmp_path)])


async def test_an_engine_has_one_environment(tmp_path):
    env = environment(tmp_path / "env", "vllm", "vllm")
    with pytest.raises(KubeAIError, match=r"--engine-env vllm=.*: VLLM is given twice"):
        await read_engine_envs([f"VLLM={env}", f"vllm={env}"])
