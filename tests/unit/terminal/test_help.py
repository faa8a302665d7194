"""The help of all commands, which has to fit terminals of every width."""

import typer

from kubeai.cli import _app
from kubeai.terminal.help import help_of


def commands(group):
    for command in group.commands.values():
        yield from commands(command) if hasattr(command, "commands") else [command]


def test_each_paragraph_of_a_docstring_is_one_line():
    def command():
        """Do it.

        For a long
        while.
        """

    assert help_of(command) == "Do it.\n\nFor a long while."


def test_no_command_has_line_breaks_within_a_paragraph():
    texts = {command.name: command.help for command in commands(typer.main.get_command(_app()))}
    assert {"local", "chat", "top", "doctor", "sweep", "demo"} <= texts.keys()
    assert [name for name, text in texts.items() if "\n" in text.replace("\n\n", "")] == []
