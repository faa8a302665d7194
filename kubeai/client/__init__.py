"""Clients of a gateway for the terminal: ``kubeai chat`` and ``kubeai top``."""
