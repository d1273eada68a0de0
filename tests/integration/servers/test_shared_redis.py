"""Two platforms, with a Postgres database each, on one numbered database of one Redis: the second is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity import Unsupported
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.recovery import rebuild
from celery_capacity.workers.process.exit_codes import Exit
from celery_capacity.workers.process.stores import Stores
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers.pair import empty_database, environment_of

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
REFUSED = "has the ledger of another Postgres database"


@pytest.fixture
def second(platform: Platform, server_pair: Pair, tmp_path: Path) -> Iterator[Platform]:
    """Yield another platform on the same Redis."""
    folder = tmp_path / "second"
    folder.mkdir()
    with empty_database(server_pair) as url:
        environment = environment_of(str(platform.settings.redis_url), url, folder)
        with platform_on(environment, folder) as running:
            with running.engine.begin() as connection:
                # The databases of tests are copies of one database, and share its id.
                connection.execute(text("UPDATE authority SET database_id = 'second'"))
            yield running


def stores_of(platform: Platform) -> Stores:
    return Stores(lambda _: platform.settings)


def _epoch(platform: Platform) -> dict[Any, Any]:
    """Return what the ledger says of its epoch, without the marks that the runner of the duties changes meanwhile."""
    fields: dict[Any, Any] = platform.redis.hgetall(keys.EPOCH)
    return {name: value for name, value in fields.items() if name != b"reserved"}


def test_worker_of_a_second_database_is_refused_and_the_first_goes_on(
    platform: Platform, submitter: Submitter, second: Platform
) -> None:
    first = platform.worker("a", cpus=2)
    job = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    before = _epoch(platform)
    refused = second.worker("b", cpus=2, ready=False)
    assert refused.wait() == Exit.CONFIGURATION
    line = refused.wait_for(REFUSED)
    assert "REDIS_URL" in line and "FLUSHDB" in line
    assert not any("Traceback" in line for line in refused.lines)
    assert _epoch(platform) == before
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(job) == "a"
    assert first.alive


def test_job_of_a_second_database_is_not_given_to_workers_of_the_first(
    platform: Platform, submitter: Submitter, second: Platform
) -> None:
    """Both are in their first epoch, on one run of the server: nothing else tells the books apart."""
    worker = platform.worker("a", cpus=2)
    epoch = int(platform.redis.hget(keys.EPOCH, "epoch") or 0)
    with second.engine.begin() as connection:
        connection.execute(text("UPDATE authority SET epoch = :epoch"), {"epoch": epoch})
    stranger = Submitter(second)
    try:
        job = stranger.send(ADD, 1, 2)
        assert submitter.value(submitter.send(ADD, 1, 1)) == 2
        assert stranger.row(job).state == "accepted"
        assert not any(job in line for line in worker.lines)
        with second.engine.begin() as connection:
            connection.execute(text("DELETE FROM jobs"))
    finally:
        stranger.close()


def test_second_database_does_not_open_books_of_the_first(platform: Platform, second: Platform) -> None:
    first, other = stores_of(platform), stores_of(second)
    rebuild.open_if_cold(first.engine, first.ledger)
    platform.redis.hset(keys.book("a"), "incarnation", "life")
    before = platform.redis.hgetall(keys.EPOCH)
    with pytest.raises(Unsupported, match=REFUSED):
        rebuild.open_if_cold(other.engine, other.ledger)
    # The ledger also refuses calls of a database that looked at it before the first one came.
    for step in ("begin", "remove", "carry"):
        with pytest.raises(Unsupported, match=REFUSED):
            other.ledger.close_epoch(9, first.ledger.run_id, step, [keys.book("a")])
    with pytest.raises(Unsupported, match=REFUSED):
        other.ledger.open_epoch(9)
    assert _epoch(platform) == before
    assert platform.redis.exists(keys.book("a"))
    platform.redis.delete(keys.book("a"))


def test_emptied_redis_is_free_for_a_second_database(platform: Platform, second: Platform, settings: Settings) -> None:
    first, other = stores_of(platform), stores_of(second)
    rebuild.open_if_cold(first.engine, first.ledger)
    platform.redis.flushdb()
    assert rebuild.open_if_cold(other.engine, other.ledger) is not None
    assert platform.redis.hget(keys.EPOCH, "database") == b"second"
    with pytest.raises(Unsupported, match=REFUSED):
        rebuild.open_if_cold(first.engine, first.ledger)
    platform.redis.flushdb()
