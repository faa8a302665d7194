"""NATS: core NATS, and JetStream.

``broker.py`` is the client, ``connection.py`` the connection of both kinds, ``core.py`` and
``jetstream.py`` are the two kinds, and ``gob.py`` reads an encoding of the Go CDK.
"""
