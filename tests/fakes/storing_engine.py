"""An engine that stores responses, and computes them in the background."""

import json
from dataclasses import dataclass, field
from typing import Any

from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk

TEXT = "x" * 400
DELTA = b'event: response.output_text.delta\ndata: {"delta":"hi"}\n\n'


@dataclass
class Storing:
    """An engine that computes responses in the background until a test says that it is done."""

    responses: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: int = 0  # how often the state of a response was read
    credentials: set[str] = field(default_factory=set)  # with which it was read
    fails: bool = False  # to say what state a response is in

    async def __call__(self, wire: Wire, request: Message) -> None:
        if request.method == "POST" and request.target.endswith("/cancel"):
            self.responses[request.target.split("/")[3]]["status"] = "cancelled"
        if request.method == "POST" and request.target == "/v1/responses":
            body = json.loads(request.body)
            made = {"id": body["request_id"], "status": "queued", "usage": None, "text": TEXT}
            self.responses[made["id"]] = made
            if body.get("stream"):
                await wire.send(CHUNKED + chunk(DELTA * 10))
                await wire.reader.read()
            else:
                await wire.send(answer(200, json.dumps(made).encode()))
            return
        self.asked += 1
        self.credentials |= set(request.all("authorization"))
        if self.fails:
            raise Broken(b"", False)
        stored = self.responses.get(request.target.split("/")[3])
        await wire.send(answer(200 if stored else 404, json.dumps(stored or {}).encode()))

    def end(self, **changes: Any) -> None:
        for response in self.responses.values():
            response.update(changes)

    @property
    def id(self) -> str:
        (only,) = self.responses
        return only
