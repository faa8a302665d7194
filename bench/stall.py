"""How long one request body at the limit (64 MiB) holds a worker's loop.

    python bench/stall.py [--json FILE]

The body comes in pieces of 256 KiB; what is told is the longest that the worker was busy without
turning to anything else: taking the last piece, reading what is asked for, hashing, sending on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz.machine import End, Machine

LIMIT_BYTES = 64 << 20
PIECE_BYTES = 1 << 18
ROUNDS = 3
USER = b'{"role":"user","content":"%s"}'


def bodies() -> dict[str, bytes]:
    """One that is hard in each way that there is."""
    message = USER % b"x"
    messages = b'{"model":"m","messages":[%s]}'
    long = LIMIT_BYTES - 200
    return {
        "one long prompt": messages % (USER % (b"x" * long)),
        "not ASCII": messages % (USER % ("é".encode() * (long // 2))),
        "all escapes": messages % (USER % (b"\\n" * (long // 2))),
        "a million messages": messages % b",".join([message] * (long // (len(message) + 1))),
        "numbers": b'{"model":"m","x":[%s0]}' % (b"1," * (long // 2)),
    }


async def longest_ms(body: bytes) -> float:
    sent_on: list[End] = []
    async with Machine(answers=sent_on.append) as machine:
        client = machine.client()
        client.receive(
            b"POST /openai/v1/chat/completions HTTP/1.1\r\nHost: h\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        longest_s = 0.0
        for at in range(0, len(body), PIECE_BYTES):
            piece = body[at : at + PIECE_BYTES]
            began_s = time.perf_counter()
            client.receive(piece)
            longest_s = max(longest_s, time.perf_counter() - began_s)
        await machine.turn()
        assert sent_on, "it was sent on"
        client.receive_end(reset=True)
        await machine.turn()
    return longest_s * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    found = {}
    for name, body in bodies().items():
        found[name] = min(asyncio.run(longest_ms(body)) for _ in range(ROUNDS))
        print(f"{name:20}{found[name]:8.1f} ms", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
