"""Faults of the stores that last: stalled, frozen, evicting, failing over, on a full disk."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil
import redis
from sqlalchemy import text

from celery_capacity.platform.embedded import postgres, valkey
from tests.faults.breaking import WAYS, World
from tests.faults.plan import Fault
from tests.fixtures.servers import ANSWER_WITHIN
from tests.fixtures.waiting import until

#: The kind for which the servers have a disk of their own.
DISK_IS_FULL: Final = "the disk is full"
#: Bytes written at once to fill it.
BLOCK: Final = 1 << 20
#: Part of the memory in use that an evicting Redis may have.
EVICTS_TO: Final = 0.7


# -- stopped


def _stop_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()


def _continue_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def _stall_postgres(world: World, fault: Fault) -> Generator[None, None, None]:
    """All its processes are stopped: the kernel still acknowledges what is sent to them, and nobody answers."""
    server = postgres.running(world.servers.postgres_folder)
    stopped: list[psutil.Process] = []
    if server is not None:
        main = psutil.Process(server.process.pid)
        # The one that forks others first, so that none is missed.
        _stop_all([main])
        stopped = [main, *main.children(recursive=True)]
        _stop_all(stopped)
    yield
    _continue_all(stopped[::-1])


def _freeze_redis(world: World, fault: Fault) -> Generator[None, None, None]:
    server = valkey.running(world.servers.redis_folder)
    stopped = [] if server is None else [psutil.Process(server.process.pid)]
    _stop_all(stopped)
    yield
    _continue_all(stopped)


# -- Postgres, which answers and takes no writes


def _lock_writes(world: World, fault: Fault) -> Generator[None, None, None]:
    """As CREATE INDEX does: who reads goes on."""
    engine = world.servers.sessions(str(world.platform.engine.url.database))
    with engine.connect().execution_options(isolation_level="READ COMMITTED") as connection, connection.begin():
        connection.execute(text("LOCK TABLE jobs IN SHARE MODE"))
        yield


def _read_only_postgres(world: World, fault: Fault) -> Generator[None, None, None]:
    """Every new transaction reads only, as after a failover to a standby."""
    for word in ("on", "off"):
        engine = world.servers.sessions("postgres")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SET default_transaction_read_only = off"))
            connection.execute(text(f"ALTER SYSTEM SET default_transaction_read_only = {word}"))
            connection.execute(text("SELECT pg_reload_conf()"))
        if word == "on":
            yield


# -- Redis


def _evict(world: World, fault: Fault) -> Generator[None, None, None]:
    """Redis is configured as a cache, and throws away what it likes."""
    with world.servers.admin() as client:
        used = int(client.info("memory")["used_memory"])
        client.config_set("maxmemory-policy", "allkeys-random")
        client.config_set("maxmemory", max(1, int(used * EVICTS_TO)))
        world.oracle.results_were_lost()
        yield
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "noeviction")
        world.oracle.results_were_lost()


def _fail_over(world: World, fault: Fault) -> Generator[None, None, None]:
    """A replica takes over for a while, and what it had not received yet is lost. Then the same the other way round."""
    first = valkey.running(world.servers.redis_folder)
    assert first is not None
    with tempfile.TemporaryDirectory(prefix="celery-capacity-replica-") as folder:
        second = valkey.start(Path(folder), 0, durable=False)
        try:
            _follow(second.port, first.port)
            _promote(second.port)
            world.redis_path.lead_to(("127.0.0.1", second.port))
            yield
            _follow(first.port, second.port)
            _promote(first.port)
            world.redis_path.lead_to(("127.0.0.1", first.port))
            # What results were stored meanwhile came along; the last ones of either side may be lost.
            world.oracle.results_were_lost()
        finally:
            second.kill()


def _follow(replica: int, primary: int) -> None:
    """Have one server copy the other, and wait until it has all."""
    with redis.Redis(port=replica, socket_timeout=ANSWER_WITHIN) as client:
        client.replicaof("127.0.0.1", primary)

        def linked() -> bool:
            about: Any = client.info("replication")
            return about.get("master_link_status") == "up" and not about.get("master_sync_in_progress")

        until(linked, "the replica has a copy")


def _promote(port: int) -> None:
    with redis.Redis(port=port, socket_timeout=ANSWER_WITHIN) as client:
        client.replicaof("NO", "ONE")


# -- the disk


def _fill_disk(world: World, fault: Fault) -> Generator[None, None, None]:
    """Nothing can be written for either server; Redis, which saves, refuses writes then as it does by default."""
    assert world.servers.disk is not None, "a full disk needs a disk of its own"
    ballast = world.servers.disk / "ballast"
    over = threading.Event()

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            while not over.wait(0.02):
                # Whatever the servers give back is taken at once.
                with suppress(OSError):
                    while not over.is_set():
                        file.write(b"\0" * BLOCK)
                with suppress(OSError):
                    file.write(b"\0" * 4096)

    filling = threading.Thread(target=fill, name="ballast", daemon=True)
    filling.start()
    with suppress(redis.RedisError), world.servers.admin() as client:
        client.config_set("save", "1 1")
    yield
    over.set()
    filling.join()
    ballast.unlink(missing_ok=True)
    # A Postgres that cannot write its log ends, and starts again by itself or not at all.
    if postgres.running(world.servers.postgres_folder) is None:
        world.servers.start_postgres()
    world.platform.engine.dispose()
    with suppress(redis.RedisError), world.servers.admin() as client:
        client.config_set("save", "")
    world.servers.forget_dump()


WAYS.update(
    {
        "lock the table of jobs for who writes": _lock_writes,
        "Postgres is read-only": _read_only_postgres,
        "Postgres is stalled": _stall_postgres,
        "Redis is frozen for longer than each lease": _freeze_redis,
        "Redis evicts": _evict,
        "Redis fails over": _fail_over,
        DISK_IS_FULL: _fill_disk,
    }
)
