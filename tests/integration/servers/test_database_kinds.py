"""Databases with unusual settings: an unusable one is refused with advice, and all others serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from celery_capacity import Unsupported, migrations
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.workers.process.exit_codes import Exit
from celery_capacity.workers.process.stores import make_engine
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers import given
from tests.fixtures.servers.pair import environment_of

ADD = "tests.fixtures.tasks.add"
FAIL = "tests.fixtures.tasks.fail"

_numbers = count()


@contextmanager
def database(pair: Pair, options: str) -> Iterator[str]:
    """Yield the URL of a new database without any table, made with these options."""
    url = make_url(pair.database_url)
    name = f"{url.database}_kind_{next(_numbers)}"
    with given.server_engine(pair.database_url).connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0 {options}"))
        try:
            yield url.set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_database_of_another_encoding_is_refused_with_what_to_do(
    server_pair: Pair, redis_url: str, tmp_path: Path, encoding: str
) -> None:
    with database(server_pair, f"ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'") as url:
        with pytest.raises(Unsupported, match=f"has the encoding {encoding}") as caught:
            migrations.upgrade(url)
        assert "CREATE DATABASE" in str(caught.value)
        with platform_on(environment_of(redis_url, url, tmp_path), tmp_path) as platform:
            done = platform.celery("db", "upgrade")
            assert (done.returncode, "CREATE DATABASE" in done.stderr) == (Exit.CONFIGURATION, True)
            assert "Traceback" not in done.stderr
            worker = platform.worker("a", ready=False)
            assert worker.wait() == Exit.CONFIGURATION
            worker.wait_for(f"has the encoding {encoding}")


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_database_of_another_isolation_serves_as_connections_pin_theirs(
    platform: Platform, submitter: Submitter, level: str
) -> None:
    url = platform.settings.database_url
    assert url is not None
    with platform.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        name = connection.execute(text("SELECT current_database()")).scalar_one()
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'"))
    migrations.upgrade(url)
    for pooled in (True, False):
        engine = make_engine(url, pooled=pooled)
        with engine.connect() as connection:
            assert connection.execute(text("SHOW transaction_isolation")).scalar_one() == "read committed"
        engine.dispose()
    # A proxy may drop the options of a connection. Such a connection is refused.
    unpinned = create_engine(url)
    with pytest.raises(Unsupported, match=f"have the isolation {level}"):
        migrations.check(unpinned)
    unpinned.dispose()
    platform.worker("a", cpus=2)
    job = submitter.send(ADD, 40, 2)
    assert submitter.value(job) == 42
    assert submitter.ended(job).state == "succeeded"


def test_text_of_every_kind_is_stored_in_whatever_client_encoding(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2, PGCLIENTENCODING="LATIN1")
    job = submitter.send(FAIL, "größer ✓ 火")
    row = submitter.ended(job)
    assert (row.state, "größer ✓ 火" in row.error) == ("failed", True)
