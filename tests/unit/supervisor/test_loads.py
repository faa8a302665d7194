"""The loads that the operator scales by."""

from unittest import mock

from kubeai._counts import admit
from kubeai._load import LoadTable
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Route
from kubeai.supervisor.loads import AllLoads


def test_requests_over_http_and_by_message_count_alike():
    table = LoadTable.create(8, 2)
    publisher = Publisher(table)
    publisher.update("m", Route("m", "VLLM"))
    row = publisher.row("m")
    worker, messenger = (LoadTable.attach(table.fd, column) for column in (0, 1))
    peers = mock.Mock(active=lambda model: 0, ended=lambda model: 0)
    loads = AllLoads(table, publisher, peers)
    over_http = admit(worker, row, table.generation(row), "http")
    by_message = admit(messenger, row, table.generation(row), "message")
    by_message.hold()
    assert (loads.active("m"), loads.held("m")) == (2, 1)
    by_message.close()
    assert (loads.active("m"), loads.held("m")) == (1, 0)
    over_http.close()
    assert loads.active("m") == 0
