"""Message brokers: receiving requests from them, and publishing responses.

``base.py`` states what every broker must do, ``urls.py`` opens the broker that a URL names, and
each of the other modules implements one broker with a library of its own, which is an extra of
the package. Used by the messenger and by ``kubeai bench``.
"""
