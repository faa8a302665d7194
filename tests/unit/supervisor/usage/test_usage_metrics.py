"""The usage of keys in a scrape: series of the keys that exist."""

import asyncio

import pytest
from fakes.kube import FakeKube
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from kubeai._load import LoadTable
from kubeai.routing.publisher import Publisher
from kubeai.routing.usage import UsageReport, UsageRow
from kubeai.supervisor.metrics import Metrics
from kubeai.supervisor.usage.book import FLUSH_INTERVAL_S, FLUSH_JITTER, UsageBook


async def scrape(book, accept=""):
    table = LoadTable.create(8, 1)
    metrics = Metrics(table, Publisher(table), usage=book.collector)
    body, content_type = await metrics.scrape(accept)
    table.close()
    parse = openmetrics if "openmetrics" in content_type else prometheus
    families = list(parse(body.decode()))
    assert {"kubeai_build", "kubeai_build_info"} & {family.name for family in families}
    return {
        (
            sample.name.removeprefix("kubeai_"),
            *(sample.labels[name] for name in ("key", "tenant", "model") if sample.labels),
        ): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith(("kubeai_key_", "kubeai_usage_"))
    }


@pytest.mark.looptime
async def test_each_key_and_model_has_series_until_the_key_is_gone():
    keys = {"a", "b"}
    book = UsageBook(FakeKube(), "default", "r", keys=lambda: keys, models=lambda: ["m"])
    report = UsageReport((UsageRow("a", "t", "m", 2, 1, 30, 20, 10),))
    book.add(report)
    book.add(report)
    book.add(UsageReport((UsageRow("b", "u", "m", 1, 0, 3, 2, 1),)))
    labels = ("a", "t", "m")
    found = await scrape(book)
    assert await scrape(book, "application/openmetrics-text; version=1.0.0") == found
    assert {name: value for (name, *has), value in found.items() if tuple(has) == labels} == {
        "key_requests_total": 4,
        "key_requests_estimated_total": 2,
        "key_prompt_tokens_total": 60,
        "key_prompt_tokens_cached_total": 40,
        "key_completion_tokens_total": 20,
    }
    assert found["usage_write_failures_total",] == 0
    assert found["key_requests_total", "b", "u", "m"] == 1
    keys.discard("a")
    running = asyncio.create_task(book.run())
    await asyncio.sleep(FLUSH_INTERVAL_S * FLUSH_JITTER + 1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert {has[0] for _, *has in await scrape(book) if has} == {"b"}
