"""Routes, and routing tables of workers whose connections are fakes."""

import math

from kubeai._load import LoadTable
from kubeai._prompt import Prompt
from kubeai.routing.routes import Endpoint, Route
from kubeai.routing.table import RoutingTable


class Upstream:
    """Stands in for a connection pool to one address."""

    def __init__(self, endpoint):
        self.address = endpoint.address
        self.closed = False

    is_waited_on = False  # no requests are sent here

    def close(self):
        assert not self.closed, "closed twice"
        self.closed = True

    def move_waiting(self, sent_before_s=math.inf):
        pass


class Worker:
    """One column of the table, and the routing table of its process."""

    def __init__(self, table, column=0):
        self.upstreams = []
        self.table = LoadTable.attach(table.fd, column)
        self.routing = RoutingTable(self.table, self._target)

    def _target(self, routed, endpoint):
        upstream = Upstream(endpoint)
        self.upstreams.append(upstream)
        return upstream

    def open_upstreams(self):
        return sorted(u.address for u in self.upstreams if not u.closed)

    def view(self):
        return {model.route.model: model.route for model in self.routing}


def route(*endpoints, model="m", **values):
    return Route(model, "VLLM", endpoints=tuple(endpoints), **values)


def endpoint(name, *adapters, address=None):
    return Endpoint(name, address or f"{name}:8000", adapters)


def hashed(key):
    return Prompt(key=key)
