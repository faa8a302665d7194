"""Fixtures of the attack tests."""

from fakes.world import start as start
