from typing import final

from kubeai._load import LoadTable

@final
class Readings:
    def __init__(self, table: LoadTable) -> None: ...
    def changed(self) -> list[tuple[int, int, int, int]]: ...

PICK_NAMES: tuple[str, ...]

def picks(table: LoadTable, row: int) -> dict[str, int]:
    """What has been counted of a model's tokens and picks, by ``PICK_NAMES``.

    Of picks by PrefixHash and PrefixCache: tokens of all prompts, and of those the ones that the
    picked endpoints were believed to have cached; picks of an endpoint that had the most of the
    prompt (cached), of another one because that cost less (away), and for prompts of which none had
    anything (new). Of all responses: the tokens that engines have reported (``reported_…``).
    """
