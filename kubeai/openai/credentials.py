"""How clients send an API key."""

from __future__ import annotations

from kubeai.errors import KubeAIError


def bearer(api_key: str) -> str:
    """The header Authorization for a key, without white space at its ends. May raise KubeAIError.

    A key that was read from a file often ends with a newline.
    """
    key = api_key.strip()
    if not (key.isascii() and key.isprintable()):
        raise KubeAIError(
            "the API key has characters besides the printable ones of ASCII, which cannot be sent "
            "in a header; set --api-key, KUBEAI_API_KEY or OPENAI_API_KEY to the key alone"
        )
    return f"Bearer {key}"
