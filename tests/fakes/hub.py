"""A hub as huggingface_hub sees it: lists repositories and serves their files, whole or in ranges.

Files may be made of what they are not: of other bytes than their digest says, or cut off.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from aiohttp import web

from fakes.web import start

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    files: dict[str, bytes]
    token: str = ""  # who may see it; anybody if empty
    gated: bool = False
    corrupt: dict[str, int] = field(default_factory=dict)  # path → number of corrupt responses
    cut: dict[str, int] = field(default_factory=dict)  # path → sent once up to this byte
    ranges: list[tuple[str, int]] = field(default_factory=list)  # what was asked for, from where


class Hub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.url = ""

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/api/models/{id:[^/]+/[^/]+}", self._info)
        app.router.add_get("/api/models/{id:[^/]+/[^/]+}/revision/{revision}", self._info)
        app.router.add_get("/api/models/{id:[^/]+/[^/]+}/tree/{revision}", self._tree)
        app.router.add_get("/{id:[^/]+/[^/]+}/resolve/{revision}/{path:.+}", self._resolve)
        self._runner, self.url = await start(app, shutdown_timeout_s=0.1)

    async def stop(self) -> None:
        await self._runner.cleanup()

    def _repository(self, request: web.Request) -> Repository:
        one = self.repositories.get(request.match_info["id"])
        asked_by = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if one is None or (one.token and one.token != asked_by and not one.gated):
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            raise web.HTTPUnauthorized(headers=headers)
        if one.gated and one.token != asked_by:
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            raise web.HTTPForbidden(headers=headers)
        return one

    async def _info(self, request: web.Request) -> web.Response:
        one, name = self._repository(request), request.match_info["id"]
        siblings = [{"rfilename": path} for path in one.files]
        return web.json_response(
            {"id": name, "modelId": name, "sha": REVISION, "private": False, "siblings": siblings}
        )

    async def _tree(self, request: web.Request) -> web.Response:
        one = self._repository(request)
        found = []
        for path, content in one.files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
            if is_large(path):
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
            found.append(entry)
        return web.json_response(found)

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        one, path = self._repository(request), request.match_info["path"]
        if path not in one.files:
            raise web.HTTPNotFound(headers={"X-Error-Code": "EntryNotFound"})
        content = one.files[path]
        etag = hashlib.sha256(content).hexdigest() if is_large(path) else git_blob(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return web.Response(headers=headers | {"Content-Length": str(len(content))})
        start = request.http_range.start or 0
        one.ranges.append((path, start))
        if one.corrupt.get(path, 0):
            one.corrupt[path] -= 1
            content = bytes(len(content))
        status = 206 if "Range" in request.headers else 200
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body, end = content[start:], one.cut.pop(path, None)
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body if end is None else body[: end - start])
        if end is not None:
            request.transport.abort()
        return response


def is_large(path: str) -> bool:
    """Whether a hub keeps it apart from the repository's text."""
    return path.endswith((".safetensors", ".bin"))


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
