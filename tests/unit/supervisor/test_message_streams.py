"""What the supervisor makes of the messenger's reports."""

import pytest
from prometheus_client import CollectorRegistry

from kubeai.api.config.system import parse_config
from kubeai.errors import ConfigError, KubeAIError
from kubeai.routing.channel import Side, StreamReport, Streams
from kubeai.supervisor.checks import PROCESSES_MAX, check_settings, check_streams
from kubeai.supervisor.message_streams import MessageStreams
from kubeai.supervisor.supervisor import Supervisor

UP, DOWN = Side(True, 1), Side(False, 1, "connection refused")
CONFIG = """
messaging:
  streams:
  - {requestsURL: "nats://me:secret@jobs?queue=q", responsesURL: "nats://results"}
  - {requestsURL: "nats://other", responsesURL: "nats://results"}
"""


@pytest.fixture
def streams():
    return MessageStreams(parse_config(CONFIG).messaging)


def scrape(streams):
    registry = CollectorRegistry()
    registry.register(streams)
    return {
        (sample.name, *(v for k, v in sample.labels.items() if k != "requests_url")): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def report(**first):
    return Streams((StreamReport(requests=UP, responses=UP, **first), StreamReport(UP, UP)))


def test_a_report_is_shown_as_metrics(streams):
    streams.report(
        report(received=5, redelivered=1, answered={"2xx": 3, "4xx": 1}, in_hand=2, held=1, lag=9)
    )
    samples = scrape(streams)
    assert samples["kubeai_messages_received_total", "0"] == 5
    assert samples["kubeai_messages_received_total", "1"] == 0
    assert samples["kubeai_messages_redelivered_total", "0"] == 1
    assert samples["kubeai_messages_answered_total", "0", "2xx"] == 3
    assert samples["kubeai_messages_answered_total", "0", "5xx"] == 0
    assert samples["kubeai_messages_in_hand", "0"] == 2
    assert samples["kubeai_messages_held", "0"] == 1
    assert samples["kubeai_messages_lag", "0"] == 9
    assert ("kubeai_messages_lag", "1") not in samples, "unknown"
    assert samples["kubeai_message_stream_connected", "0", "requests"] == 1


def test_counts_outlive_the_messenger_and_gauges_do_not(streams):
    streams.report(report(received=5, answered={"2xx": 3}, in_hand=2, held=1))
    streams.ended()
    samples = scrape(streams)
    assert samples["kubeai_messages_received_total", "0"] == 5
    assert samples["kubeai_messages_in_hand", "0"] == 0
    assert samples["kubeai_message_stream_connected", "0", "requests"] == 0
    streams.report(report(received=2, answered={"2xx": 1}))
    samples = scrape(streams)
    assert samples["kubeai_messages_received_total", "0"] == 7
    assert samples["kubeai_messages_answered_total", "0", "2xx"] == 4
    assert samples["kubeai_message_stream_connections_total", "0", "requests"] == 2


def test_problems_name_the_side_and_no_credentials(streams):
    assert len(streams.problems) == 4, "nothing is known yet"
    streams.report(Streams((StreamReport(UP, DOWN), StreamReport(UP, UP))))
    assert streams.problems == ["nats://jobs?queue=q: responses: connection refused"]
    streams.report(report())
    assert streams.problems == []
    assert "secret" not in repr(list(streams.collect()))


def test_streams_are_refused_behind_another_gateway():
    config = parse_config(CONFIG + "proxy: {mode: external}\n")
    with pytest.raises(ConfigError, match=r"messaging\.streams") as caught:
        check_streams(config)
    assert caught.value.path == "proxy.mode"


def test_a_bad_url_is_a_config_error_that_names_it():
    config = parse_config(CONFIG.replace("nats://me", "mqtt://me"))
    with pytest.raises(ConfigError, match="does not begin with one of") as caught:
        check_streams(config)
    assert caught.value.path == "messaging.streams[0].requestsURL"
    assert "secret" not in str(caught.value)


def test_what_is_no_url_is_a_config_error_without_its_text():
    config = parse_config(CONFIG.replace("nats://me:secret@jobs?queue=q", "nats://me:secret@[jobs"))
    with pytest.raises(ConfigError, match="is not a valid URL") as caught:
        check_streams(config)
    assert caught.value.path == "messaging.streams[0].requestsURL"
    assert "secret" not in str(caught.value)


def test_more_streams_than_fit_into_the_messengers_settings_are_a_config_error():
    stream = f'  - {{requestsURL: "nats://{"j" * 200}", responsesURL: "nats://{"r" * 200}"}}\n'
    config = parse_config("messaging:\n  streams:\n" + stream * 300)
    with pytest.raises(ConfigError, match="KiB") as caught:
        check_settings(config)
    assert caught.value.path == "messaging.streams"
    check_settings(parse_config("messaging:\n  streams:\n" + stream * 200))


def test_the_messenger_counts_for_the_limit_on_workers():
    config = parse_config(CONFIG)
    with pytest.raises(KubeAIError, match=f"between 1 and {PROCESSES_MAX - 1}"):
        Supervisor(None, config, namespace="n", identity="i", workers=PROCESSES_MAX)
