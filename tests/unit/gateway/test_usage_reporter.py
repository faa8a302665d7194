"""A worker reports each request once: at intervals, and when it ends."""

import asyncio

import pytest

from kubeai._keys import Key
from kubeai.gateway._metering import Meter, counted
from kubeai.gateway.usage_reporter import UsageReporter
from kubeai.routing.keys import KeyRecord
from kubeai.routing.usage import USAGE_INTERVAL_S, USAGE_ROWS_PER_S, UsageRow

KEY = Key(KeyRecord("alice", b"x" * 32, "acme"))


@pytest.mark.looptime
async def test_what_is_counted_is_reported_each_second_and_at_the_end():
    sent = []
    meter = Meter()
    reporter = UsageReporter(meter, sent.append)
    reporter.start()
    counted(meter, KEY, "m", 10, 2, 5)
    counted(meter, KEY, "m", 10, 2, 5, is_estimated=True)
    await asyncio.sleep(USAGE_INTERVAL_S * 3.5)
    assert [report.rows for report in sent] == [(UsageRow("alice", "acme", "m", 2, 1, 20, 4, 10),)]
    counted(meter, KEY, "n", 1, 0, 1)
    reporter.close()
    assert sent[1].rows == (UsageRow("alice", "acme", "n", 1, 0, 1, 0, 1),)
    await asyncio.sleep(USAGE_INTERVAL_S * 3)
    assert len(sent) == 2


@pytest.mark.looptime
async def test_after_many_rows_the_next_report_comes_later():
    sent = []
    meter = Meter()
    reporter = UsageReporter(meter, sent.append)
    reporter.start()
    for number in range(5000):
        counted(meter, Key(KeyRecord(f"key-{number}", b"x" * 32, "acme")), "m", 1, 0, 1)
    await asyncio.sleep(USAGE_INTERVAL_S * 1.5)
    assert len(sent) == 1
    counted(meter, KEY, "m", 1, 0, 1)
    await asyncio.sleep(5000 / USAGE_ROWS_PER_S - 1)
    assert len(sent) == 1
    await asyncio.sleep(1)
    assert len(sent) == 2
    reporter.close()


async def test_without_keys_there_are_no_reports():
    sent = []
    reporter = UsageReporter(None, sent.append)
    reporter.start()
    reporter.close()
    assert sent == []
