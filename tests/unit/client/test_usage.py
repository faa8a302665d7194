"""``kubeai usage`` prints the stored usage, by key and Model or added up."""

import csv
import io
import json

import pytest
from fakes.kube import FakeKube

from kubeai.api.usage import GROUPS, KeyUsage, UsageCounts, encode_usage, grouped
from kubeai.client.usage import read_usage, write_csv, write_json, write_table
from kubeai.errors import KubeAIError


def config_map(name, **entries):
    labels = {"kubeai.org/usage": "true"}
    data = {key: encode_usage(usage) for key, usage in entries.items()}
    return {"metadata": {"name": name, "labels": labels, "resourceVersion": "1"}, "data": data}


@pytest.fixture
async def total():
    kube = FakeKube()
    old = {"m": UsageCounts(1, 0, 10, 2, 5, "2026-01-01")}
    new = {"m": UsageCounts(2, 1, 20, 4, 6, "2026-02-01"), "n": UsageCounts(1000, 0, 1234567)}
    for found in (
        config_map("kubeai-usage-0", a=KeyUsage("now", new), b=KeyUsage("now", old)),
        config_map("kubeai-usage-1", a=KeyUsage("before", old)),
        {"metadata": {"name": "other"}, "data": {"a": "x"}},
    ):
        kube.objects["configmaps", found["metadata"]["name"]] = found
    return await read_usage(kube, "default")


def rows(total, by):
    return [tuple(usage.row().values()) for usage in grouped(total, by)]


async def test_the_entries_of_a_key_in_several_config_maps_are_one(total):
    assert rows(total, "") == [
        ("a", "now", "m", 3, 1, 30, 6, 11, "2026-02-01"),
        ("a", "now", "n", 1000, 0, 1234567, 0, 0, ""),
        ("b", "now", "m", 1, 0, 10, 2, 5, "2026-01-01"),
    ]


async def test_usage_is_added_up_by_key_tenant_or_model(total):
    assert [row[:3] for row in rows(total, "key")] == [("a", "now", 1003), ("b", "now", 1)]
    assert [row[:2] for row in rows(total, "tenant")] == [("now", 1004)]
    assert [row[:2] for row in rows(total, "model")] == [("m", 4), ("n", 1000)]


async def test_the_table_is_aligned(total):
    out = io.StringIO()
    write_table(grouped(total, ""), "", out)
    assert out.getvalue().splitlines() == [
        "KEY  TENANT  MODEL  REQUESTS  ESTIMATED     PROMPT  CACHED  COMPLETION  LAST USED",
        "a    now     m             3          1         30       6          11  2026-02-01",
        "a    now     n         1,000          0  1,234,567       0           0",
        "b    now     m             1          0         10       2           5  2026-01-01",
    ]


@pytest.mark.parametrize("by", ["", *GROUPS])
async def test_json_and_csv_have_the_same_fields(total, by):
    out = io.StringIO()
    write_json(grouped(total, by), out)
    listed = json.loads(out.getvalue())
    out = io.StringIO()
    write_csv(grouped(total, by), by, out)
    read = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert [{name: str(value) for name, value in row.items()} for row in listed] == read


async def test_an_entry_that_is_malformed_is_named():
    kube = FakeKube()
    found = config_map("kubeai-usage-0")
    found["data"]["key-7"] = "{"
    kube.objects["configmaps", "kubeai-usage-0"] = found
    with pytest.raises(KubeAIError, match=r"key-7 is malformed .* remove its entry"):
        await read_usage(kube, "default")
