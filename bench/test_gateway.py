"""One exchange from first byte to last, without sockets and their system calls.

Each round is 1,000 requests: divide the reported time by 1,000. A real worker also spends time in
the event loop and the kernel (``gateway_vs_nginx.py`` measures the total).
"""

import hashlib
import json

import pytest

from kubeai._journal import Journal
from kubeai._key_table import KeyTable
from kubeai._keys import Key
from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai._prompt import Prompt
from kubeai.api.config.system import GatewayConfig, KeysConfig
from kubeai.gateway.context import Context
from kubeai.gateway.relay._downstream import Downstream
from kubeai.gateway.relay._upstream import Upstream
from kubeai.gateway.server import Server
from kubeai.routing.keys import KeyRecord
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route

TIMES = range(1000)
KEYED = ", key with limits"
ALIAS = "meta-llama/Llama-3.1-8B-Instruct"
HEAD = (
    "POST /openai/v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n"
    "User-Agent: OpenAI/Python 3.54.0\r\nAccept: application/json\r\n"
    "Accept-Encoding: gzip, deflate\r\nAuthorization: Bearer none\r\n"
    "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)
CHUNK = b"24\r\ndata: " + b"x" * 28 + b"\n\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 300\r\n\r\n"
USAGE = (
    b',"usage":{"prompt_tokens":179,"total_tokens":195,"completion_tokens":16,'
    b'"prompt_tokens_details":{"cached_tokens":160}},"prompt_logprobs":null}'
)
ANSWER = b'{"choices":[{"message":{"content":"' + b"x" * 300
ANSWER = ANSWER[: 300 - len(USAGE) - 4] + b'"}}]' + USAGE
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Transport:
    def get_extra_info(self, name: str) -> tuple[str, int] | None:
        return ("10.0.0.1", 1) if name == "peername" else None

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass

    def writelines(self, parts: tuple[bytes, ...]) -> None:
        pass

    def abort(self) -> None:
        pass


@pytest.fixture(params=["LeastLoad", "PrefixHash", "PrefixCache"])
def ends(request):
    """The callbacks that the event loop calls with data from the client and from the engine.

    The parameter is a strategy, followed by ``KEYED`` if requests have a key with all limits.
    """
    strategy = request.param.removesuffix(KEYED)
    supervisors = LoadTable.create(8, 1)
    index = PrefixIndex.create(8, 1 << 16)
    publisher = Publisher(supervisors, index)
    is_keyed = strategy != request.param
    config = GatewayConfig(keys=KeysConfig(required=is_keyed))
    context = Context(config, lambda model: None)
    journal = Journal.create(1)
    context.journal = Journal.attach(journal.fd, 0)
    server = Server(context, LoadTable.attach(supervisors.fd, 0), PrefixIndex.attach(index.fd, 0))
    if is_keyed:
        keys = KeyTable.create(8, 1)
        limits = dict.fromkeys(("requests_per_minute", "tokens_per_minute", "in_flight_max"), 10**9)
        digest = hashlib.sha256(b"none").digest()  # of the key in HEAD
        key = Key(KeyRecord("key", digest, "tenant", row=0, generation=keys.open_row(0), **limits))
        context.keys[digest] = key
        context.limits = KeyTable.attach(keys.fd, 0)
    table = server.routes
    endpoints = (Endpoint("pod-0", "10.0.0.2:8000"),)
    route = Route("m", "VLLM", strategy=strategy, endpoints=endpoints, aliases=(ALIAS,))
    table.apply(publisher.update("m", route))
    reservation = table.find("m").pick(Prompt())
    pool = reservation.target
    reservation.release()
    upstream = Upstream(pool)
    upstream.connection_made(Transport())
    pool.keep(upstream)
    downstream = Downstream(server.relay)
    downstream.connection_made(Transport())
    yield downstream.data_received, upstream.data_received
    downstream.connection_lost(None)
    table.close()


def chat(prompt_bytes: int, model: str = "m") -> bytes:
    messages = [
        {"role": "system", "content": "You are a helpful assistant. " * 5},
        {"role": "user", "content": "x" * prompt_bytes},
    ]
    body = json.dumps({"model": model, "messages": messages}).encode()
    return HEAD.format(len(body)).encode() + body


@pytest.mark.parametrize("prompt_bytes", [560, 400_000])
def test_a_request_and_its_answer(benchmark, ends, prompt_bytes):
    to_gateway, from_engine = ends
    request, answer = chat(prompt_bytes), WHOLE + ANSWER

    def thousand():
        for _ in TIMES:
            to_gateway(request)
            from_engine(answer)

    benchmark.pedantic(thousand, rounds=50 if prompt_bytes < 1000 else 3, warmup_rounds=1)


def test_a_stream_of_64_chunks(benchmark, ends):
    to_gateway, from_engine = ends
    request = chat(560)

    def thousand():
        for _ in TIMES:
            to_gateway(request)
            from_engine(STREAM)
            for _ in range(64):
                from_engine(CHUNK)
            from_engine(b"0\r\n\r\n")

    benchmark.pedantic(thousand, rounds=10, warmup_rounds=1)
