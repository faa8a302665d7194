"""How clients send an API key."""

from __future__ import annotations

from kubeai.errors import KubeAIError


def authorization(api_key: str) -> dict[str, str]:
    """The header with a key, without white space at its ends; none for an empty key.

    A key that was read from a file often ends with a newline. May raise KubeAIError.
    """
    key = api_key.strip()
    if not (key.isascii() and key.isprintable()):
        raise KubeAIError(
            "the API key has characters besides the printable ones of ASCII, which cannot be sent "
            "in a header; set --api-key, KUBEAI_API_KEY or OPENAI_API_KEY to the key alone"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}
