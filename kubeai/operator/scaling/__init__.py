"""Decides and sets each Model's number of replicas."""
