"""Requests that arrive as messages: one process beside the workers, without a listener.

``message.py`` defines the format of requests and responses, ``policy.py`` when a request is tried
again. ``stream.py`` receives the messages of one stream and acknowledges them, ``in_hand.py`` gets
the response to one message, ``publisher.py`` publishes it, and ``counts.py`` counts.
``operation.py`` limits the calls of a broker's library, ``relay_client.py`` sends requests through
the gateway's own server, and ``__main__.py`` is the process, which the supervisor starts if the
config has streams.
"""
