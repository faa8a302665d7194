from typing import final

@final
class Renaming:
    def __init__(self, old: bytes, new: bytes) -> None: ...

def rename(old: bytes, new: bytes, is_events: bool, is_single: bool, *pieces: bytes) -> bytes: ...
