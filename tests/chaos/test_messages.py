"""A sample of the chaos test for each broker: every message has its response, none is lost."""

import pytest
from chaos.messages import Options, run
from chaos.under_test import DURABLE

# JetStream's server is the quickest; the others only show that they differ in nothing.
SAMPLES = {name: Options(name, messages=1000 if name == "jetstream" else 500) for name in DURABLE}

pytestmark = [pytest.mark.broker, pytest.mark.timeout(400)]


@pytest.mark.parametrize("name", DURABLE)
async def test_every_message_has_its_response_whatever_fails(tmp_path, name):
    report = await run(SAMPLES[name], tmp_path)
    print(report.table())
    assert not report.faults
