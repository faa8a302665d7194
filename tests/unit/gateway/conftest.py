"""Fixtures of the gateway's tests."""

from fakes.world import start as start
