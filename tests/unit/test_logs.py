"""Log formats and rate limits; a failure to log must not stop the program."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from fakes.terminal import PtyProcess

from kubeai.errors import KubeAIError
from kubeai.logs import console_line, is_console

PROGRAM = """
import structlog
from kubeai.logs import setup_logging
setup_logging()
log = structlog.get_logger("test")
try:
    raise ValueError("oh")
except ValueError:
    log.exception("a request failed")
log.info("and on")
print("still here", flush=True)
"""


def test_a_full_disk_or_a_closed_pipe_does_not_stop_the_program():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=full, timeout=30
        )
    assert done.stdout == b"still here\n"


LOG_ONE = "from kubeai.logs import *; setup_logging(); get_logger().warning('high', a='b c')"


def logged(**env):
    done = subprocess.run(
        [sys.executable, "-c", LOG_ONE], capture_output=True, env=os.environ | env, timeout=30
    )
    assert done.stdout == b""
    return done.stderr.decode()


def test_without_a_terminal_logs_are_json_lines_unless_the_environment_says_console():
    (line,) = logged().splitlines()
    event = json.loads(line)
    assert event.pop("timestamp")
    assert event == {"event": "high", "level": "warning", "a": "b c"}
    assert logged(KUBEAI_LOG_FORMAT="console").endswith('warning high a="b c"\n')


async def test_on_a_terminal_logs_are_lines_for_people_with_colours_unless_no_color_is_set():
    for env, expected in (
        ({}, b"\x1b[33mwarning\x1b[0m \x1b[1mhigh\x1b[0m"),
        ({"NO_COLOR": "1"}, b" warning high a="),
        ({"TERM": "dumb"}, b" warning high a="),
        ({"KUBEAI_LOG_FORMAT": "json"}, b'"event": "high"'),
    ):
        async with PtyProcess(sys.executable, "-c", LOG_ONE, **env) as ran:
            assert await ran.end() == 0
            assert expected in ran.raw


def test_an_unknown_log_format_is_an_error_that_names_the_variable(monkeypatch):
    monkeypatch.setenv("KUBEAI_LOG_FORMAT", "xml")
    with pytest.raises(KubeAIError, match="KUBEAI_LOG_FORMAT: 'xml' is not a log format"):
        is_console()


def test_a_line_for_people_begins_with_the_message_and_escapes_control_characters():
    event = {"event": "stopping", "message": "wait\n\x1b[31m", "drain_max_s": 10.0, "model": "a b"}
    event["reason"] = None  # unknown: left out
    line = console_line(event, colours=False)
    assert line == r'stopping: wait\n\x1b[31m drain_max_s=10 model="a b"'


def test_addresses_to_copy_get_a_line_each_and_so_do_the_lines_of_a_traceback():
    serving = {"event": "serving", "endpoint": "http://a", "kubernetes_api": "https://b"}
    assert [line.split() for line in console_line(serving, colours=False).splitlines()] == [
        ["serving"],
        ["endpoint", "http://a"],
        ["kubernetes", "api", "https://b"],
    ]
    failed = {"event": "e", "level": "error", "exception": "Traceback:\n  line"}
    assert console_line(failed, colours=False) == "error e\n  Traceback:\n    line"
