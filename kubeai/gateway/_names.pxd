"""Declarations of ``_names.pyx``."""

from kubeai.gateway.relay._renaming cimport Renaming
from kubeai.openai._body_scan cimport InferenceRequest


cpdef object find_model(dict models, dict aliases, InferenceRequest request)
cpdef Renaming renaming_of(InferenceRequest request)
cdef bytes engines_json(InferenceRequest request)
