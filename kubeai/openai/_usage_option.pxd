"""Declarations of ``_usage_option.pyx``."""

from kubeai.openai._body_scan cimport InferenceRequest


cdef bytes with_usage(InferenceRequest request, bytes payload)
