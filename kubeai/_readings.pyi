from typing import final

from kubeai._load import LoadTable

@final
class Readings:
    def __init__(self, table: LoadTable) -> None: ...
    def changed(self) -> list[tuple[int, int, int, int]]: ...
