"""Loads Models' files into caches, and evicts them."""
