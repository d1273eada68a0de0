"""A Redis that Sentinels watch: every client finds it, and a failover loses and doubles nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import redis
from celery import Celery

from celery_capacity import install
from celery_capacity.platform.embedded import valkey
from celery_capacity.routing.config import redis_urls, timeouts
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.authority import Authority, read_authority
from celery_capacity.routing.inspect import verify
from celery_capacity.routing.ledger import sentinels
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.workers.process import fork_safety
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.installed import debian_redis, old_redis
from tests.fixtures.processes.platforms import FOREIGN, Platform
from tests.fixtures.servers.given import numbered
from tests.fixtures.servers.pair import environment_of
from tests.fixtures.servers.redises import NAME, Watched, watched_redis
from tests.fixtures.waiting import until
from tests.tasks.work import read, starts

ADD = "tests.fixtures.tasks.add"
WORK = "tests.tasks.work.work"


@pytest.fixture(autouse=True)
def _nothing_of_the_persons(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)


#: Program that runs as primary, replica and Sentinel, by its name.
PROGRAMS: Final = {"embedded": valkey.binary, "Debian": debian_redis, "Redis 6.2": old_redis}


@pytest.fixture(
    params=[
        "embedded",
        pytest.param("Debian", marks=pytest.mark.installed),
        pytest.param("Redis 6.2", marks=pytest.mark.installed),
    ]
)
def own_redis(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched_redis(tmp_path_factory.mktemp("watched"), program=PROGRAMS[request.param]()) as watched:
        yield watched


@pytest.fixture
def platform(own_redis: Watched, database_url: str, tmp_path: Path) -> Iterator[Platform]:
    environment = environment_of(own_redis.url(2), database_url, tmp_path)
    environment["PLATFORM_IMPORTS"] = "tests.fixtures.tasks,tests.tasks.work"
    with platform_on(environment, tmp_path) as running:
        yield running


@pytest.fixture
def submitter(platform: Platform) -> Iterator[Submitter]:
    submitter = Submitter(platform)
    yield submitter
    submitter.close()


def test_a_dead_sentinel_is_passed_over_and_a_replica_is_not_written_to(own_redis: Watched) -> None:
    first, second = own_redis.servers
    own_redis.sentinels[0].kill()
    with connect(own_redis.url(7)) as client:
        client.set("key", "value")
        assert first.client.info("keyspace").keys() == {"db7"}
        pool = client.connection_pool
        connection = pool.make_connection()
        # A Sentinel that has not heard of a failover yet would give this address.
        with pytest.raises(redis.ConnectionError, match="not a primary"):
            connection.connect_to(("127.0.0.1", second.port))
        assert connection._sock is None
    # A child of a pool closes connections to every address that the Sentinels have named.
    assert {first.port, second.port} <= sentinels.ports


def test_a_name_that_the_sentinels_do_not_know_is_an_error_that_says_so(own_redis: Watched) -> None:
    url = own_redis.url().replace(f"master_name={NAME}", "master_name=other")
    with connect(url) as client, pytest.raises(redis.ConnectionError, match="'other'"):
        client.ping()


def test_a_child_has_no_connection_of_its_parent(platform: Platform) -> None:
    stores = Stores(lambda _: platform.settings)
    stores.redis.ping()
    ours = set(stores.ledger.descriptors())
    assert len(ours) == 1
    endpoints = {*fork_safety.endpoints_of(platform.settings), *sentinels.ports}
    assert ours <= set(fork_safety.sockets_to(endpoints))
    stores.redis.close()


def test_a_failover_opens_a_new_epoch_and_loses_and_doubles_nothing(
    platform: Platform, submitter: Submitter, own_redis: Watched, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    workers = [platform.worker("a", cpus=2), platform.worker("b", cpus=2, pool="threads")]
    platform.beat()
    before = submitter.send(ADD, 40, 2)
    assert submitter.value(before) == 42
    with platform.engine.connect() as connection:
        epoch = read_authority(connection).epoch
    jobs = [submitter.send(WORK, str(trace), str(number), 1.0) for number in range(12)]
    until(lambda: starts(read(trace)).total() >= 4, "four run and eight wait")
    first, second = own_redis.servers
    first.kill()
    until(lambda: own_redis.primary_port() == second.port, "the Sentinels have made the replica the primary")
    later = [submitter.send(WORK, str(trace), str(number), 0.1) for number in range(12, 16)]
    assert [submitter.ended(job).state for job in [*jobs, *later]] == ["succeeded"] * 16
    assert [submitter.value(job) for job in later] == ["12", "13", "14", "15"]
    # No job that ran meanwhile began a second time.
    assert set(starts(read(trace)).values()) == {1}
    # Results that the replica had received are there.
    assert submitter.value(before) == 42
    with platform.engine.connect() as connection:
        authority = read_authority(connection)
    assert authority.epoch > epoch
    assert Ledger(platform.settings).opened() == (authority.epoch, second.run_id)
    assert all(worker.alive for worker in workers)
    until(lambda: verify.check(platform.engine, platform.redis).holds, "the books are right")


@pytest.mark.parametrize("named_by", ["the URL", "Celery's options"])
def test_celerys_options_may_name_the_redis_instead(
    platform: Platform, own_redis: Watched, named_by: str, tmp_path: Path
) -> None:
    """A Celery project with Sentinels already names its broker and results in this way."""
    url = own_redis.url(2)
    app = Celery("theirs", set_as_current=False)
    if named_by == "Celery's options":
        url = url.partition("?")[0]
        app.conf.broker_transport_options = {redis_urls.MASTER: NAME}
        app.conf.result_backend_transport_options = {redis_urls.MASTER: NAME}
    app.conf.broker_url = app.conf.result_backend = url
    install(app, resolve=lambda _: platform.settings)
    with app.connection_for_write() as connection:
        assert connection.default_channel.client.ping()
    assert app.backend.client.ping()
    app.backend.client.close()
    app.close()


def test_a_number_is_meant_for_the_redis_behind_them(own_redis: Watched) -> None:
    with connect(numbered(own_redis.url(), 9)) as client:
        client.set("key", "value")
    assert own_redis.servers[0].client.info("keyspace").keys() == {"db9"}
    assert Settings(redis_url=own_redis.url(), database_url="postgresql://h/d").broker_url == own_redis.url()


def authority(platform: Platform) -> Authority:
    with platform.engine.connect() as connection:
        return read_authority(connection)


@pytest.mark.long(40)
def test_a_short_failover_changes_not_who_decides_and_a_long_one_does(
    own_redis: Watched, database_url: str, tmp_path: Path
) -> None:
    environment = environment_of(own_redis.url(2), database_url, tmp_path)
    environment |= {"PLATFORM_IMPORTS": "tests.fixtures.tasks,tests.tasks.work", "PLATFORM_CONFIRM_INTERVAL": "4"}
    with platform_on(environment, tmp_path) as platform:
        submitter, trace = Submitter(platform), tmp_path / "trace"
        workers = [platform.worker("a", cpus=2), platform.worker("b", cpus=2, pool="threads")]
        before = authority(platform)
        jobs = [submitter.send(WORK, str(trace), str(n), 0.05, 1000) for n in range(10)]
        primary, replica = own_redis.servers
        primary.kill()
        until(lambda: own_redis.primary_port() == replica.port, "the replica is the primary")
        jobs += [submitter.send(WORK, str(trace), str(n), 0.05, 1000) for n in range(10, 20)]
        assert {submitter.ended(job).state for job in jobs} == {"succeeded"}
        assert authority(platform).changed == before.changed
        # The Sentinels have nobody left to name.
        os.kill(replica.process.pid, signal.SIGSTOP)
        until(lambda: authority(platform).authority == "postgres", "Postgres decides")
        jobs += [submitter.send(WORK, str(trace), str(n), 0.05, 1000) for n in range(20, 40)]
        assert {submitter.ended(job).state for job in jobs} == {"succeeded"}
        os.kill(replica.process.pid, signal.SIGCONT)
        until(lambda: authority(platform).authority == "ledger", "the ledger decides")
        jobs += [submitter.send(WORK, str(trace), str(n), 0.05, 1000) for n in range(40, 50)]
        assert {submitter.ended(job).state for job in jobs} == {"succeeded"}
        assert starts(read(trace)) == {str(n): 1 for n in range(50)}
        assert all(worker.alive for worker in workers)
        submitter.close()


def test_sentinels_are_asked_within_a_part_of_the_store_timeout(platform: Platform, submitter: Submitter) -> None:
    """The ledger, broker and result backend all have this limit: a silent Sentinel would hold a thread for ever."""
    app, part = submitter.app, timeouts.SENTINEL * platform.settings.store_timeout
    with app.connection_for_write() as connection:
        channel = connection.channel()
        asked = [
            channel.sentinel_kwargs,
            app.backend._transport_options["sentinel_kwargs"],
            app.platform.ledger.client.connection_pool.sentinel_manager.sentinel_kwargs,
        ]
    assert [(options["socket_connect_timeout"], options["socket_timeout"]) for options in asked] == [(part, part)] * 3
