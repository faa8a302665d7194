"""Stores of weights for the pages' commands, as one process: a hub and a bucket store on loopback.

    python tests/docs/stores.py

prints the variables by which programs find them (``HF_ENDPOINT=http://127.0.0.1:…``,
``AWS_ENDPOINT_URL=…``), one a line, and serves until its stdin ends.

The hub has every repository, with files of a few bytes. Those of the owner ``acme`` are private:
they need the token ``hf_acme``. The bucket store is moto's. Its bucket ``acme-models`` has a model
below ``llama/``, which needs some credentials, and a public adapter below ``adapters/support/``.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes.hub import Hub, Repository

PRIVATE_OWNER, PRIVATE_TOKEN = "acme", "hf_acme"
BUCKET = "acme-models"
FILES = {
    "config.json": b'{"hidden_size": 8}',
    "adapter_config.json": b'{"r": 8}',
    "model.safetensors": bytes(4096),
}


class Repositories(dict[str, Repository]):
    """Every repository that is asked for."""

    @override
    def get(self, name: str, default: object = None) -> Repository:
        token = PRIVATE_TOKEN if name.startswith(f"{PRIVATE_OWNER}/") else ""
        return self.setdefault(name, Repository(FILES, token=token))


def fill(endpoint: str) -> None:
    """Create the bucket and its objects."""
    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=BUCKET)
    for folder, acl in (("llama", "private"), ("adapters/support", "public-read")):
        for name, content in FILES.items():
            client.put_object(Bucket=BUCKET, Key=f"{folder}/{name}", Body=content, ACL=acl)


async def serve() -> None:
    hub = Hub()
    hub.repositories = Repositories()
    await hub.start()
    buckets = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    buckets.start()
    host, port = buckets.get_host_and_port()
    fill(f"http://{host}:{port}")
    print(f"HF_ENDPOINT={hub.url}", f"AWS_ENDPOINT_URL=http://{host}:{port}", sep="\n", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    buckets.stop()
    await hub.stop()


if __name__ == "__main__":
    asyncio.run(serve())
