"""A site with two workers."""

from __future__ import annotations

import pytest
from fakes.queues import Site


@pytest.fixture
async def site():
    site = Site()
    yield site
    site.close()
