"""Servers that are too old for the platform are refused at once, by name and with advice."""

from __future__ import annotations

import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from celery_capacity import PlatformError, migrations
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.server_checks import OLDEST
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.jobs.submitting import platform_on
from tests.fixtures.processes.platforms import FOREIGN
from tests.fixtures.servers.pair import environment_of

ABOUT = b"# Server\r\nredis_version:6.0.16\r\nrun_id:0123\r\n"


class _Old(socketserver.StreamRequestHandler):
    """Report Redis 6.0 to INFO, and answer OK to all else."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(size + 2)[:-2])
            self.wfile.write(b"$%d\r\n%b\r\n" % (len(ABOUT), ABOUT) if words[0] == b"INFO" else b"+OK\r\n")


@pytest.fixture
def old_redis_url() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Old) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"redis://:s3cret@127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()
        thread.join()


def test_the_ledger_refuses_an_old_redis(old_redis_url: str, database_url: str) -> None:
    ledger = Ledger(Settings(redis_url=old_redis_url, database_url=database_url))
    right = r"Redis at redis://:\*\*\*@.* is version 6\.0\.16, .* needs 6\.2"
    with pytest.raises(PlatformError, match=right) as caught:
        ledger.opened()
    assert caught.value.advice == "Use Redis 6.2 or newer, better 7, or Valkey."
    ledger.client.close()


def test_a_worker_on_an_old_redis_ends_and_says_why(
    old_redis_url: str, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    with platform_on(environment_of(old_redis_url, database_url, tmp_path), tmp_path) as running:
        worker = running.worker("a", pool="solo", ready=False)
        assert worker.wait() == Exit.CONFIGURATION
        assert "is version 6.0.16" in worker.tail()
        assert "Traceback" not in worker.tail()
        assert "s3cret" not in worker.tail()


def test_no_tables_are_made_or_used_in_an_old_postgres(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.connect():
        newest = engine.dialect.server_version_info
    migrations.check(engine)
    assert newest is not None
    assert int(newest[0]) >= OLDEST
    engine.dialect.server_version_info = (12, 22)
    with pytest.raises(PlatformError, match=r"Postgres at .* is version 12\.22, and the platform needs 13") as caught:
        migrations.check(engine)
    assert caught.value.advice == "Use Postgres 13 or newer."
    engine.dispose()
