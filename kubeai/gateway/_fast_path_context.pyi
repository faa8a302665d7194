from typing import final

from kubeai._journal import Journal
from kubeai._key_table import KeyTable
from kubeai._keys import Key
from kubeai._rate_limit import RateLimit
from kubeai.api.config.system import GatewayConfig
from kubeai.gateway._metering import Meter
from kubeai.gateway.access_log import Observers
from kubeai.gateway.cors import CorsPolicy
from kubeai.gateway.usage_refusals import UsageRefusals
from kubeai.openai._body_scan import Shape
from kubeai.openai.routes import Kind
from kubeai.routing import table as routing
from kubeai.routing.routes import RequestType

class FastPathContext:
    config: GatewayConfig
    routes: routing.RoutingTable
    models: dict[str, routing.RoutedModel]
    aliases: dict[str, str]  # the names of their Models
    canaried: set[str]  # the names of Models with a canary
    body_max_bytes: int
    observers: Observers | None
    journal: Journal | None  # None: requests are not recorded
    explains: bool
    logs_prompts: bool  # the access log contains the hashes of prompts
    moves: RateLimit  # of the log of requests that move off their first endpoint
    json_routes: dict[bytes, JsonRoute]
    cors: CorsPolicy | None  # None: responses have no CORS headers
    keys: dict[bytes, Key] | None  # by digest; None: requests need no key
    limits: KeyTable | None  # what keys have used of their limits; None: they have none
    meter: Meter | None  # of what keys use; None: requests need no key
    usage_refusals: UsageRefusals | None  # None: no engine has rejected ``stream_options``
    request_type: RequestType

@final
class JsonRoute:
    kind: Kind
    path: bytes  # the engine's
    shape: Shape

    def __init__(self, kind: Kind, path: bytes, shape: Shape) -> None: ...
