"""``kubeai bench``: load on any OpenAI endpoint, and what became of it.

`plan` says what is sent and when, `run` is the process that a person started: it asks the endpoint
whether it is there, starts workers (`worker`, processes of their own) and puts together what they
tell. In a worker `drive` begins conversations, `client` speaks HTTP, `sse` reads streams.
`saturation` judges whether the client was the bottleneck, `compare` writes text for a terminal,
`report` a page. `simulate` plays the same traffic on simulated engines.
Nothing here is imported by what serves requests.
"""
