"""How a Model's spec names itself and other Models: aliases, fallbacks, canaries.

Part of the types in `kubeai.api.model`.
"""

from __future__ import annotations

from typing import Annotated

from kubeai.api.config.duration import parse_duration
from kubeai.api.objects import ApiValue, doc

NAME_MAX_CHARS = 40  # of a Model
ALIAS_MAX_CHARS = 256
WAIT_BEFORE_FALLBACK_S = 10.0  # unless the Model says otherwise
DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"

ModelName = Annotated[str, doc("Name of a Model.", maxLength=NAME_MAX_CHARS, minLength=1)]
Alias = Annotated[
    str,
    doc("A name.", maxLength=ALIAS_MAX_CHARS, minLength=1, pattern=r"^[^\x00-\x1f\x7f]+$"),
]


class Canary(ApiValue, frozen=True, kw_only=True):
    """Another Model that serves a part of the clients."""

    model: Annotated[
        str,
        doc("Name of the other Model.", maxLength=NAME_MAX_CHARS, minLength=1),
    ]
    percent: Annotated[
        int,
        doc(
            "How many of 100 clients it serves. A client is an API key; without keys, the "
            "beginning of a prompt; without a prompt, a client's address.",
            format="int32",
            minimum=0,
            maximum=100,
        ),
    ]


def wait_before_fallback_s(text: str) -> float:
    """The value of ``waitBeforeFallback`` in seconds.

    The API server rejects what is not a duration. A Model that was stored all the same has the
    default.
    """
    if not text:
        return WAIT_BEFORE_FALLBACK_S
    try:
        return max(0.0, parse_duration(text))
    except ValueError:
        return WAIT_BEFORE_FALLBACK_S
