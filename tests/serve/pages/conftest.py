"""A browser, and pages in it, in front of a stand-in for the server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.pages.stage import Stage, performing


@pytest.fixture(scope="package")
def stage() -> Iterator[Stage]:
    """What answers them."""
    with performing() as it:
        yield it


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """One for all, and gone after the last: beside Playwright's event loop no other could start."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium on this machine")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as it:
        browser = it.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def desk(browser: Any) -> Any:
    """A window of usual size."""
    return browser.new_context(reduced_motion="reduce")


@pytest.fixture(scope="package")
def quick_desk(browser: Any) -> Any:
    """Another, where time goes ten times as fast."""
    context = browser.new_context(reduced_motion="reduce")
    context.add_init_script("(later => { setTimeout = (act, after) => later(act, after / 10); })(setTimeout)")
    return context


@pytest.fixture
def chat(desk: Any, stage: Stage) -> Iterator[Any]:
    """The chat page there."""
    from tests.serve.pages.watching import watched_in  # without Playwright, tests that need it are skipped

    yield from watched_in(desk, stage, "/")


@pytest.fixture
def phone(browser: Any, stage: Stage) -> Iterator[Any]:
    """The chat page on a phone."""
    from tests.serve.pages.watching import watched

    size = {"width": 360, "height": 740}
    yield from watched(browser, stage, "/", viewport=size, has_touch=True, is_mobile=True)


@pytest.fixture
def live(quick_desk: Any, stage: Stage) -> Iterator[Any]:
    """The live view."""
    from tests.serve.pages.watching import watched_in

    yield from watched_in(quick_desk, stage, "/status")
