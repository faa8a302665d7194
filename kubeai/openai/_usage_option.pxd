"""Declarations of ``_usage_option.pyx``."""

from kubeai.openai._body_scan cimport InferenceRequest


cdef bint asks_to_stream(InferenceRequest request) noexcept  # also as some engines alone read it
cdef bytes with_usage(InferenceRequest request, bytes payload)
