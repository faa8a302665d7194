"""Readings of the key table by the supervisor, for the peers."""

from typing import final

from kubeai._key_table import KeyTable

@final
class KeyReadings:
    """Which rows have changed since the last ``changed``. Used by the supervisor."""

    def __init__(self, table: KeyTable) -> None: ...
    def changed(self) -> list[int]:
        """Rows in which a worker has counted, or of which something has left the last minute."""
