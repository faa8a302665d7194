"""Ollama's pod: its settings, and the startup probe that pulls and loads the model."""

import subprocess

import pytest
from fakes.engine_pods import env, pod, server

from kubeai.podspec.engines.ollama import STARTUP_SCRIPT


def startup(built):
    return server(built)["startupProbe"]["exec"]["command"][4:]


@pytest.mark.parametrize(
    ("url", "features", "arguments"),
    [
        ("ollama://q:1b", ["TextGeneration"], ["q:1b", "m", "pull", "load"]),
        ("ollama://q", ["TextEmbedding"], ["q", "m", "pull", "no-load"]),
        ("ollama://h:5/q?insecure=true", [], ["h:5/q", "m", "pull-insecure", "no-load"]),
        ("ollama://q?pull=false", [], ["q", "m", "present", "no-load"]),
        ("pvc://claim?model=q:1b", ["TextGeneration"], ["q:1b", "m", "present", "load"]),
    ],
)
def test_ollama_pulls_and_loads_the_model_in_its_startup_probe(url, features, arguments):
    built = pod("OLlama", url=url, features=features)
    assert startup(built) == arguments
    probe = server(built)["startupProbe"]
    assert (probe["initialDelaySeconds"], probe["periodSeconds"]) == (1, 3)
    assert (probe["failureThreshold"], probe["timeoutSeconds"]) == (10, 10800)
    assert env(built)["OLLAMA_HOST"] == "0.0.0.0:8000"
    assert env(built)["OLLAMA_KEEP_ALIVE"] == "999999h"
    assert env(built).get("OLLAMA_MODELS") == ("/model" if url.startswith("pvc") else None)
    assert "command" not in server(built)


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (["q", "m", "pull", "load"], ["pull q", "cp q m", "run m"]),
        (["q", "m", "pull-insecure", "no-load"], ["pull --insecure q", "cp q m"]),
        (["q", "m", "present", "no-load"], ["cp q m"]),
        (["q;touch x `id` $(id)", "m", "pull", "no-load"],
         ["pull q;touch x `id` $(id)", "cp q;touch x `id` $(id) m"]),
    ],
)  # fmt: skip
def test_the_startup_script_executes_nothing_from_a_model_name(tmp_path, arguments, calls):
    fake = tmp_path / "ollama"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{tmp_path}/calls"\n')
    fake.chmod(0o755)
    subprocess.run(
        ["sh", "-ec", STARTUP_SCRIPT, "startup", *arguments],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        cwd=tmp_path,
        check=True,
    )
    assert (tmp_path / "calls").read_text().splitlines() == calls
    assert {path.name for path in tmp_path.iterdir()} == {"ollama", "calls"}


def test_the_startup_script_fails_if_any_step_fails(tmp_path):
    fake = tmp_path / "ollama"
    fake.write_text('#!/bin/sh\n[ "$1" != pull ]\n')
    fake.chmod(0o755)
    command = ["sh", "-ec", STARTUP_SCRIPT, "startup", "q", "m", "pull", "no-load"]
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False)
    assert done.returncode != 0


def test_a_model_is_loaded_with_an_empty_prompt_even_if_there_is_input(tmp_path):
    """Ollama generates nothing then. A prompt costs as long as the model likes to talk."""
    fake = tmp_path / "ollama"
    fake.write_text(f'#!/bin/sh\n[ "$1" != run ] || {{ echo "$#"; cat; }} >> "{tmp_path}/run"\n')
    fake.chmod(0o755)
    subprocess.run(
        ["sh", "-ec", STARTUP_SCRIPT, "startup", "q", "m", "present", "load"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        input=b"hello",
        check=True,
    )
    assert (tmp_path / "run").read_text() == "2\n"


@pytest.mark.parametrize(
    ("spec", "parallel"),
    [
        ({"targetRequests": 7}, "7"),
        ({"targetRequests": 1}, "1"),
        ({"targetRequests": 7, "env": {"OLLAMA_NUM_PARALLEL": "2"}}, "2"),
        ({"env": {"OLLAMA_NUM_PARALLEL": "2"}}, "2"),
        # Nobody has chosen the default, and Ollama reserves memory for each request.
        ({}, None),
        ({"targetRequests": 100}, None),
    ],
)
def test_ollama_serves_as_many_requests_at_a_time_as_the_model_is_scaled_for(spec, parallel):
    assert env(pod("OLlama", **spec)).get("OLLAMA_NUM_PARALLEL") == parallel
