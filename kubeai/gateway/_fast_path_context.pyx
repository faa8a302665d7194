# cython: language_level=3
"""What the fast path (``_fast_path.pyx``) uses of the worker's context, as fields in C."""

from kubeai.openai._body_scan cimport Shape


cdef class FastPathContext:
    """The base class of the worker's context; see context.py."""


cdef class JsonRoute:
    """How to handle POST requests with a JSON body for one path."""

    def __init__(self, kind, bytes path not None, Shape shape not None):
        self.kind = kind
        self.path = path
        self.shape = shape
