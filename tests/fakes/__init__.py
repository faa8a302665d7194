"""Scripted other ends for tests: engines and clients on loopback, a Kubernetes API in memory."""
