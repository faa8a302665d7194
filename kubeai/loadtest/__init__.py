"""``kubeai bench``: load generator and benchmark reports for any OpenAI-compatible endpoint.

`scenario` defines what is sent and when. `run` is the main process: it checks the endpoint, starts
`generator` processes and merges their measurements, which arrive as `messages`. In a generator,
`executor` starts conversations, `client` speaks HTTP and `sse` parses streams. `saturation`
detects whether the client was the bottleneck; `compare` renders text tables and `report` renders
HTML. `simulate` runs the same traffic on simulated engines. The server never imports this package.
"""
