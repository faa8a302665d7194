"""Checks after every test: nothing is in flight and no task is alive."""

import asyncio
import gc
import os
import signal
import sys

import pytest
import pytest_asyncio
from hypothesis import settings
from hypothesis.internal.conjecture import providers

# A shell makes the programs that it starts in the background ignore SIGINT, which Python and every
# program that a test starts would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The first python3 is this Python's own: a shim of pyenv starts a dozen shells before it.
os.environ["PATH"] = f"{sys.base_prefix}/bin:{os.environ.get('PATH', os.defpath)}"

# Machine load decides how long an example takes; benchmarks measure speed. The same examples are
# tried each time, so that a commit passes or fails; `make soak` tries others.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("others", deadline=None)
if "OTHER_EXAMPLES" in os.environ:
    settings.load_profile("others")
else:
    settings.load_profile("same")
    # Hypothesis also tries constants of the modules that are imported by then. Which ones these are
    # depends on the tests that xdist has run in the process before.
    assert callable(providers._get_local_constants)
    providers._get_local_constants = lambda: providers._local_constants  # none


@pytest.fixture(autouse=True)
def nothing_in_flight():
    """Check that a test has closed every Admission and Charge, and released every Reservation."""
    from kubeai import _counts, _limits

    yield
    if (_counts.live(), _limits.live()) != ((0, 0), 0):
        gc.collect()
        assert _counts.live() == (0, 0), "leaked (Admissions, Reservations)"
        assert _limits.live() == 0, "leaked Charges"


def _end_by_timeout(loop, context):
    """Fail a test that hangs on uvloop.

    pytest-timeout raises the failure in its signal handler. uvloop reports that as a fault of
    the interrupted callback and carries on, so such a test would hang forever.
    """
    fault = context.get("exception")
    if isinstance(fault, pytest.fail.Exception):
        for task in asyncio.all_tasks(loop):
            task.cancel(str(fault))
    loop.default_exception_handler(context)


@pytest_asyncio.fixture
async def no_task_alive():
    asyncio.get_running_loop().set_exception_handler(_end_by_timeout)
    before = asyncio.all_tasks()
    yield
    # One turn of the loop, for tasks that their owner has cancelled and awaited.
    await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() - before if not task.done()]
    left = [task for task in left if task is not asyncio.current_task()]
    assert not left, f"tasks are still alive: {left}"


# Folders whose tests wait for child processes. They begin first, then the files of the core, of
# which some do so too. So at the end of a run no process is left alone with a file that takes long.
SLOW_FOLDERS = {"e2e", "hammer", "contract"}


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: (SLOW_FOLDERS.isdisjoint(item.path.parts), item.path.parent.name != "unit")
    )
    for item in items:
        if pytest_asyncio.is_async_test(item):
            item.fixturenames.insert(0, "no_task_alive")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Exempt what collection creates from garbage collection, which some tests run in full.

    With the modules of all tests in memory, each full collection takes 0.1 s or more, and those
    that Python would start meanwhile take a second of each process. Later ones are rarer than by
    default, for the same reason.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(2000, 10, 50)
        gc.enable()


def pytest_asyncio_loop_factories(item):
    """Run a module's tests on each event loop in its ``LOOP_FACTORIES``."""
    return getattr(item.module, "LOOP_FACTORIES", {"asyncio": asyncio.new_event_loop})


def pytest_terminal_summary(terminalreporter):
    """Report how many contract tests passed on each of the two APIs."""
    passed = [
        report.nodeid.partition("/contract/")[2] for report in terminalreporter.getreports("passed")
    ]
    apis = [api for name in passed if (api := _api_of(name))]
    if apis:
        counts = ", ".join(f"{apis.count(api)} on the {api}" for api in dict.fromkeys(sorted(apis)))
        terminalreporter.write_line(f"contract tests that passed: {counts}")


def _api_of(name):
    """The API from a test's parameters; tests without any run in a whole cluster or need no API."""
    parameters = name.partition("[")[2]
    if "real" in parameters or name.startswith(("test_cluster.py", "test_node.py")):
        return "real API"
    return "embedded API" if "embedded" in parameters else ""
