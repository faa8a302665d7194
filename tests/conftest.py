"""What every test ends with: nothing in flight, no task alive."""

import asyncio
import gc

import pytest
import pytest_asyncio
from hypothesis import settings

# How long an example takes says how busy the machine is. Benchmarks measure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def nothing_in_flight():
    """Every Admission and Reservation that a test made is closed or gone when it ends."""
    from kubeai import _load

    yield
    if _load.live() != (0, 0):
        gc.collect()
        assert _load.live() == (0, 0), "(Admissions, Reservations) are left"


def _end_by_timeout(loop, context):
    """Fail a test that hangs on uvloop.

    uvloop takes the failure that pytest-timeout raises in its signal's handler for a fault of a
    callback's, and goes on: such a test hung for ever.
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
    # One turn, for tasks whose cancellation has been asked for and awaited by their owner.
    await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() - before if not task.done()]
    left = [task for task in left if task is not asyncio.current_task()]
    assert not left, f"tasks are left: {left}"


def pytest_collection_modifyitems(items):
    for item in items:
        if pytest_asyncio.is_async_test(item):
            item.fixturenames.insert(0, "no_task_alive")


def pytest_asyncio_loop_factories(item):
    """The event loops that a module's tests run on, each in turn: its ``LOOP_FACTORIES``."""
    return getattr(item.module, "LOOP_FACTORIES", {"asyncio": asyncio.new_event_loop})


def pytest_terminal_summary(terminalreporter):
    """How many of the contract tests passed on each of the two APIs."""
    passed = [
        report.nodeid.partition("/contract/")[2] for report in terminalreporter.getreports("passed")
    ]
    apis = [api for name in passed if (api := _api_of(name))]
    if apis:
        counts = ", ".join(f"{apis.count(api)} on the {api}" for api in dict.fromkeys(sorted(apis)))
        terminalreporter.write_line(f"contract tests that passed: {counts}")


def _api_of(name):
    """By a test's parameters; those without any run in a whole cluster, or need no API."""
    parameters = name.partition("[")[2]
    if "real" in parameters or name.startswith(("test_cluster.py", "test_node.py")):
        return "real API"
    return "embedded API" if "embedded" in parameters else ""
