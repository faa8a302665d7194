"""Help texts of commands, from their docstrings. Used where commands are registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable


def help_of(command: Callable[..., object]) -> str:
    """A command's docstring with one line for each paragraph.

    typer keeps the line breaks of a docstring, which are in the wrong places on most terminals.
    """
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
