"""A scrape shows the load table's values, for models and endpoints that exist."""

import asyncio
import math
import re
import time

import promql_parser
import pytest
from fakes.limited_keys import Rows
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from repository import REPOSITORY

from kubeai._key_table import KeyTable
from kubeai._limits import charge
from kubeai._load import LoadTable
from kubeai._prompt import Prompt
from kubeai._queue_table import QueueTable
from kubeai.api.config.system import MessageStream, Messaging
from kubeai.routing.channel import StreamReport, Streams
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route
from kubeai.routing.table import RoutingTable
from kubeai.supervisor.key_metrics import KeyLimits
from kubeai.supervisor.message_streams import MessageStreams
from kubeai.supervisor.metrics import Metrics
from kubeai.supervisor.usage.ledger import UsageLedger
from kubeai.supervisor.usage.metrics import UsageCollector

ENDED, RETRIED = "kubeai_inference_requests_total", "kubeai_inference_requests_retries_total"


class Target:
    is_waited_on = False

    def __init__(self, routed, endpoint):
        pass

    def move_waiting(self, sent_before_s=math.inf):
        pass

    def close(self):
        pass


class Replica:
    def __init__(self, rows=64):
        self.table = LoadTable.create(rows, 2)
        self.queues = QueueTable.create(rows, 2)
        self.publisher = Publisher(self.table, queues=self.queues)
        self.metrics = Metrics(self.table, self.publisher, queues=self.queues)
        self.workers = [
            RoutingTable(LoadTable.attach(self.table.fd, column), Target) for column in (0, 1)
        ]

    def publish(self, model, *endpoints, strategy="LeastLoad", gone=False):
        route = Route(
            model,
            "VLLM",
            strategy=strategy,
            endpoints=tuple(Endpoint(name, "127.0.0.1:1") for name in endpoints),
        )
        delta = self.publisher.update(model, None if gone else route)
        for worker in self.workers:
            worker.apply(delta)

    def scrape(self):
        """{(sample name, *sorted label values): value}"""
        body, content_type = self.metrics.render("")
        assert content_type.startswith("text/plain")
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }

    def inference(self):
        return {
            (name.removeprefix("kubeai_inference_requests_"), *labels): value
            for (name, *labels), value in self.scrape().items()
            if name.startswith("kubeai_inference")
            and "iterations" not in name
            and name not in (ENDED, RETRIED)
        }


@pytest.fixture
def replica():
    return Replica()


def test_a_replica_without_models_has_no_model_series(replica):
    assert replica.inference() == {}
    assert ("kubeai_routing_table_version",) in replica.scrape()
    assert ("process_resident_memory_bytes",) in replica.scrape()


def test_waiting_requests_and_their_waits_are_shown_by_class_of_priority(replica):
    replica.publish("m", "a")
    row = replica.publisher.row("m")
    workers = [QueueTable.attach(replica.queues.fd, column) for column in (0, 1)]
    for worker, priority in zip(workers, (0, 5), strict=True):
        worker.enter(row, priority)
        worker.enter(row, priority)
        worker.leave(row, priority, 3.0)
    found = replica.scrape()
    length = "kubeai_queue_requests"
    assert [found[length, name, "m"] for name in ("low", "normal", "high")] == [0, 1, 1]
    wait = "kubeai_queue_wait_seconds"
    buckets = [found[f"{wait}_bucket", bound, "high", "m"] for bound in ("1.0", "10.0", "+Inf")]
    assert buckets == [0, 1, 1]
    assert found[f"{wait}_sum", "high", "m"] == 3.0
    assert (f"{wait}_count", "low", "m") not in found
    replica.publish("m", gone=True)
    assert not [name for name in replica.scrape() if name[0].startswith("kubeai_queue")]


