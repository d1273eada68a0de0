"""Workers, submitters and commands reach Postgres through PgBouncer in transaction mode.

The runner alone has a direct connection, which listens.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.workers.runner.commit_listener import NAME
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.installed import debian_pgbouncer
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers.pair import empty_database, empty_redis, environment_of
from tests.fixtures.waiting import until

pytestmark = pytest.mark.installed

ADD = "tests.fixtures.tasks.add"
#: Connections of the pooler to the server, for all its clients.
POOL = 3


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def owner_of(server: Any, folder: Path) -> int | None:
    """Return the owner of the embedded Postgres, who may use its socket, or None if this process is not root.

    PgBouncer does not run as root. The folder becomes that user's.
    """
    if os.geteuid():
        return None
    owner = Path(str(server.query.get("host"))).stat().st_uid
    os.chown(folder, owner, -1)
    for parent in folder.parents:
        if parent.owner() == "root" and str(parent) not in ("/", "/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    return owner


@pytest.fixture
def direct_url(own_embedded: Pair) -> Iterator[str]:
    with empty_database(own_embedded) as url:
        yield url


@pytest.fixture
def pooled_url(direct_url: str, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of the same database through a pooler in transaction mode."""
    server, port, folder = make_url(direct_url), free_port(), tmp_path / "pgbouncer"
    folder.mkdir()
    to = {"dbname": server.database, "user": server.username, "port": server.port}
    host = server.host or server.query.get("host") or "127.0.0.1"
    line = " ".join(f"{name}={value}" for name, value in {"host": host, **to}.items() if value)
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": POOL,
        "ignore_startup_parameters": "options,extra_float_digits",
    }
    written = "\n".join(["[databases]", f"{server.database} = {line}", "[pgbouncer]"])
    config = folder / "pgbouncer.ini"
    config.write_text("\n".join([written, *(f"{name} = {value}" for name, value in settings.items())]) + "\n")
    process = subprocess.Popen([debian_pgbouncer(), "-q", config], user=owner_of(server, folder), cwd="/")
    url = server.set(host="127.0.0.1", port=port, query={})
    engine = create_engine(url)

    def answers() -> bool:
        assert process.poll() is None, "PgBouncer has ended"
        try:
            with engine.connect() as connection:
                return bool(connection.execute(text("SELECT 1")).scalar())
        except DBAPIError:
            return False

    until(answers, "PgBouncer answers")
    yield url.render_as_string(hide_password=False)
    engine.dispose()
    process.send_signal(signal.SIGTERM)
    process.wait(60)


@pytest.fixture
def platform(own_embedded: Pair, direct_url: str, pooled_url: str, tmp_path: Path) -> Iterator[Platform]:
    with empty_redis(own_embedded) as redis_url:
        environment = environment_of(redis_url, pooled_url, tmp_path)
        environment["PLATFORM_DIRECT_DATABASE_URL"] = direct_url
        with platform_on(environment, tmp_path) as running:
            yield running


def sessions(direct_url: str) -> list[Any]:
    engine = create_engine(direct_url)
    here = "datname = current_database() AND pid <> pg_backend_pid()"
    query = f"SELECT application_name FROM pg_stat_activity WHERE {here}"
    with engine.connect() as connection:
        values = list(connection.execute(text(query)).scalars())
    engine.dispose()
    return values


def test_work_goes_through_a_pooler_in_transaction_mode(
    platform: Platform, submitter: Submitter, direct_url: str, pooled_url: str
) -> None:
    for name in ("a", "b", "c"):
        platform.worker(name, cpus=2, pool="threads")
    until(lambda: NAME in sessions(direct_url), "the runner listens")
    jobs = [submitter.send(ADD, number, 1) for number in range(60)]
    later = [submitter.send(ADD, number, 1, countdown=0.3) for number in range(5)]
    assert [submitter.value(job) for job in [*jobs, *later]] == [*range(1, 61), *range(1, 6)]
    assert {submitter.ended(job).state for job in [*jobs, *later]} == {"succeeded"}
    # The submitter's own transaction commits a job, and the runner hears of it on its direct connection.
    engine = create_engine(pooled_url)
    with Session(engine) as session:
        sent = submitter.app.signature(ADD, (20, 1)).apply_async(session=session)
        session.commit()
    engine.dispose()
    assert submitter.value(sent.id) == 21
    names = sessions(direct_url)
    assert names.count(NAME) == 1
    assert len(names) <= POOL + 1, names
    # The ledger is lost, opened anew, and compared with Postgres.
    platform.redis.flushdb()
    again = [submitter.send(ADD, number, 2) for number in range(20)]
    assert [submitter.ended(job).state for job in again] == ["succeeded"] * 20
    assert platform.celery("reconcile").returncode == 0
    assert platform.celery("verify").returncode == 0
