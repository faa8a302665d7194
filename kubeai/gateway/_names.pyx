# cython: language_level=3, nonecheck=True
"""The names of Models: which one a request means, and how its engine and its client call it.

A client may use a Model's name, an alias, and either with an adapter. The engine knows only the
Model's name and the adapters'. So the body of a request by alias is rewritten, and its response
renamed. Called by the fast path, proxy.py, bodies.py, fallback.py and local_routes.py. No I/O.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint64_t

from kubeai.gateway.relay._renaming cimport Renaming
from kubeai.openai._body_scan cimport InferenceRequest
from kubeai.openai._murmur3 cimport murmur3

from msgspec.json import encode

cdef enum:
    BEGINNING_CHARS = 100  # of the first user text, beside all system text


cpdef object find_model(dict models, dict aliases, InferenceRequest request):
    """See the stub."""
    cdef object routed = models.get(request.name)
    cdef object name
    if routed is not None:
        if request.adapter is None or request.adapter in routed.route.adapters:
            return routed
    if not aliases:
        return None
    name = aliases.get(request.model)
    if name is None and request.is_ollama:  # "x" and "x:latest" are one name there
        name = aliases.get(request.model + ":latest")
    if name is not None:
        request.serve_as(name)
        return models.get(name)
    alias, separator, adapter = request.model.rpartition("_")  # no adapter's name has a "_"
    name = aliases.get(alias) if separator else None
    routed = None if name is None else models.get(name)
    if routed is None or adapter not in routed.route.adapters:
        return None
    request.serve_as(name, adapter)
    return routed


cpdef Renaming renaming_of(InferenceRequest request):
    """See the stub."""
    if not request.is_renamed:
        return None
    return Renaming(engines_json(request), request.model_json)


cdef bytes engines_json(InferenceRequest request):
    """The name by which the engine knows the model, as a JSON string."""
    return encode(request.name if request.adapter is None else request.adapter)


def bucket_of(str model not None, bytes who not None):
    """See the stub."""
    cdef bytes text = model.encode() + b"\0" + who
    return murmur3(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text)) % 100


def prompt_id(InferenceRequest request not None):
    """See the stub."""
    if not request.has_prompt or request.first.at is NULL and request.system_field.at is NULL:
        return None
    cdef uint64_t key = request.hash_key(BEGINNING_CHARS)
    return (<object> key).to_bytes(8, "little")
