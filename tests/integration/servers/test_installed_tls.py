"""TLS by the servers themselves: Debian's programs, since the embedded ones are built without it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import NullPool, create_engine, text

from celery_capacity import StoreUnavailable, migrations
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger.connection import connect
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.installed import debian_postgres, debian_redis
from tests.fixtures.processes.platforms import FOREIGN
from tests.fixtures.servers.pair import environment_of
from tests.fixtures.servers.redises import free_port, redis_server
from tests.fixtures.servers.tls import Certificates, make_certificates
from tests.fixtures.waiting import until

pytestmark = pytest.mark.installed

ADD = "tests.fixtures.tasks.add"
#: User that runs Postgres, which refuses to run as root. Debian's package makes this user.
USER = "postgres"


@pytest.fixture(autouse=True)
def _nothing_of_the_persons(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder that Postgres's user can read. The folders of pytest are closed to that user."""
    with tempfile.TemporaryDirectory(prefix="tls-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def certificates(folder: Path) -> Certificates:
    return make_certificates(folder)


def job_runs(environment: Mapping[str, str], folder: Path) -> None:
    with platform_on(environment, folder) as running:
        submitter = Submitter(running)
        running.worker("a", cpus=2)
        job = submitter.send(ADD, 40, 2)
        assert submitter.value(job) == 42
        assert submitter.ended(job).state == "succeeded"
        submitter.close()


def test_a_job_runs_on_a_redis_that_speaks_tls(
    folder: Path, certificates: Certificates, database_url: str, tmp_path: Path
) -> None:
    port = free_port()
    files = ("--tls-cert-file", str(certificates.server), "--tls-key-file", str(certificates.key))
    authority = ("--tls-ca-cert-file", str(certificates.authority), "--tls-auth-clients", "no")
    with redis_server(folder / "r", "--tls-port", str(port), *files, *authority, program=debian_redis()):
        url = f"rediss://127.0.0.1:{port}/3"
        strict = Settings(redis_url=f"{url}?ssl_cert_reqs=required", database_url=database_url)
        with connect(str(strict.redis_url)) as client, pytest.raises(redis.ConnectionError, match="certificate"):
            client.ping()
        job_runs(environment_of(f"{url}?ssl_ca_certs={certificates.authority}", database_url, tmp_path), tmp_path)


@contextmanager
def postgres_with_tls(folder: Path, certificates: Certificates) -> Iterator[int]:
    """Yield the port of a Postgres on 127.0.0.1 that lets in only TLS."""
    programs, data, port = debian_postgres(), folder / "data", free_port()
    data.mkdir(mode=0o700)
    as_user: dict[str, Any] = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
    if as_user:
        for path in (data, certificates.key):
            subprocess.run(["chown", f"{USER}:", str(path)], check=True)
    certificates.key.chmod(0o600)
    making = [str(programs / "initdb"), "-D", str(data), "-U", USER, "--auth=trust", "--no-sync", "--no-locale"]
    subprocess.run(making, check=True, capture_output=True, cwd="/", **as_user)
    (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 trust\n")
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "fsync": "off",
        "ssl": "on",
        "ssl_cert_file": str(certificates.server),
        "ssl_key_file": str(certificates.key),
    }
    arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [programs / "postgres", "-D", data, *arguments], stdout=log, stderr=log, cwd="/", **as_user
        )
    try:
        until(lambda: b"ready to accept" in (folder / "log").read_bytes(), "Postgres is ready")
        yield port
    finally:
        process.terminate()
        process.wait()


def test_a_job_runs_on_a_postgres_that_speaks_tls(
    folder: Path, certificates: Certificates, redis_url: str, tmp_path: Path
) -> None:
    with postgres_with_tls(folder, certificates) as port:

        def url(host: str, authority: Path) -> str:
            verified = f"sslmode=verify-full&sslrootcert={authority}"
            return f"postgresql+psycopg2://{USER}@{host}:{port}/{USER}?{verified}"

        stranger = make_certificates(folder, "stranger")
        for wrong in (url("127.0.0.1", stranger.authority), url("localhost", certificates.authority)):
            with pytest.raises(StoreUnavailable, match=r"certificate verify failed|does not match host name"):
                migrations.check(wrong)
        right = url("127.0.0.1", certificates.authority)
        migrations.upgrade(right)
        with create_engine(right, poolclass=NullPool).connect() as connection:
            assert connection.execute(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")).scalar_one()
        job_runs(environment_of(redis_url, right, tmp_path), tmp_path)
