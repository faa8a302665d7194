"""Reading logs: the options of `kubectl logs`, rotation, and following to the end."""

import asyncio

import aiohttp
import pytest

from kubeai.local.kubelet.runtime.logs import LogQuery, last_lines, read_log
from kubeai.local.kubelet.server.access import TokenAccess
from kubeai.local.kubelet.server.execs import Refusal
from kubeai.local.kubelet.server.server import KubeletServer


def record(second, text, tag="F", stream="stdout"):
    return f"2026-01-01T00:00:{second:02}.000000000Z {stream} {tag} {text}\n"


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "0.log"
    (tmp_path / "0.log.1").write_text(record(0, "a") + record(1, "b"))
    path.write_text(record(2, "c", "P") + record(2, "c") + record(3, "", stream="stderr"))
    return path


async def read(path, alive=lambda: False, **query):
    return b"".join([block async for block in read_log(path, LogQuery(**query), alive)]).decode()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, "a\nb\ncc\n\n"),
        ({"tail_lines": 3}, "b\ncc\n\n"),
        ({"tail_lines": 2}, "cc\n\n"),
        ({"tail_lines": 0}, ""),
        ({"tail_lines": 99}, "a\nb\ncc\n\n"),
        ({"since": "2026-01-01T00:00:02.0"}, "cc\n\n"),
        ({"since": "2026-01-01T00:00:01.5", "tail_lines": 1}, "\n"),
        ({"since": "2027"}, ""),
        ({"limit_bytes": 3}, "a\nb"),
        ({"limit_bytes": 0}, ""),
        (
            {"timestamps": True, "tail_lines": 2},
            "2026-01-01T00:00:02.000000000Z cc\n2026-01-01T00:00:03.000000000Z \n",
        ),
    ],
)
async def test_the_options_of_kubernetes_select_what_is_read(log, query, expected):
    assert await read(log, **query) == expected


async def test_a_log_that_does_not_exist_is_empty(tmp_path):
    assert await read(tmp_path / "none.log") == ""
    assert last_lines(tmp_path / "none.log") == ""


async def test_following_continues_across_a_rotation_until_the_container_ends(log):
    alive = True
    got = []

    more = asyncio.Event()

    async def follow():
        async for block in read_log(log, LogQuery(follow=True, tail_lines=2), lambda: alive):
            got.append(block)
            more.set()

    task = asyncio.create_task(follow())

    async def until(text):
        async with asyncio.timeout(5):
            while b"".join(got).decode() != text:
                more.clear()
                await more.wait()

    await until("cc\n\n")
    got.clear()
    with log.open("a") as file:
        # Written in two parts: an incomplete record is not shown.
        line = record(4, "d")
        file.write(line[:20])
        file.flush()
        file.write(line[20:])
    await until("d\n")
    log.replace(log.with_name("0.log.1"))
    log.write_text(record(5, "e"))
    await until("d\ne\n")
    with log.open("a") as file:
        file.write(record(6, "last words"))
    alive = False
    await asyncio.wait_for(task, 5)
    assert b"".join(got) == b"d\ne\nlast words\n"


async def test_the_last_lines_omit_timestamps_and_span_a_rotation(log):
    assert last_lines(log) == "a\nb\ncc\n\n"


async def test_the_last_lines_are_limited_to_80_lines_and_2048_bytes(tmp_path):
    path = tmp_path / "0.log"
    path.write_text("".join(record(0, f"{n}") for n in range(2000)))
    assert last_lines(path) == "".join(f"{n}\n" for n in range(1920, 2000))
    path.write_text(record(0, "x" * 3000) + record(0, "the end"))
    assert last_lines(path) == "x" * (2048 - len("\nthe end\n")) + "\nthe end\n"


class Logs:
    def __init__(self, path):
        self.path = path

    def find_log(self, namespace, pod, container, previous):
        if (namespace, pod) != ("default", "p"):
            raise Refusal(404, f'pod "{pod}" is not on this node')
        if container != "server" or previous:
            raise Refusal(400, f'container "{container}" is waiting to start')
        return self.path, lambda: False


@pytest.fixture
async def get(log):
    server = KubeletServer(Logs(log), TokenAccess("secret"))
    port = await server.start()
    async with aiohttp.ClientSession() as session:

        async def get(path, token="secret"):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            url = f"http://127.0.0.1:{port}/containerLogs/{path}"
            async with session.get(url, headers=headers) as response:
                return response.status, await response.text()

        yield get
    await server.close()


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("default/p/server", 200, "a\nb\ncc\n\n"),
        ("default/p/server?tailLines=1&timestamps=true", 200, "2026-01-01T00:00:03.000000000Z \n"),
        ("default/p/server?limitBytes=1", 200, "a"),
        ("default/p/server?sinceTime=2026-01-01T00:00:02Z", 200, "cc\n\n"),
        ("default/p/server?sinceSeconds=10", 200, ""),
        ("default/p/server?tailLines=many", 400, "tailLines: 'many' is not a number\n"),
        ("default/p/server?sinceTime=noon", 400, None),
        ("default/p/server?previous=true", 400, 'container "server" is waiting to start\n'),
        ("default/q/server", 404, 'pod "q" is not on this node\n'),
    ],
)
async def test_logs_are_served_like_a_real_kubelet(get, path, status, text):
    answer = await get(path)
    assert answer[0] == status
    assert text is None or answer[1] == text


@pytest.mark.parametrize("token", ["", "wrong", "secret2"])
async def test_logs_require_the_token(get, token):
    assert (await get("default/p/server", token))[0] == 401
