"""Fakes for tests: scripted engines and clients on loopback, a Kubernetes API in memory."""
