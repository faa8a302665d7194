"""Commands in containers: the client against a scripted server, and how an outcome is encoded."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from fakes.scripted_api import kubeconfig

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.exec import ERROR, EXEC_OUTPUT_MAX_BYTES, Ending

DEADLINE_S = 10.0


def ended(**status):
    return bytes([ERROR]) + orjson.dumps({"kind": "Status", **status})


def exited(code):
    return bytes([ERROR]) + Ending(code).encode()


async def run(kube, timeout_s=DEADLINE_S):
    return await kube.exec("p", ["ls", "a b"], container="c", timeout_s=timeout_s)


async def test_a_command_returns_its_exit_status_and_output(kube, server):
    server.messages = [b"\x01", b"\x01out ", b"\x02err", b"\x03", exited(0)]
    assert await run(kube) == (0, "out err")
    method, path, headers, _ = server.requests[0]
    query = "command=ls&command=a+b&container=c&stdout=true&stderr=true"
    assert (method, path) == ("GET", f"/api/v1/namespaces/ns/pods/p/exec?{query}")
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Sec-WebSocket-Protocol"] == "v4.channel.k8s.io"


async def test_a_failed_command_is_a_result_not_an_error(kube, server):
    server.messages = [b"\x02no such file", exited(3)]
    assert await run(kube) == (3, "no such file")


async def test_only_the_end_of_a_long_output_is_kept(kube, server):
    server.messages = [b"\x01" + bytes([65 + n]) * 50_000 for n in range(3)] + [exited(0)]
    output = (await run(kube)).output
    assert len(output) == EXEC_OUTPUT_MAX_BYTES
    assert output.endswith("C" * 50_000)
    assert output.startswith("B")


@pytest.mark.parametrize(
    ("message", "status", "reason", "text"),
    [
        (
            ended(status="Failure", code=500, reason="InternalError", message="no such program"),
            500,
            "InternalError",
            "no such program",
        ),
        (ended(status="Failure", message="odd"), 500, "", "odd"),
        (b"\x03{", 0, "Undecodable", "command status"),
        (b"\x01half", 0, "Unreachable", "closed before the command ended"),
    ],
)
async def test_a_command_that_did_not_run_is_an_api_error(
    kube, server, message, status, reason, text
):
    server.messages = [message]
    with pytest.raises(ApiError, match=text) as caught:
        await run(kube)
    assert (caught.value.status, caught.value.reason) == (status, reason)


async def test_a_rejected_upgrade_is_an_api_error_with_the_reason(kube, server):
    server.answer = 404, b'{"reason":"NotFound","message":"pods \\"p\\" not found"}', {}
    with pytest.raises(ApiError, match='pods "p" not found') as caught:
        await run(kube)
    assert (caught.value.status, caught.value.reason) == (404, "NotFound")
    server.answer = 200, b"{}", {}
    with pytest.raises(ApiError, match="Invalid response status") as caught:
        await run(kube)
    assert caught.value.status == 0


async def test_a_command_times_out_and_its_connection_is_closed(kube, server):
    server.messages, server.silent = [b"\x01going on"], True
    with pytest.raises(ApiError) as caught:
        await run(kube, timeout_s=0.2)
    assert (caught.value.status, caught.value.reason) == (0, "Timeout")
    async with asyncio.timeout(DEADLINE_S):
        await server.left.wait()


async def test_a_rejected_exec_is_retried_with_the_rotated_token(server, tmp_path):
    token = tmp_path / "token"
    token.write_text("first")
    path = kubeconfig(tmp_path / "kubeconfig", server.url, {"tokenFile": str(token)})
    kube = await Kube.connect(path)
    token.write_text("second")
    server.tokens = {"Bearer second"}
    server.messages = [exited(0)]
    assert (await run(kube)).exit_code == 0
    server.tokens = {"Bearer third"}
    with pytest.raises(ApiError, match="who are you") as caught:
        await run(kube)
    assert caught.value.status == 401
    await kube.close()


# -- the outcome, on the ERROR channel -----------------------------------------------------------


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