def test_active_and_held_requests_of_all_workers_are_summed(replica):
    replica.publish("m")
    first, second = (worker.find("m").admit() for worker in replica.workers)
    message = replica.workers[1].find("m").admit("message")
    second.hold()
    assert replica.inference() == {
        ("active", "m", "http"): 2,
        ("active", "m", "message"): 1,
        ("held", "m"): 1,
    }
    for admission in (first, second, message):
        admission.close()
    assert set(replica.inference().values()) == {0}


def test_request_outcomes_are_counted_by_model(replica):
    replica.publish("m", "a")
    for worker, outcomes in zip(
        replica.workers, (("2xx", "left"), ("2xx", "retried")), strict=True
    ):
        for outcome in outcomes:
            admission = worker.find("m").admit()
            admission.count(outcome)
            admission.close()
    scraped = replica.scrape()
    assert scraped[ENDED, "2xx", "m"] == 2
    assert scraped[ENDED, "left", "m"] == 1
    assert scraped[ENDED, "broken", "m"] == 0
    assert scraped[RETRIED, "m"] == 1


def test_an_ejected_endpoint_is_shown(replica):
    replica.publish("m", "a", "b")
    model = replica.workers[0].find("m")
    assert model.eject("a", time.monotonic() + 100)
    scraped = replica.scrape()
    assert scraped["kubeai_endpoint_ejected", "a", "m"] == 1
    assert scraped["kubeai_endpoint_ejected", "b", "m"] == 0


def test_hash_lookups_are_counted_by_endpoint(replica):
    replica.publish("m", "a", "b", strategy="PrefixHash")
    model = replica.workers[0].find("m")
    home = model.ring.lookup(7)
    (other,) = {"a", "b"} - {home}
    seven = Prompt(key=7)
    picks = [model.pick(seven), model.pick(seven), model.pick(seven, None, (home,))]
    scraped = replica.scrape()
    prefix = "kubeai_inference_requests_hash_lookup_"
    assert scraped[prefix + "final_total", home] + scraped[prefix + "final_total", other] == 3
    assert scraped[prefix + "initial_total", home] >= 2
    assert (prefix + "default_total", other) in scraped
    assert scraped[prefix + "iterations_count",] == 3
    assert scraped[prefix + "iterations_sum",] == sum(pick.iterations for pick in picks)
    assert scraped[prefix + "iterations_bucket", "+Inf"] == 3
    assert scraped[prefix + "iterations_bucket", "1.0"] == sum(p.iterations == 1 for p in picks)
    assert scraped["kubeai_endpoint_requests_in_flight", home, "m"] == sum(
        pick.name == home for pick in picks
    )
    for pick in picks:
        pick.release()


def test_series_are_removed_with_their_model_and_endpoint(replica):
    replica.publish("m", "a", strategy="PrefixHash")
    replica.publish("n", "b")
    replica.publish("m", "c", strategy="PrefixHash")
    replica.publish("n", gone=True)
    labels = {label for key in replica.inference() for label in key[1:]}
    assert labels == {"m", "http", "message", "c"}


def test_the_routing_table_version_of_each_worker_is_shown(replica):
    replica.publish("m")
    replica.workers[0].apply(replica.publisher.update("m", None))
    scraped = replica.scrape()
    assert scraped["kubeai_routing_table_version",] == 2
    assert scraped["kubeai_worker_routing_table_version", "0"] == 2
    assert scraped["kubeai_worker_routing_table_version", "1"] == 1


def test_exactly_the_existing_metrics_are_documented(replica):
    replica.publish("m", "a", strategy="PrefixHash")
    stream = MessageStream(requests_url="nats://requests", responses_url="nats://responses")
    streams = MessageStreams(Messaging(streams=(stream,)))
    streams.report(Streams((StreamReport(lag=0),)))
    keys = KeyTable.create(1, 1)
    rows = Rows(keys)
    charge(KeyTable.attach(keys.fd, 0), *rows.add("k")).end()
    metrics = Metrics(
        replica.table,
        replica.publisher,
        streams=streams,
        limits=KeyLimits(keys, rows),
        usage=UsageCollector(UsageLedger(), lambda: 0),
        queues=replica.queues,
    )
    body, _ = asyncio.run(metrics.scrape(""))
    families = text_string_to_metric_families(body.decode())
    ours = {each.name + SUFFIX.get(each.type, ""): each for each in families}
    ours = {name: each for name, each in ours.items() if name.startswith("kubeai_")}
    described = dict(documented())
    assert described.keys() == ours.keys()
    for name, family in ours.items():
        kind, labels = described[name]
        assert kind == family.type, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels, name


