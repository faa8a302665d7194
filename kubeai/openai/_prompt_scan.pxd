"""Declarations of ``_prompt_scan.pyx``."""

from libc.stdint cimport int64_t

from kubeai._pick cimport Picker
from kubeai._prompt cimport Prompt
from kubeai.openai._body_scan cimport InferenceRequest


cdef Prompt prompt_for(Picker picker, InferenceRequest request, bint complete)
