"""Options of Celery that keep a worker alive.

Each fault here ends a worker that has the option as Celery has it, and does no harm to a worker of the platform.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.faults.breaking.servers import Servers, own_servers
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"


@pytest.fixture
def own_pair() -> Iterator[Servers]:
    with own_servers() as private_servers:
        yield private_servers


@pytest.fixture
def platform(own_pair: Servers, tmp_path: Path) -> Iterator[Platform]:
    with standing_platform(own_pair.pair, tmp_path, "tests.tasks.celerys_own") as running:
        yield running


def both(platform: Platform, option: str) -> tuple[Process, Process]:
    """Start a worker of the platform, and a worker with the option as in plain Celery."""
    ours = platform.worker("ours", cpus=1)
    plain = platform.worker("plain", cpus=1, CELERYS_OWN=option)
    return ours, plain


def ended(process: Process) -> bool:
    return not process.alive


def runs(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(ADD, 40, 2)
    assert submitter.ended(job).state == "succeeded"
    assert submitter.row(job).worker == "ours"


def test_an_answer_such_as_readonly_ends_no_worker(platform: Platform, submitter: Submitter) -> None:
    ours, plain = both(platform, "broker_channel_error_retry=false")
    client: redis.Redis = platform.redis
    client.config_set("min-replicas-to-write", "1")
    until(lambda: ended(plain), "the worker with Celery's own option ended")
    assert ours.alive
    client.config_set("min-replicas-to-write", "0")
    runs(platform, submitter)
    assert ours.alive
    platform.processes.remove(plain)


def test_a_broker_that_is_away_for_long_ends_no_worker(
    platform: Platform, own_pair: Servers, submitter: Submitter
) -> None:
    # Celery's own 100 tries last some 46 minutes; one try shows the same effect.
    ours, plain = both(platform, "broker_connection_max_retries=1")
    own_pair.kill_redis()
    until(lambda: ended(plain), "the worker with Celery's own option ended")
    assert ours.alive
    own_pair.start_redis()
    runs(platform, submitter)
    assert ours.alive
    platform.processes.remove(plain)
