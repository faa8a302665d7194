"""The relay: HTTP/1.1 between clients' connections and engines.

Owns all downstream connections, all upstream connections and the data that passes between them. It
knows nothing of models: the Exchange of a request, created by the factory passed to the Relay,
decides where the request goes; the relay sends it there.

The forwarded head is written from scratch, with one framing header and without hop-by-hop headers.
Bodies are passed through without decoding: one of known length is counted, the framing of a chunked
one is checked.

Guarantees:
- a request that is malformed, too large or too slow gets an error response (400, 408, 413, 417,
  431), its connection is closed, and no byte of it reaches an upstream;
- one request at a time per connection; data that a client sends meanwhile waits, with reading
  paused;
- one write per direction and wake-up, and flow control both ways: a slow reader pauses its own
  upstream and no other;
- before the first byte of a response, the Exchange may recover from a failure (``wants_retry``);
  after it, the client's connection is cut, so a broken response never looks complete;
- when a client disconnects, its upstream connection is closed at once;
- ``on_end`` is called exactly once per Exchange, whatever happens;
- every wait has a deadline, checked every ``tick_s``.

One thread, one event loop (uvloop). Each module imports only those above it:

    _text           text as C memory
    _socket         reading and writing without the event loop's buffers
    _chunked        chunked framing; sans I/O, like the heads and a response's body
    _head           what the heads of requests and responses have in common
    _request_head   a request's head, and _request_body, its body under its limits
    _response_head  a response's head, and _response_body, its body from one framing to another
    _renaming       the model's name in a response's body
    _usage_filter   the report of usage in a stream whose client has not asked for it
    _relay          all connections, their limits and timers
    _exchange       one request and its response, the abstract ends of its path
    _downstream     a client's connection: one per connection
    _upstream       a connection to an engine: pooled when idle
    _early          a response that begins before there is an upstream
    _pool           the idle connections to one upstream
    _tunnel         a WebSocket: bytes both ways, once an upstream has accepted the handshake

        client ── Downstream ── Exchange ── Upstream ── engine
"""
