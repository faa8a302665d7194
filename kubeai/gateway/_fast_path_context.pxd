"""Declarations of ``_fast_path_context.pyx``."""

from libc.stdint cimport int64_t

from kubeai._journal cimport Journal
from kubeai._key_table cimport KeyTable
from kubeai._rate_limit cimport RateLimit
from kubeai.gateway._metering cimport Meter
from kubeai.openai._body_scan cimport Shape


cdef class FastPathContext:
    cdef public object config  # GatewayConfig
    cdef public object routes  # RoutingTable
    cdef public dict models  # name -> RoutedModel: the routing table's
    cdef public dict aliases  # alias -> the Model's name: the routing table's
    cdef public set canaried  # the names of Models with a canary: the routing table's
    cdef public int64_t body_max_bytes  # the config's
    cdef public object observers  # None: requests are not observed
    cdef public Journal journal  # None: requests are not recorded
    cdef public bint explains  # clients may ask why an endpoint was picked
    cdef public bint logs_prompts  # the access log contains the hashes of prompts
    cdef public RateLimit moves  # of the log of requests that move off their first endpoint
    cdef public dict json_routes  # request target -> JsonRoute
    cdef public object cors  # CorsPolicy; None: responses have no CORS headers
    cdef public dict keys  # digest -> Key; None: requests need no key
    cdef public KeyTable limits  # what keys have used of their limits; None: they have none
    cdef public Meter meter  # of what keys use; None: requests need no key
    cdef public object usage_refusals  # UsageRefusals; None: no engine has rejected the field
    cdef public str request_type  # "http" or "message": what the process's requests count as


cdef class JsonRoute:
    cdef readonly object kind
    cdef readonly bytes path  # the engine's
    cdef readonly Shape shape
