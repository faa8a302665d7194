"""Which comment in a values.yaml describes a value."""

from __future__ import annotations

import pytest

from release import values


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("# What it is.\nx: 1\n", "What it is."),
        ("x: 1  # What it is.\n", "What it is."),
        ("# mode: one of two,\n# see below.\nx: 1\n", "mode: one of two, see below."),
        ("# == Title ------\n# What it is.\nx: 1\n", "What it is."),
        ("# == Title ------\nx: 1  # What it is.\n", "What it is."),
        ("# What it is.\n# - an: example\n#     of: it\nx: 1\n", "What it is."),
        ("a:\n  # Of another.\nx: 1\n", ""),
        ("# Of another.\n\nx: 1\n", ""),
        ("x: a#b\n", ""),
    ],
)
def test_a_value_is_described_above_or_beside_it(text, what):
    lines = text.splitlines()
    assert values.comment(lines, len(lines) - 1) == what


def test_the_last_heading_above_a_value_is_its_section():
    lines = ["# == One ----", "# == Two ----", "# What it is.", "x: 1"]
    assert values.heading(lines, 3) == "Two"
    assert values.heading(["x: 1"], 0) is None
