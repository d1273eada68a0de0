"""Fixtures of the fault tests: servers that may be ended, a platform on them, and the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.breaking import faults as breaking
from tests.faults.breaking import lasting, processes  # noqa: F401  they add ways to break things
from tests.faults.breaking.faults import World
from tests.faults.breaking.servers import Servers, own_servers
from tests.faults.judging.watching import Oracle, keep_commits
from tests.fixtures.healing import note
from tests.fixtures.jobs.submitting import standing_platform
from tests.fixtures.processes.platforms import Platform


@pytest.fixture(scope="session")
def own_pair() -> Iterator[Servers]:
    with own_servers() as servers:
        yield servers


@pytest.fixture
def servers(own_pair: Servers) -> Iterator[Servers]:
    """Yield servers of which both run, and bring both back for the next test."""
    own_pair.whole()
    yield own_pair
    own_pair.whole()


@pytest.fixture
def platform(request: pytest.FixtureRequest, servers: Servers, tmp_path: Path) -> Iterator[Platform]:
    """Yield the platform of the world if the test uses one, else a platform that is reached without proxies."""
    if "world" in request.fixturenames:
        yield request.getfixturevalue("world").platform
        return
    with standing_platform(servers.pair, tmp_path, *breaking.IMPORTS) as running:
        keep_commits(running)
        yield running


@pytest.fixture
def world(servers: Servers, tmp_path: Path) -> Iterator[World]:
    with breaking.world(servers, tmp_path) as made:
        yield made


@pytest.fixture
def oracle(request: pytest.FixtureRequest, platform: Platform, tmp_path: Path) -> Iterator[Oracle]:
    """Yield an oracle whose healing times are shown at the end of the run."""
    if "world" in request.fixturenames:
        watching: Oracle = request.getfixturevalue("world").oracle
    else:
        watching = Oracle(platform, tmp_path / "trace")
    yield watching
    note(request.node, [str(healing) for healing in watching.healings])
