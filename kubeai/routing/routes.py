"""A Model as the data plane sees it, and the messages that distribute it to the workers.

The operator describes each model as a :class:`Route`. Changes are versioned: a worker gets a
:class:`Snapshot` when it starts, then one :class:`Delta` per change.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

RequestType = Literal["http", "message"]
Strategy = Literal["LeastLoad", "PrefixHash", "PrefixCache"]
Feature = Literal["TextGeneration", "TextEmbedding", "Reranking", "SpeechToText"]


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """One replica that can serve requests: a ready pod that is not terminating."""

    name: str  # of the pod
    address: str  # "ip:port"
    adapters: tuple[str, ...] = ()  # loaded adapters
    row: int = -1  # in the load table; assigned by the Publisher
    generation: int = 0


class Block(msgspec.Struct, frozen=True, array_like=True):
    """Why a model, or one of its adapters, has no endpoint.

    Requests are held until ``fails_at_s`` and get 503 from then on. It is a CLOCK_MONOTONIC time,
    which all processes on a machine share: 0 means at once, infinity means that only
    ``holdTimeout`` ends the wait.
    """

    reason: str  # one word, as in the Model's conditions
    message: str
    fails_at_s: float = math.inf
    retry: bool = True  # whether it may resolve without a change to the Model or this machine


class Route(msgspec.Struct, frozen=True, array_like=True):
    """One Model as the data plane sees it."""

    model: str
    engine: str
    features: tuple[Feature, ...] = ()
    labels: dict[str, str] = {}
    owner: str = ""
    created_s: int = 0  # Unix time of the Model's creation
    adapters: tuple[str, ...] = ()  # declared in the Model, loaded or not
    strategy: Strategy = "LeastLoad"
    mean_load_factor: int = 125  # percent
    replication: int = 20  # virtual nodes per endpoint
    prefix_char_length: int = 100  # code points
    endpoints: tuple[Endpoint, ...] = ()
    draining: tuple[str, ...] = ()  # former endpoints that are finishing their in-flight requests
    row: int = -1
    generation: int = 0
    block: Block | None = None  # why the model has no endpoint
    adapter_blocks: dict[str, Block] = {}  # why no endpoint serves an adapter, by adapter
    cache_load_factor: int = 0  # bound of PrefixCache, in percent of the mean load; 0: none
    progress: str = ""  # what a replica that starts does now; empty while one serves, or unknown
    start_s: int = 0  # how long a replica takes from its creation until it is ready; 0: unknown
    # The `model` of forms at FasterWhisper; empty: forms have none. Others get the requested name.
    form_model: str = ""
    # Requests in flight that an endpoint serves well; more wait in the queue. 0: not limited.
    capacity: int = 0
    aliases: tuple[str, ...] = ()  # further names, of this Model only
    fallbacks: tuple[str, ...] = ()  # Models that serve requests that this one cannot, in order
    wait_before_fallback_s: float = 0.0
    canary: str = ""  # the Model that serves a part of the clients; empty: none
    canary_percent: int = 0


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot", array_like=True):
    """All routes, sent when a worker starts."""

    version: int
    routes: tuple[Route, ...]


class Delta(msgspec.Struct, frozen=True, tag="delta", array_like=True):
    """One model's new route, or None if the model was deleted."""

    version: int
    model: str
    route: Route | None
