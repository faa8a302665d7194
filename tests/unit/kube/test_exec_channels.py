"""How the outcome of a command is sent over an exec's ERROR channel."""

from __future__ import annotations

import orjson
import pytest

from kubeai.kube.exec_channels import Ending


@pytest.mark.parametrize(
    "ending", [Ending(0), Ending(1), Ending(137), Ending(None, 400, "BadRequest", "no such")]
)
def test_an_ending_decodes_to_what_was_encoded(ending):
    assert Ending.decode(ending.encode()) == ending


def test_an_exit_code_is_encoded_as_kubernetes_clients_expect():
    assert orjson.loads(Ending(0).encode()) == {
        "kind": "Status", "apiVersion": "v1", "status": "Success",
    }  # fmt: skip
    assert orjson.loads(Ending(7).encode()) == {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": "command terminated with exit code 7",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": "7"}]},
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"status":7}',
        b'{"status":"Failure","reason":"NonZeroExitCode",'
        b'"details":{"causes":[{"reason":"ExitCode","message":"x"}]}}',
    ],
)
def test_a_malformed_status_is_a_value_error(data):
    with pytest.raises(ValueError, match=r"."):
        Ending.decode(data)


def test_a_failure_without_an_exit_code_is_a_server_error():
    ending = Ending.decode(b'{"status":"Failure","message":"odd"}')
    assert ending == Ending(None, 500, "", "odd")
