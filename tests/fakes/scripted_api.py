"""A Kubernetes API server that answers from scripts, for the tests of the client."""

from __future__ import annotations

import asyncio
import time

import orjson
import yaml
from aiohttp import web

from kubeai.kube.exec import PROTOCOL_V4


def thing(name, version, **data):
    """A ConfigMap."""
    return {"metadata": {"name": name, "resourceVersion": str(version)}, "data": data}


def event(kind, obj):
    """One line of a watch."""
    return orjson.dumps({"type": kind, "object": obj}) + b"\n"


def gone():
    """The event that ends a watch whose resourceVersion has expired."""
    return event("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "old"})


class ScriptedApi:
    """Responds from scripts: `lists` and `watches` are used in turn, the last one repeatedly."""

    def __init__(self):
        self.url = ""  # set by who serves it
        self.requests = []
        self.times_s = []  # arrival times of the requests
        self.lists = [([], "1")]
        self.watches = []
        self.answer = None  # (status, body, headers) for everything else
        self.tokens = None
        self.messages = []  # of an exec, before the server ends the connection
        self.silent = False  # if true, it does not end the connection
        self.left = asyncio.Event()  # set when the client of an exec disconnects
        self.done = asyncio.Event()
        self.again = asyncio.Event()  # set when the last watch of the script is open

    async def handle(self, request):
        body = await request.read()
        self.requests.append((request.method, request.path_qs, request.headers, body))
        self.times_s.append(time.monotonic())
        if self.tokens and request.headers.get("Authorization") not in self.tokens:
            return web.json_response({"message": "who are you", "code": 401}, status=401)
        if self.answer is not None:
            status, body, headers = self.answer
            return web.Response(status=status, body=body, headers=headers)
        if "command" in request.query:
            return await self.exec(request)
        if "watch" in request.query:
            return await self.watch(request)
        items, version = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
        meta = {"resourceVersion": version}
        if isinstance(items, dict):  # pages by their continue token
            items, meta["continue"] = items[request.query.get("continue", "")]
        return web.json_response({"metadata": meta, "items": items})

    async def exec(self, request):
        response = web.WebSocketResponse(protocols=(PROTOCOL_V4,))
        await response.prepare(request)
        for message in self.messages:
            await response.send_bytes(message)
        while self.silent and not response.closed:
            await response.receive()
        self.left.set()
        return response

    async def watch(self, request):
        if not self.watches:
            self.again.set()
            response = web.StreamResponse()
            await response.prepare(request)
            await self.done.wait()
            return response
        chunks = self.watches.pop(0)
        if chunks is None:
            await self.done.wait()
        if isinstance(chunks, int):
            return web.json_response({"code": chunks, "message": "no"}, status=chunks)
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0)
        return response

    def watched_from(self):
        queries = [path for _, path, _, _ in self.requests if "watch=1" in path]
        return [q.split("resourceVersion=")[1].split("&")[0] for q in queries]


def kubeconfig(path, url, user, context=None, **cluster):
    """Write a kubeconfig; ``context`` and ``cluster`` are further settings. Returns its path."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": url} | cluster}],
        "users": [{"name": "u", "user": user}],
        "contexts": [
            {
                "name": "c",
                "context": {"cluster": "c", "user": "u", "namespace": "ns"} | (context or {}),
            }
        ],
    }
    path.write_text(yaml.safe_dump(config))
    return str(path)
