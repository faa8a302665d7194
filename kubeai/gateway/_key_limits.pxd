"""Declarations of ``_key_limits.pyx``."""

from libc.stdint cimport int64_t

from kubeai._key_table cimport KeyTable
from kubeai._keys cimport Key
from kubeai._limits cimport Charge
from kubeai._prompt cimport Prompt
from kubeai.openai._body_scan cimport InferenceRequest
from kubeai.openai._usage cimport Usage


cdef int64_t expected(Key key, Prompt prompt, InferenceRequest request) noexcept
cdef Charge charge_for(
    KeyTable table, Key key, Prompt prompt, InferenceRequest request, bint is_stored
)
cdef bytes limit_lines(Key key, Charge charge)
cdef int settle(
    Charge charge, Key key, InferenceRequest request, const Usage *usage, bint is_reported
) except -1
