from typing import final

@final
class UsageFilter:
    def __init__(self, keeps_null: bool) -> None: ...

def without_usage(keeps_null: bool, *pieces: bytes) -> list[bytes]: ...
