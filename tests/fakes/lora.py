"""A pod with adapters: an engine on loopback that answers as vLLM does, and its loader."""

from __future__ import annotations

from aiohttp import web

from kubeai.kube.exec import ExecResult
from kubeai.podspec import loader_commands


class Engine:
    """One pod's engine and the loader beside it; ``log`` has what was asked of both, in order."""

    def __init__(self):
        self.folder = {}  # adapter → URL whose files are there
        self.adapters = {}  # adapter → URL that was loaded
        self.log = []
        self.key = None
        self.refuse = False
        app = web.Application()
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        self._runner = web.AppRunner(app)

    async def start(self):
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self._runner.addresses[0][1]

    async def stop(self):
        await self._runner.cleanup()

    async def _load(self, request):
        body = await request.json()
        name = body["lora_name"]
        self.key = request.headers.get("Authorization")
        self.log.append(f"load {name}")
        if self.refuse or name not in self.folder:
            return web.json_response({"error": {"message": "no such files"}}, status=404)
        if name in self.adapters:
            return web.json_response({"message": "has already been loaded"}, status=400)
        assert body["lora_path"] == f"/adapters/{name}"
        self.adapters[name] = self.folder[name]
        return web.Response(text="Success")

    async def _unload(self, request):
        name = (await request.json())["lora_name"]
        self.log.append(f"unload {name}")
        if self.adapters.pop(name, None) is None:
            return web.json_response({"message": "cannot be found."}, status=404)
        return web.Response(text="Success")

    def run(self, command: list[str]) -> ExecResult:
        """What the loader does with a command."""
        self.log.append(" ".join(command))
        name = command[-1].removeprefix("/adapters/")
        if command == loader_commands.remove(command[-1]):
            self.folder.pop(name, None)
        elif command == loader_commands.link(*command[-2:]):
            self.folder[name] = command[-2]
        elif "missing" in command[1]:
            return ExecResult(1, f"no such repository: {command[1]}")
        else:
            self.folder[name] = command[1]
        return ExecResult(0, "")
