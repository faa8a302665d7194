"""The shim: a small process between the kubelet and a container's main process.

Its modules import nothing of kubeai but each other, because the shim's start is part of a model's
cold start. process.py compiles them once and passes the code to every shim.
"""
