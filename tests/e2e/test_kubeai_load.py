"""`kubeai load` as a program, from a hub's look-alike and from moto's S3, both on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import boto3
import pytest
from aiohttp import ClientSession, web
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fakes.hub import Hub, Repository
from fakes.web import start
from harness import until
from moto.server import ThreadedMotoServer

from kubeai.loading.staging import MARK

RUN_TIMEOUT_S = 50
MIB = 1 << 20
# Objects of more than 8 MiB are uploaded in parts, which their ETags show. `kubeai load` fetches
# them in parts of its own: here smaller ones, so that a few megabytes are several parts.
PART_BYTES = 4 * MIB
SMALLER_PARTS = f"""
from kubeai.loading import buckets
buckets.PART_BYTES = {PART_BYTES}
from kubeai.cli import main
main()
"""


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


CONFIG, WEIGHTS = b'{"hidden_size": 8}', noise(3 * MIB)
REPOSITORY = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub/vocab.txt": b"a b c"}
CLEAN = ("AWS_", "GOOGLE_", "OSS_", "HF_", "HTTP", "http", "NO_PROXY", "no_proxy")


class Ran:
    """What a `kubeai load` ended with."""

    def __init__(self, code: int, said: str) -> None:
        self.code, self.said = code, said


class Loader:
    """`kubeai load` in an environment of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "m"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(CLEAN)}
        self.env = kept | {"HF_HOME": str(folder / "hf-home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.env |= {"AWS_EC2_METADATA_DISABLED": "true"}
        self.program = ("-m", "kubeai")

    async def start(self, url: str, *within: str) -> asyncio.subprocess.Process:
        command = (*within, sys.executable, *self.program, "load", url, str(self.folder))
        return await asyncio.create_subprocess_exec(
            *command, env=self.env, stderr=asyncio.subprocess.PIPE
        )

    async def run(self, url: str, *within: str) -> Ran:
        process = await self.start(url, *within)
        async with asyncio.timeout(RUN_TIMEOUT_S):
            _, said = await process.communicate()
        print(said.decode())
        return Ran(process.returncode, said.decode())

    async def fails(self, url: str) -> str:
        """What it says, in one line."""
        ran = await self.run(url)
        assert ran.code == 2
        assert not self.folder.exists()
        *_, last = ran.said.splitlines()
        assert last.startswith("error: ")
        assert "Traceback" not in ran.said
        return last

    def holds(self) -> dict[str, bytes]:
        """The folder's files, but for the mark of a whole load."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        found = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}
        assert json.loads(found.pop(MARK))["files"]
        return found

    def left_over(self) -> list[str]:
        """What stands beside the folder."""
        return sorted(
            path.name for path in self.folder.parent.iterdir() if path.name.startswith(".")
        )


@pytest.fixture
def loader(tmp_path) -> Loader:
    return Loader(tmp_path)


# -- a hub -----------------------------------------------------------------------------------------


@pytest.fixture
async def hub(loader) -> AsyncIterator[Hub]:
    hub = Hub()
    await hub.start()
    loader.env["HF_ENDPOINT"] = hub.url
    yield hub
    await hub.stop()


async def test_a_repository_becomes_a_folder_and_is_not_fetched_twice(loader, hub):
    one = hub.repositories["org/m"] = Repository(REPOSITORY)
    assert (await loader.run("hf://org/m")).code == 0
    assert loader.holds() == REPOSITORY
    assert loader.left_over() == []
    asked = len(one.ranges)
    again = await loader.run("hf://org/m")
    assert (again.code, len(one.ranges)) == (0, asked)
    assert "already" in again.said


async def test_another_version_replaces_the_first(loader, hub):
    hub.repositories["org/m"] = Repository(REPOSITORY)
    assert (await loader.run("hf://org/m")).code == 0
    newer = {"config.json": b"{}", "model.bin": WEIGHTS}
    hub.repositories["org/m"] = Repository(newer)
    assert (await loader.run("hf://org/m")).code == 0
    assert loader.holds() == newer
    assert loader.left_over() == []


async def test_corrupt_file_is_fetched_again_then_fails(loader, hub):
    one = hub.repositories["org/m"] = Repository(REPOSITORY, corrupt={"model.safetensors": 1})
    assert (await loader.run("hf://org/m")).code == 0
    assert loader.holds() == REPOSITORY
    await asyncio.to_thread(subprocess.run, ["rm", "-r", str(loader.folder)], check=True)
    one.corrupt = {"config.json": 9, "model.safetensors": 9}
    assert "does not match the hub's checksum" in await loader.fails("hf://org/m")


async def test_interrupted_hub_download_is_resumed(loader, hub):
    files = REPOSITORY | {"model.safetensors": noise(14 * MIB)}  # it is written in 10 MiB
    one = hub.repositories["org/m"] = Repository(files, cut={"model.safetensors": 12 * MIB})
    assert (await loader.run("hf://org/m")).code == 0
    assert loader.holds() == files
    starts = [start for path, start in one.ranges if path == "model.safetensors"]
    assert starts[0] == 0
    assert starts[-1] > 0


@pytest.mark.parametrize(
    ("repository", "words"),
    [
        (None, "no such repository, or HF_TOKEN has no access to it"),
        (Repository(REPOSITORY, token="t"), "no such repository, or HF_TOKEN has no access to it"),
        (Repository(REPOSITORY, token="t", gated=True), "gated; request access and set HF_TOKEN"),
        (Repository({}), "the repository is empty"),
        (Repository({"../x": b"x"}), "contains an invalid path"),
    ],
)
async def test_an_unavailable_repository_is_an_error_with_the_reason(
    loader, hub, repository, words
):
    if repository is not None:
        hub.repositories["org/m"] = repository
    assert words in await loader.fails("hf://org/m")


async def test_private_repository_requires_its_token(loader, hub):
    hub.repositories["org/m"] = Repository(REPOSITORY, token="t")
    loader.env["HF_TOKEN"] = "t"
    assert (await loader.run("hf://org/m")).code == 0
    assert loader.holds() == REPOSITORY


# -- buckets ---------------------------------------------------------------------------------------


class Gate:
    """Between the load and moto: records what is asked for, and can hold or change it."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.ranges: list[tuple[str, str]] = []
        self.let_through = 1 << 30
        self.open = asyncio.Event()
        self.corrupt = 0
        self.new_etag = ""
        self.url = ""

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._pass)
        self._session = ClientSession(auto_decompress=False)
        self._runner, self.url = await start(app, shutdown_timeout_s=5)

    async def stop(self) -> None:
        self.open.set()
        await self._runner.cleanup()
        await self._session.close()

    async def _pass(self, request: web.Request) -> web.Response:
        if "Range" in request.headers:
            self.ranges.append((request.path, request.headers["Range"]))
            if len(self.ranges) > self.let_through:
                await self.open.wait()
        url = self._upstream + request.raw_path
        headers = {k: v for k, v in request.headers.items() if k != "If-Match"}
        async with self._session.get(url, headers=headers) as answer:
            body = await answer.read()
            kept = ("ETag", "Content-Range", "Last-Modified", "Content-Type")
            headers = {k: answer.headers[k] for k in kept if k in answer.headers}
            if "Range" in request.headers and self.corrupt:
                self.corrupt -= 1
                body = noise(len(body), self.corrupt)
            if self.new_etag:
                headers["ETag"] = self.new_etag
                for etag in ETAGS:
                    body = body.replace(etag.encode(), self.new_etag.strip('"').encode())
            return web.Response(status=answer.status, body=body, headers=headers)


@pytest.fixture(scope="module")
def s3():
    """The address of an S3 whose objects no test changes."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    fill_bucket(f"http://{host}:{port}")
    yield f"http://{host}:{port}"
    server.stop()


def fill_bucket(s3: str) -> None:
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=s3, **keys)
    client.create_bucket(Bucket="weights")
    public = {"ACL": "public-read"}
    for key, content in BUCKET.items():
        client.put_object(Bucket="weights", Key=key, Body=content, **public)
    client.upload_fileobj(io.BytesIO(LARGE), "weights", "m/model.safetensors", public)


BUCKET = {
    "m/config.json": CONFIG,
    "m/sub/a b+c%41.txt": b"names are odd",
    "m/.cache/x": b"hidden",
    "m/empty": b"",
    "m/": b"",  # what a console leaves for a folder
    "m/sub/": b"",
    "m2/other": b"not of m",
    "m": b"not of m either",
}
LARGE = noise(3 * PART_BYTES + 5)
IN_BUCKET = {
    "config.json": CONFIG,
    "sub/a b+c%41.txt": b"names are odd",
    ".cache/x": b"hidden",
    "empty": b"",
    "model.safetensors": LARGE,
}
ETAGS = [hashlib.md5(content).hexdigest() for content in (CONFIG, b"names are odd", b"hidden", b"")]


@pytest.fixture
async def bucket(s3, loader) -> AsyncIterator[Gate]:
    gate = Gate(s3)
    await gate.start()
    loader.program = ("-c", SMALLER_PARTS)
    loader.env |= {
        "AWS_ENDPOINT_URL": gate.url,
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
    }
    yield gate
    await gate.stop()


def of_large(gate: Gate) -> list[str]:
    return [part for path, part in gate.ranges if path.endswith("model.safetensors")]


async def test_what_is_below_a_url_becomes_a_folder_in_parts(loader, bucket):
    assert (await loader.run("s3://weights/m")).code == 0
    assert loader.holds() == IN_BUCKET
    assert loader.left_over() == []
    assert len(of_large(bucket)) == 4
    asked = len(bucket.ranges)
    assert "already" in (await loader.run("s3://weights/m/")).said
    assert len(bucket.ranges) == asked


async def test_killed_load_resumes_and_is_never_partially_visible(loader, bucket):
    bucket.let_through = 5  # the small files, and two or three parts
    process = await loader.start("s3://weights/m")
    name = hashlib.sha256(b"model.safetensors").hexdigest()
    journal = loader.folder.parent / ".m.kubeai-load" / "parts" / name
    await until("two parts are there", lambda: _lines(journal) >= 2)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert not loader.folder.exists()
    have, before = _lines(journal), len(of_large(bucket))
    bucket.let_through = 1 << 30
    ran = await loader.run("s3://weights/m")
    assert ran.code == 0
    assert "from an earlier attempt" in ran.said
    assert loader.holds() == IN_BUCKET
    assert len(of_large(bucket)) == before + 4 - have


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


async def test_concurrent_loads_of_one_folder_do_not_interfere(loader, bucket):
    bucket.let_through = 0
    first = await loader.start("s3://weights/m")
    await until("it loads", lambda: bucket.ranges)
    assert "another load into this folder is running" in await loader.fails("s3://weights/m")
    bucket.open.set()
    assert await first.wait() == 0
    assert loader.holds() == IN_BUCKET


async def test_corrupt_object_is_fetched_again_then_fails(loader, bucket):
    bucket.corrupt = 1
    assert (await loader.run("s3://weights/m")).code == 0
    assert loader.holds() == IN_BUCKET
    await asyncio.to_thread(subprocess.run, ["rm", "-r", str(loader.folder)], check=True)
    bucket.corrupt = 1 << 20
    assert "two downloads differ" in await loader.fails("s3://weights/m")


async def test_etags_that_are_not_digests_are_detected(loader, bucket):
    bucket.new_etag = f'"{"0" * 32}"'  # as an encrypting bucket has them
    assert (await loader.run("s3://weights/m")).code == 0
    assert loader.holds() == IN_BUCKET
    assert len(of_large(bucket)) == 4, "it was found out with the small ones"


async def test_a_volumes_root_is_filled_file_by_file(loader, bucket):
    loader.folder.mkdir()
    (loader.folder / "config.json").write_text("of an earlier load")
    mounted = f"mount --bind {loader.folder} {loader.folder} && exec "
    within = ("unshare", "-rm", "sh", "-c", mounted + '"$@"', "sh")
    if (await loader.run("s3://weights/m", *within)).said.startswith("unshare:"):
        pytest.skip("no namespaces here")
    assert loader.holds() == IN_BUCKET


async def test_insufficient_space_is_reported_before_downloading(loader, bucket):
    loader.folder = loader.folder.parent / "small" / "m"
    loader.folder.parent.mkdir()
    mounted = f"mount -t tmpfs -o size=8m none {loader.folder.parent} && exec "
    within = ("unshare", "-rm", "sh", "-c", mounted + '"$@"', "sh")
    ran = await loader.run("s3://weights/m", *within)
    if ran.said.startswith("unshare:"):
        pytest.skip("no namespaces here")
    assert ran.code == 2
    assert "not enough space: needs 0.01 GB more" in ran.said
    assert bucket.ranges == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://nobody/m", "no such bucket or key"),
        ("s3://weights/none", "no such key"),
        ("s3://weights/m/config.json", "no such key"),
        ("ftp://weights/m", "must be an hf://, s3://, gs:// or oss:// URL"),
    ],
)
async def test_missing_objects_are_reported(loader, bucket, url, words):
    assert words in await loader.fails(url)


async def test_wrong_credentials_are_an_error_that_names_them(loader, bucket, s3):
    async with ClientSession() as session:
        await session.post(f"{s3}/moto-api/reset-auth", data="0")
        try:
            said = await loader.fails("s3://weights/m")
        finally:
            await session.post(f"{s3}/moto-api/reset-auth", data="inf")
    assert "access denied; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said


async def test_empty_key_in_a_secret_is_ignored(loader, bucket):
    loader.env |= {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    assert (await loader.run("s3://weights/m")).code == 0
    assert loader.holds() == IN_BUCKET


async def test_a_public_bucket_wants_no_key_file_though_a_place_for_one_is_named(loader, bucket):
    loader.env |= {
        "GOOGLE_APPLICATION_CREDENTIALS": str(loader.folder / "nowhere.json"),
        "GOOGLE_BASE_URL": bucket.url,
    }
    assert (await loader.run("gs://weights/m")).code == 0
    assert loader.holds() == IN_BUCKET


async def test_gs_and_oss_are_buckets_too(loader, bucket, tmp_path):
    """moto stands for both: Google's XML interface and Alibaba's are the same for what is used."""
    pem = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    key = {
        "type": "service_account",
        "client_email": "m@example.com",
        "private_key": pem.decode(),
        "private_key_id": "1",
    }
    (tmp_path / "key.json").write_text(json.dumps(key))
    loader.env |= {
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json"),
        "GOOGLE_BASE_URL": bucket.url,
    }
    assert (await loader.run("gs://weights/m")).code == 0
    assert loader.holds() == IN_BUCKET
    assert "set OSS_REGION" in (await loader.run("oss://weights/m")).said
    loader.env |= {"OSS_ENDPOINT": bucket.url, "OSS_ACCESS_KEY_ID": "k"}
    loader.env["OSS_ACCESS_KEY_SECRET"] = "s"
    assert (await loader.run("oss://weights/m")).code == 0
    assert loader.holds() == IN_BUCKET
