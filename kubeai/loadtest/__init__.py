"""``kubeai bench``: load generator and benchmark reports for any OpenAI-compatible endpoint.

`scenario` defines what is sent and when. `run` is the main process: it checks the endpoint, starts
`generator` processes and merges their measurements, which arrive as `messages`. In a generator,
`executor` starts conversations, `client` speaks HTTP and `sse` parses streams. `saturation`
detects whether the client was the bottleneck, and `endpoint` finds out about models and tokenizers.
`simulate` runs the same traffic on simulated engines, `sweep` either at several rates, and `demo`
on mock engines behind a real gateway. `reports` shows the results. `arguments` declares the options
of all commands, and `options` converts them. The server never imports this package.
"""
