"""Pods on this machine: from the manifest to containers, probes and a status."""