SUFFIX = {"counter": "_total"}
PAGE = (REPOSITORY / "docs/reference/metrics.md").read_text()


def documented():
    """Each metric of docs/reference/metrics.md: its name, its type and its labels."""
    for section in re.split("^## ", PAGE, flags=re.MULTILINE):
        common = {"stream", "requests_url"} if section.startswith("Messages") else set()
        for row in re.findall(r"^\| `(kubeai_\w+)` \| (\w+) \|([^|]*)\|", section, re.MULTILINE):
            name, kind, labels = row
            yield name, (kind, common | set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", labels))))


def test_every_metric_is_in_a_query_that_prometheus_can_read():
    asked = set()
    described = dict(documented())
    rows = PAGE.split("## Queries")[1]
    queries = re.findall(r"^\| [^|]* \| `(.*?)` \| [^|]*\|$", rows, re.MULTILINE)
    assert len(queries) == rows.count("\n|") - 2
    for query in queries:
        query = query.replace("\\|", "|")
        promql_parser.parse(query)
        for name in re.findall(r"kubeai_\w+", query):
            family = re.sub("_(bucket|sum|count)$", "", name)
            asked.add(name if name in described else family)
        for label in re.findall(r"by \((.*?)\)|[{,](\w+)=", query):
            known = set().union(*(labels for _, labels in described.values()), {"pod", "le"})
            assert set(re.split(", ", "".join(label))) <= known, query
    assert asked == described.keys()


def test_requests_of_keys_are_shown_once_they_were_counted(replica):
    keys = KeyTable.create(4, 1)
    worker, rows = KeyTable.attach(keys.fd, 0), Rows(keys)
    metrics = Metrics(replica.table, replica.publisher, limits=KeyLimits(keys, rows))
    rows.add("unused")
    held = charge(worker, *rows.add("k"), in_flight=1)
    for _ in range(2):
        assert charge(worker, *rows.add("k"), in_flight=1).excess == "in flight"
    text = metrics.render("")[0].decode()
    assert 'kubeai_key_requests_in_flight{key="k"} 1.0' in text
    assert 'kubeai_key_requests_limited_total{key="k"} 2.0' in text
    assert "unused" not in text
    held.end()
    rows.remove("k")
    assert 'key="k"' not in metrics.render("")[0].decode()
    worker.close()
    keys.close()


def test_openmetrics_is_served_on_request(replica):
    replica.publish("m", "a", strategy="PrefixHash")
    body, content_type = replica.metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = {f.name for f in openmetrics.text_string_to_metric_families(body.decode())}
    assert "kubeai_inference_requests_hash_lookup_final" in families


def test_a_thousand_models_are_scraped_in_a_fraction_of_a_second():
    replica = Replica(rows=1 << 14)
    for number in range(1000):
        names = (f"p{number}-{pod}" for pod in range(10))
        route = Route(
            f"m{number}", "VLLM", endpoints=tuple(Endpoint(name, "1:1") for name in names)
        )
        replica.publisher.update(f"m{number}", route)
    start = time.thread_time()
    replica.metrics.render("")
    assert time.thread_time() - start < 2


def test_tokens_that_engines_report_are_counted_for_all_strategies(replica):
    replica.publish("m", "pod")
    assert replica.scrape()["kubeai_reported_prompt_tokens_total", "m"] == 0
    assert ("kubeai_prompt_tokens_total", "m") not in replica.scrape(), "it is not routed by prefix"
