"""Scripted other ends for tests with real sockets on loopback."""
