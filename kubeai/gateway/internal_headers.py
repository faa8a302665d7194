"""Headers in which the proxy describes the client of a request to the local routes.

Only the relay connects to the local routes, and the proxy sets these headers on every request there
if keys are required, so they are never the client's. No engine gets them.
"""

from __future__ import annotations

KEY_HEADER = b"x-kubeai-key"  # the name of the client's key; empty: the request needs none
DENIED_HEADER = b"x-kubeai-denied"  # status, space, message for the login page; empty: not denied
