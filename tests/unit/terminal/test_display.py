"""Log lines above, a table below: what a person sees on the terminal."""

import json
import os
import re

import pytest
from fakes.terminal import Terminal

from kubeai.terminal.display import Display
from kubeai.terminal.models import Shown

READY = {"name": "chat", "state": "Ready", "replicas": {"ready": 1, "desired": 1}}
FAILED = {"name": "bad", "state": "Failed", "message": "no such engine"}


class Screen:
    """A display and the terminal that it draws on."""

    def __init__(self, columns=60, rows=20):
        self.terminal = Terminal(columns)
        self.size = os.terminal_size((columns, rows))
        self._read, self._write = os.pipe()
        self.display = Display(self._write, lambda _: self.size)

    def show(self, *models, count=None):
        self.display.show(Shown(list(models), count or len(models)))

    def seen(self):
        os.set_blocking(self._read, False)
        try:
            while piece := os.read(self._read, 1 << 16):
                self.terminal.feed(piece.decode())
        except BlockingIOError:
            pass
        return self.terminal.seen().splitlines()

    def resize(self, columns, rows=20):
        self.seen()
        self.size = os.terminal_size((columns, rows))
        self.terminal.resize(columns)
        self.display.check_size()

    def close(self):
        os.close(self._read)
        os.close(self._write)


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = Screen()
    yield shown
    shown.close()


def test_lines_are_printed_above_the_table(shown):
    shown.show(READY)
    shown.display.print([b"one"])
    shown.display.print([b"two", b"three"])
    *above, head, row = shown.seen()
    assert above == ["one", "two", "three"]
    assert head.split() == ["MODEL", "STATE", "READY", "WHY"]
    assert row.split() == ["chat", "Ready", "1/1"]
    assert not shown.terminal.cursor_shown


def test_the_table_is_replaced_and_in_the_end_removed(shown):
    shown.show(READY, FAILED)
    shown.show(FAILED)
    _, row = shown.seen()
    assert row.split() == ["bad", "Failed", "no", "such", "engine"]
    shown.display.print([b"bye"])
    shown.display.show(None)
    assert shown.seen() == ["bye"]
    assert shown.terminal.cursor_shown


@pytest.mark.parametrize("columns", [30, 45, 200])
def test_after_a_resize_nothing_is_left_of_the_table_at_its_former_width(shown, columns):
    long = READY | {"state": "Starting", "message": "pulling the image " * 10}
    shown.show(long, FAILED)
    shown.display.print([b"one"])
    shown.resize(columns)
    shown.display.print([b"two"])
    seen = shown.seen()
    assert seen[:2] == ["one", "two"]
    assert len(seen) == 5
    assert seen[3].split()[0] == "chat"
    assert all(len(line) < columns for line in seen)


def test_a_table_of_many_models_takes_half_of_the_screen_and_counts_the_rest(shown):
    models = [READY | {"name": f"m-{n}"} for n in range(50)]
    shown.show(*models, FAILED | {"name": "z"}, count=60)
    seen = shown.seen()
    assert len(seen) == 10
    assert any(line.startswith("z ") for line in seen), "a Model with a problem is shown"
    assert seen[-1] == "… and 52 more"


def test_events_are_rendered_and_other_text_is_shown_as_it_is(shown):
    event = {"event": "pod ready", "level": "warning", "pod": "a\x1b[2J", "message": "at last"}
    access = {"request_id": "1", "method": "GET", "path": "/x", "status": 200, "end": "whole"}
    lines = [json.dumps(event).encode(), b"Traceback\tx", b"\xff{", json.dumps(access).encode()]
    shown.display.print(lines)
    assert shown.seen() == [
        r"warning pod ready: at last pod=a\x1b[2J",
        "Traceback    x",
        "\ufffd{",
        "GET /x 200 0.000 s model=- end=whole",
    ]


def test_no_color_leaves_out_all_styles(shown, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    display = Display(shown._write, lambda _: shown.size)
    display.show(Shown([READY], 1))
    display.print([json.dumps({"event": "e", "level": "error"}).encode()])
    assert b"m" not in re.findall(rb"\x1b\[[?0-9;]*([A-Za-z])", os.read(shown._read, 1 << 16))
