"""The console in a real browser. `.ci/run` installs Chromium and runs these tests."""

import importlib.util

import pytest_asyncio

# Without the extra `browser`, there is nothing to collect.
collect_ignore_glob = [] if importlib.util.find_spec("playwright") else ["*.py"]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser():
    from browsers import running_browser
    from playwright.async_api import expect

    expect.set_options(timeout=15_000)  # the default is 5 s; a machine may be busy
    async with running_browser() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def console():
    """A scripted back end with one Model."""
    from fakes.scripted_console import scripted_console

    async with scripted_console() as console:
        console.put("chat")
        yield console


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser, console):
    """The console in a fresh profile; the test fails if the page logged an error."""
    from browsers import open_page

    async with open_page(browser, f"{console.url}/ui/") as page:
        yield page
