"""Fixtures of the mock engine's tests."""

from __future__ import annotations

import pytest
import structlog
from fakes.mock_engine import FAST, serving


@pytest.fixture
async def served():
    async with serving(*FAST) as served:
        yield served


@pytest.fixture(autouse=True)
def logging_as_it_was():
    yield
    structlog.reset_defaults()  # main() configures it for a separate process
