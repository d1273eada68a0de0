"""Postgres as others run it: a job goes its whole way with a password, and by TLS with the server's name verified."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from celery_capacity import StoreUnavailable, migrations
from celery_capacity.platform.embedded import postgres
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.platforms import FOREIGN
from tests.fixtures.servers.pair import environment_of
from tests.fixtures.servers.tls import make_certificates, tls_before

ADD = "tests.fixtures.tasks.add"
#: Password of all the characters that an address must quote.
PASSWORD = "p/w@:;?#%&+ é"
QUOTED = quote(PASSWORD, safe="")


@pytest.fixture(autouse=True)
def _nothing_of_the_persons(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def own_guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[postgres.Postgres]:
    """Yield a migrated Postgres that lets nobody in without the password."""
    server = postgres.start(tmp_path_factory.mktemp("guarded") / "postgres", durable=False)
    try:
        migrations.upgrade(server.url)
        with create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text(f"ALTER ROLE {postgres.ROLE} PASSWORD '{PASSWORD}'".replace(":", r"\:")))
            (server.folder / "data" / "pg_hba.conf").write_text("local all all scram-sha-256\n")
            connection.execute(text("SELECT pg_reload_conf()"))
        yield server
    finally:
        server.kill()


def job_runs(database_url: str, redis_url: str, folder: Path) -> None:
    with platform_on(environment_of(redis_url, database_url, folder), folder) as running:
        submitter = Submitter(running)
        running.worker("a", cpus=2, pool="threads")
        job = submitter.send(ADD, 40, 2)
        assert submitter.value(job) == 42
        assert submitter.ended(job).state == "succeeded"
        submitter.close()


def test_a_job_runs_with_a_password(own_guarded: postgres.Postgres, redis_url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="no password supplied"):
        migrations.check(own_guarded.url)
    url = own_guarded.url.replace("@", f":{QUOTED}@", 1)
    with pytest.raises(StoreUnavailable, match="password authentication failed") as caught:
        migrations.check(url.replace(QUOTED, f"{QUOTED}x"))
    assert PASSWORD not in str(caught.value)
    assert QUOTED not in str(caught.value)
    job_runs(url, redis_url, tmp_path)


def test_a_job_runs_by_tls_and_only_with_the_server_that_is_meant(
    own_guarded: postgres.Postgres, redis_url: str, tmp_path: Path
) -> None:
    certificates, stranger = make_certificates(tmp_path), make_certificates(tmp_path, "stranger")
    with tls_before(f"{own_guarded.host}/.s.PGSQL.5432", certificates) as port:
        url = make_url(f"postgresql+psycopg2://{postgres.ROLE}:{QUOTED}@127.0.0.1:{port}/{postgres.DATABASE}")

        def verified(authority: Path, host: str = "127.0.0.1") -> str:
            options = {"sslmode": "verify-full", "sslrootcert": str(authority)}
            return url.set(host=host).update_query_dict(options).render_as_string(hide_password=False)

        with pytest.raises(StoreUnavailable, match="certificate verify failed"):
            migrations.check(verified(stranger.authority))
        with pytest.raises(StoreUnavailable, match='does not match host name "localhost"'):
            migrations.check(verified(certificates.authority, "localhost"))
        job_runs(verified(certificates.authority), redis_url, tmp_path)
