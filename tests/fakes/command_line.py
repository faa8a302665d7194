"""The command line in this process, for what a command says before it does anything.

Starting a process takes longer than most of these commands.
"""

from __future__ import annotations

import contextlib
import io
import sys
from unittest import mock

import pytest

from kubeai import cli


def kubeai(*arguments: object) -> tuple[int, str, str]:
    """Run `kubeai` with these arguments: its exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["kubeai", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()
