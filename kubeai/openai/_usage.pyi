"""The tokens that an engine reports at the end of a response: the last member ``usage``."""

def usage_in(body: bytes) -> tuple[int | None, int | None, int | None] | None:
    """(prompt, cached, output) tokens in the last bytes of a body; None if it reports none.

    For tests only: the gateway calls the compiled function.
    """
