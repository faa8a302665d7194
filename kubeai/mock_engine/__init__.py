"""The mock engine: an HTTP server that answers as vLLM does, from a simulated engine.

``kubeai mock-engine`` and ``python -m kubeai.mock_engine`` call :func:`main`. ``options`` reads
the flags, ``dialects`` knows the APIs' shapes (pure), ``server`` is the aiohttp application, and
``kubeai.simulation`` decides what is said and when.

Engines start while a request waits for them, so nothing is imported here that is not needed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE_ERROR = 2


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    from kubeai.errors import KubeAIError
    from kubeai.logs import get_logger, setup_logging
    from kubeai.mock_engine.options import parse

    try:
        setup_logging()
        options, ignored = parse(argv)
        log = get_logger(__name__)
        for flag in ignored:
            log.info("ignoring a flag that the mock engine does not know", flag=flag)
        from kubeai.mock_engine.server import run

        run(options)
    except KubeAIError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0
