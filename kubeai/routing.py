"""What a worker needs to know to route: one Route a model, versioned, whole or as deltas.

The operator describes each model as a :class:`Route`; the supervisor's :class:`Publisher` gives
rows of the load table to the model and its endpoints and a version to each change; a worker's
:class:`RoutingTable` applies them and answers who serves a request.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Strategy = Literal["LeastLoad", "PrefixHash"]
Feature = Literal["TextGeneration", "TextEmbedding", "Reranking", "SpeechToText"]


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """One replica that can be sent requests: a ready pod that is not terminating."""

    name: str  # the pod's
    address: str  # "ip:port"
    adapters: tuple[str, ...] = ()  # adapters loaded in it
    row: int = -1  # of the load table; given by the Publisher
    generation: int = 0


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
    replication: int = 20  # virtual nodes an endpoint
    prefix_char_length: int = 100  # code points
    endpoints: tuple[Endpoint, ...] = ()
    row: int = -1
    generation: int = 0
