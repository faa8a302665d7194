"""A worker that serves uploads, and a client of it."""

import pytest
import pytest_asyncio
from fakes.uploads import Replica, client_of


@pytest.fixture
def replica():
    return Replica()


@pytest_asyncio.fixture
async def client(stack, replica):
    return await client_of(stack, replica)
