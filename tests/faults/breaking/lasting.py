"""Lasting faults of the stores: stalled, frozen, evicting, failing over, on a full disk."""

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
from tests.faults.breaking.faults import WAYS, World
from tests.faults.plan import Fault
from tests.fixtures.servers.pair import ANSWER_WITHIN
from tests.fixtures.waiting import until

#: Kind of fault for which the servers have their own disk.
DISK_IS_FULL: Final = "the disk is full"
#: Bytes written at once to fill the disk.
BLOCK: Final = 1 << 20
#: Part of the used memory that an evicting Redis may keep.
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
    """Stop all processes of Postgres.

    The kernel still acknowledges data that is sent to them, and nobody answers.
    """
    server = postgres.running(world.servers.postgres_folder)
    stopped: list[psutil.Process] = []
    if server is not None:
        main = psutil.Process(server.process.pid)
        # Stop the process that forks the others first, so that none is missed.
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
    """Lock the table of jobs as CREATE INDEX does: reads go on."""
    engine = world.servers.sessions(str(world.platform.engine.url.database))
    with engine.connect().execution_options(isolation_level="READ COMMITTED") as connection, connection.begin():
        connection.execute(text("LOCK TABLE jobs IN SHARE MODE"))
        yield


def _read_only_postgres(world: World, fault: Fault) -> Generator[None, None, None]:
    """Make every new transaction read-only, as after a failover to a standby."""
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
    """Configure Redis as a cache that evicts random keys."""
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
    """Let a replica take over for a while, then fail back the same way.

    Writes that the new primary has not yet received are lost each time.
    """
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
            # Results stored meanwhile were copied too. The last results of either side may be lost.
            world.oracle.results_were_lost()
        finally:
            second.kill()


def _follow(replica: int, primary: int) -> None:
    """Make one server copy the other, and wait until the copy is complete."""
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
    """Fill the disk so that neither server can write.

    Redis, which saves, then refuses writes as it does by default.
    """
    assert world.servers.disk is not None, "a full disk needs a disk of its own"
    ballast = world.servers.disk / "ballast"
    over = threading.Event()

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            while not over.wait(0.02):
                # Take all space that the servers free at once.
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
    # A Postgres that cannot write its log ends. It starts again by itself or not at all.
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
