"""Time that passes when there is nothing to do."""

import pytest

# looptime turns the loop 42 times before it moves the time, for what happens outside of the loop.
# Nothing does here, and the turns were three quarters of what these tests took.
FAKE_TIME = pytest.mark.looptime(noop_cycles=0)
