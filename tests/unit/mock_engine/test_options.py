"""The mock engine's command line."""

from __future__ import annotations

import msgspec
import pytest

from kubeai.mock_engine import main
from kubeai.mock_engine.options import UsageError, parse
from kubeai.simulation.presets import PRESETS
from kubeai.simulation.text import pack


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--port=http", "--port: 'http' is not an integer from 0 to 65535"),
        ("--startup-delay=1 minute", "--startup-delay: "),
        ("--startup-delay=-1s", "--startup-delay: '-1s' is negative"),
        (
            "--decode-tokens-per-second=nan",
            "--decode-tokens-per-second: 'nan' is not a non-negative number",
        ),
        ("--engine=TGI", "--engine: "),
        ("--max-batch=0", "--max-batch: "),
        ("--max-model-len=lots", "--max-model-len: 'lots'"),
        ("--max-model-len=65537", "--cache-blocks: 4096 blocks hold 65536 tokens, less than"),
    ],
)
def test_a_flag_with_a_bad_value_is_reported_in_one_line(flag, says, capsys):
    with pytest.raises(UsageError) as caught:
        parse([flag])
    assert str(caught.value).startswith(says)
    assert main([flag]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {caught.value}\n"


def test_flags_are_accepted_in_every_form_used_in_manifests(monkeypatch):
    monkeypatch.setenv("POD_IP", "127.1.2.3")
    options, ignored = parse(
        [
            *("--engine=VLLM", "--model", "hf://a/b", "--served-model-name", "a", "b"),
            *("--startup-delay=1m30s", "--max-model-len=32k", "--tensor-parallel-size=2"),
        ]
    )
    assert options.served_model_names == ("a", "b")
    assert options.model == "hf://a/b"
    assert options.startup_delay_s == 90.0
    assert options.max_model_len == 32_000
    assert options.host == "127.1.2.3"
    assert ignored == ["--tensor-parallel-size=2"]
    assert parse(["--startup-delay=2.5"])[0].startup_delay_s == 2.5
    assert parse(["--cache-blocks=10"])[0].max_model_len == 160
    assert parse(["--max-model-len=auto"])[0].max_model_len == 32_768
    assert len(pack("four")) == 4


def test_a_preset_has_a_real_engines_speed_and_flags_override_it():
    preset = "llama-3.1-8b-fp8-l4"
    assert parse([f"--preset={preset}"])[0].config == PRESETS[preset]
    changed = parse([f"--preset={preset}", "--cache-blocks=99", "--max-batch=3"])[0].config
    expected = msgspec.structs.replace(PRESETS[preset], cache_blocks=99, max_batch=3)
    assert changed == expected
