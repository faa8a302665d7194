"""The mock engine: an HTTP server with vLLM's API on top of a simulated engine.

``kubeai mock-engine`` and ``python -m kubeai.mock_engine`` call :func:`main`. ``options`` parses
the flags, ``formats`` implements the APIs' formats (pure), ``server`` is the aiohttp application,
``pacing`` runs the engine in real time, and ``kubeai.simulation`` generates tokens and their
timing.

Requests wait for engines to start, so this module imports only what it needs.
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
            log.info("ignoring unknown flag", flag=flag)
        from kubeai.mock_engine.server import run

        run(options)
    except KubeAIError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0
