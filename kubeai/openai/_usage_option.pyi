"""Has an engine report the tokens of a stream: ``stream_options.include_usage``."""

from kubeai.openai._body_scan import InferenceRequest

def asking_for_usage(request: InferenceRequest, payload: bytes) -> bytes | None:
    """The payload with ``include_usage``; None if nothing is to be added.

    ``payload``: the request's body, or that with another ``model``. None if its response is not a
    stream that reports its usage on demand, or if the client itself asks for it. Releases the GIL
    if the payload is large.
    """
