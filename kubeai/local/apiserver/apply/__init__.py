"""Writes to one object, as values: patches, server-side apply and ``managedFields``."""
