"""Fixtures for all tests, and the order in which tests start."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import settings

# Assertions in these fixtures show their values as in tests. The call must precede the first import of the fixtures.
pytest.register_assert_rewrite("tests.fixtures")

pytest_plugins = [
    "tests.fixtures.processes.packages",
    "tests.fixtures.grouping",
    "tests.fixtures.healing",
    "tests.fixtures.servers.given",
    "tests.fixtures.servers.pair",
    "tests.fixtures.stores.books",
    "tests.fixtures.stores.cluster",
    "tests.fixtures.stores.staged",
    "tests.fixtures.stores.headed",
    "tests.fixtures.stores.authorities",
    "tests.fixtures.processes.platforms",
    "tests.fixtures.servers.proxy",
    "tests.fixtures.stores.invariants",
    "tests.fixtures.jobs.leasing",
    "tests.fixtures.jobs.submitting",
    "tests.fixtures.servers.docker_engine",
    "tests.fixtures.processes.left_over",
    "tests.fixtures.processes.terminals",
]

#: With `default` all property tests together take less than two minutes on two cores; `long` is for a night.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("long", settings.get_profile("default"), max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Shells without job control start background processes with the first two ignored, and `nohup` does so with the third.
# Every process started from here would inherit that, and tests rely on their effect.
for _signal, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_signal) == signal.SIG_IGN:
        signal.signal(_signal, _handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Search for no garbage while tests are collected, and leave out of later searches what stays to the end.

    Thousands of items are made, and all of them stay. Searches among them would only cost time: a third of the
    collection, and a fifth of short tests.
    """
    gc.disable()
    try:
        collected = yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
    return collected


#: Folders whose tests wait for real processes. Tests of the other folders are short, and fill the gaps at the end.
WAITING = ("faults", "features", "integration")
#: Seconds of a long test whose mark names none.
LONG = 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that all processes end together."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> tuple[int, int]:
    mark = item.get_closest_marker("long")
    seconds = 0 if mark is None else mark.args[0] if mark.args else LONG
    folder = item.nodeid.split("/")[1]
    return -seconds, WAITING.index(folder) if folder in WAITING else len(WAITING)
