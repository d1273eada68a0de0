"""`rediss://` verifies the server's certificate, wherever it stands; Postgres does what its URL says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import Engine, create_engine

from celery_capacity import StoreUnavailable, create_app
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.workers.process.stores import make_engine
from tests.fixtures.processes.platforms import FOREIGN, Platform
from tests.fixtures.servers.pair import environment_of
from tests.fixtures.servers.tls import Certificates, make_certificates, tls_before

ADD = "tests.fixtures.tasks.add"


@dataclass(frozen=True)
class Encrypted:
    """A Redis behind TLS: its URL without any options, and the authority that signed its certificate."""

    url: str
    certificates: Certificates
    stranger: Certificates

    def trusting(self, certificates: Certificates) -> str:
        return f"{self.url}?ssl_ca_certs={certificates.authority}"


@pytest.fixture
def encrypted(redis_url: str, tmp_path: Path) -> Iterator[Encrypted]:
    certificates, stranger = make_certificates(tmp_path), make_certificates(tmp_path, "stranger")
    parts = urlsplit(redis_url)
    assert parts.port is not None
    with tls_before(parts.port, certificates) as port:
        yield Encrypted(f"rediss://127.0.0.1:{port}{parts.path}", certificates, stranger)


@pytest.fixture
def settings_of(encrypted: Encrypted, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    return lambda url: Settings.from_environ(environment_of(url, database_url, tmp_path))


@pytest.fixture
def app_of(settings_of: Any) -> Iterator[Any]:
    apps: list[Celery] = []

    def make(url: str) -> Celery:
        apps.append(create_app("encrypted", resolve=lambda _: settings_of(url)))
        return apps[-1]

    yield make
    for app in apps:
        app.close()
        app.platform.engine.dispose()
        app.platform.redis.close()


def untrusted(encrypted: Encrypted) -> list[str]:
    """Return URLs that must fail: an unknown authority, a different authority, a different name."""
    other_name = encrypted.trusting(encrypted.certificates).replace("127.0.0.1", "localhost")
    return [encrypted.url, encrypted.trusting(encrypted.stranger), other_name]


def test_the_ledger_refuses_an_authority_that_it_does_not_know(encrypted: Encrypted, settings_of: Any) -> None:
    for url in untrusted(encrypted):
        with pytest.raises(StoreUnavailable, match="certificate"):
            Ledger(settings_of(url)).opened()
    assert Ledger(settings_of(encrypted.trusting(encrypted.certificates))).opened() is None


def test_the_broker_refuses_an_authority_that_it_does_not_know(encrypted: Encrypted, app_of: Any) -> None:
    for url in untrusted(encrypted):
        with (
            pytest.raises((OperationalError, redis.ConnectionError), match="certificate"),
            app_of(url).connection_for_write() as connection,
        ):
            connection.default_channel.client.ping()
    with app_of(encrypted.trusting(encrypted.certificates)).connection_for_write() as connection:
        assert connection.default_channel.client.ping()


def test_the_results_refuse_an_authority_that_they_do_not_know(encrypted: Encrypted, app_of: Any) -> None:
    for url in untrusted(encrypted):
        with pytest.raises(redis.ConnectionError, match="certificate"):
            app_of(url).backend.client.ping()
    assert app_of(encrypted.trusting(encrypted.certificates)).backend.client.ping()


def test_a_job_runs_over_tls(
    encrypted: Encrypted, app_of: Any, settings_of: Any, database_url: str, tmp_path: Path, engine: Engine,
    redis_client: redis.Redis,
) -> None:  # fmt: skip
    url = encrypted.trusting(encrypted.certificates)
    environment = environment_of(url, database_url, tmp_path)
    running = Platform(settings_of(url), environment, tmp_path, engine, redis_client)
    try:
        running.worker("a", cpus=1, pool="solo")
        assert app_of(url).send_task(ADD, [1, 2]).get(timeout=60) == 3
    finally:
        running.stop()


@pytest.mark.parametrize("name", ["REDIS_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"])
def test_verification_stands_in_every_url_unless_it_says_otherwise(name: str) -> None:
    environment = {"REDIS_URL": "redis://a/0", "DATABASE_URL": "postgresql://b/c"}
    field = {"REDIS_URL": "redis_url", "CELERY_BROKER_URL": "broker_url"}.get(name, "result_backend")

    def read(url: str) -> str:
        return str(getattr(Settings.from_environ({**environment, name: url}), field))

    assert read("rediss://h/0") == "rediss://h/0?ssl_cert_reqs=required"
    assert read("rediss://h/0?ssl_ca_certs=/ca") == "rediss://h/0?ssl_ca_certs=/ca&ssl_cert_reqs=required"
    assert read("rediss://h/0?ssl_cert_reqs=none") == "rediss://h/0?ssl_cert_reqs=none"
    assert read("redis://h/0") == "redis://h/0"


def test_what_the_url_of_postgres_says_of_tls_reaches_the_driver() -> None:
    url = "postgresql+psycopg2://me@127.0.0.1:1/db?sslmode=verify-full&sslrootcert=/no/such/ca.pem"
    engine = make_engine(url)
    _, options = engine.dialect.create_connect_args(engine.url)
    assert (options["sslmode"], options["sslrootcert"]) == ("verify-full", "/no/such/ca.pem")
    with pytest.raises(Exception, match=r"refused|root certificate"), create_engine(url).connect():
        pass
