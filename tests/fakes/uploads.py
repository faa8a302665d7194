"""Forms with audio, an engine that receives them, and a worker before it."""

import asyncio

import aiohttp
from aiohttp import web

from fakes.web import serving
from fakes.world import World
from kubeai.routing.routes import Endpoint, Route

TRANSCRIPTIONS = "/openai/v1/audio/transcriptions"


class Engine:
    """An engine that answers each request from ``answers``, using the last one repeatedly."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.left = 0  # requests whose client disconnected before the response

    async def handle(self, request):
        data = await request.read()
        self.requests.append((request, data))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        try:
            if callable(answer):
                return await answer(request)
        except asyncio.CancelledError:
            self.left += 1
            raise
        return web.Response(status=answer, text=f"engine says {answer}")

    def runner(self):
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self.handle)
        return web.AppRunner(app, access_log=None, handler_cancellation=True)

    async def form(self, number=-1):
        """The parts of a received request, as [(name, filename, content)]."""
        request, data = self.requests[number]
        reader = aiohttp.StreamReader(_protocol(), 2**30)
        reader.feed_data(data)
        reader.feed_eof()
        multipart = aiohttp.MultipartReader(request.headers, reader)
        parts = []
        while (part := await multipart.next()) is not None:
            parts.append((part.name, part.filename, bytes(await part.read())))
        return parts


def _protocol():
    return aiohttp.base_protocol.BaseProtocol(asyncio.get_running_loop())


class Replica:
    """One worker's data plane, started by :func:`client_of`."""

    def __init__(self, **config):
        self.config = config
        self.world = None

    def publish(self, model, *addresses, gone=False, **values):
        values.setdefault("engine", "FasterWhisper")
        endpoints = tuple(Endpoint(f"{model}-{n}", a) for n, a in enumerate(addresses))
        values.setdefault("endpoints", endpoints)
        route = None if gone else Route(model, **values)
        self.world.table.apply(self.world.publisher.update(model, route))

    @property
    def context(self):
        return self.world.context

    @property
    def demands(self):
        return self.world.demanded

    def in_flight(self, model="w"):
        return self.world.in_flight(model)

    def active(self, model="w"):
        return self.world.active(model)

    def held(self, model="w"):
        return self.world.held(model)


async def client_of(stack, replica):
    replica.world = await World.start(**replica.config)
    stack.push_async_callback(replica.world.close)
    session = aiohttp.ClientSession(f"http://127.0.0.1:{replica.world.port}")
    return await stack.enter_async_context(session)


async def started(stack, *answers):
    engine = Engine(*answers)
    return engine, await stack.enter_async_context(serving(engine.runner()))


def form_of(*parts):
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in parts:
        if isinstance(value, str):
            form.add_field(name, value)
        else:
            form.add_field(name, value, filename="a.wav", content_type="audio/wav")
    return form


SPEECH = (("file", b"RIFF\0\r\n--x"), ("model", "w"), ("language", "de"))


async def error_of(response):
    assert response.content_type == "application/json"
    error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
