"""A pair of servers that a test may end, fill, empty and start again at their old addresses."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil
import redis
from sqlalchemy import Engine, NullPool, create_engine, make_url, text

from celery_capacity.platform.embedded import postgres, servers, valkey
from celery_capacity.routing.config.embedded import Pair

#: First port of the range from which systems give ports to connecting clients. Even the port of a server that is down
#: may be given to a client that connects to it.
OUTGOING: Final = 32768
#: Connections that the pair's Postgres takes, including those for its superuser.
CONNECTIONS: Final = 200

#: Bytes of a small disk. A database with its log, and a run of ten minutes, fit into it.
DISK: Final = 1 << 30

_pairs = itertools.count()


@dataclass(frozen=True)
class Servers:
    """The pair that tests may end.

    `pair`: its addresses, which stay. `disk`: a small disk with its data.
    """

    pair: Pair
    disk: Path | None = None

    # -- Redis

    @property
    def redis_folder(self) -> Path:
        return Path(str(self.pair.data)) / "redis"

    def kill_redis(self) -> None:
        """Kill Redis as by `kill -9`.

        Its data are gone, except for a dump that was written before.
        """
        server = valkey.running(self.redis_folder)
        assert server is not None and server.kill()

    def redis_is_away(self) -> bool:
        return valkey.running(self.redis_folder) is None

    def start_redis(self) -> None:
        """Start Redis at its old address: empty, or with the data of the last dump."""
        server = valkey.start(self.redis_folder, urlsplit(self.pair.redis_url).port, durable=False)
        assert server.url == self.pair.redis_url, f"{server.url} is not where it was, {self.pair.redis_url}"

    def forget_dump(self) -> None:
        (self.redis_folder / "dump.rdb").unlink(missing_ok=True)

    def admin(self) -> redis.Redis:
        """Return a client for commands that concern the whole server."""
        return redis.Redis.from_url(self.pair.redis_url, socket_timeout=30)

    # -- Postgres

    @property
    def postgres_folder(self) -> Path:
        return Path(str(self.pair.data)) / "postgres"

    def kill_postgres(self) -> None:
        """Send KILL to the parent of all processes of Postgres; the children notice and end."""
        server = postgres.running(self.postgres_folder)
        assert server is not None
        process = psutil.Process(server.process.pid)
        children = process.children(recursive=True)
        process.kill()
        # The process is nobody's child here, and waits for init to reap it.
        _, alive = psutil.wait_procs([process, *children], timeout=60)
        assert not [
            survivor for survivor in alive if survivor.is_running() and survivor.status() != psutil.STATUS_ZOMBIE
        ]

    def start_postgres(self) -> None:
        server = postgres.start(self.postgres_folder, durable=False)
        assert server.url == self.pair.database_url

    def sessions(self, database: str) -> Engine:
        """Return an engine for a test's own statements; each connection is a new session."""
        url = make_url(self.pair.database_url).set(database=database)
        return create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    # -- both

    def whole(self) -> None:
        """Bring both servers back after a test: both run, and refuse nothing."""
        if valkey.running(self.redis_folder) is None:
            self.start_redis()
        if postgres.running(self.postgres_folder) is None:
            self.start_postgres()
        with self.admin() as client:
            make_writable(client)
            client.config_set("maxmemory", 0)
        self.forget_dump()


@contextmanager
def small_disk() -> Iterator[Path | None]:
    """Yield a disk of DISK bytes in memory for the block, or None if this process may not mount a disk."""
    with tempfile.TemporaryDirectory(prefix="celery-capacity-disk-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0755", "tmpfs", name]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            yield None
            return
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", name], capture_output=True, check=False)


@contextmanager
def own_servers(disk: Path | None = None) -> Iterator[Servers]:
    """Yield a pair for the block that nobody else uses.

    Redis gets a port that no client is given meanwhile. `disk`: the disk for its data.
    """
    home = None
    if disk is not None:
        home = disk / "pair"
        home.mkdir()
        home.chmod(0o755)
    with servers.private_pair(home, durable=False) as pair:
        folder = Path(str(pair.data)) / "redis"
        server = valkey.running(folder)
        assert server is not None and server.kill()
        port = OUTGOING - 1 - os.getpid() % 1_000 * 10 - next(_pairs) % 10
        yield Servers(replace(pair, redis_url=valkey.start(folder, port, durable=False).url), disk)


def make_read_only(client: redis.Redis) -> None:
    """Make the server a replica of a missing server: it answers reads, and refuses writes with READONLY."""
    client.replicaof("127.0.0.1", 1)


def make_writable(client: redis.Redis) -> None:
    client.replicaof("NO", "ONE")


def delete_half(client: redis.Redis, chance: random.Random) -> int:
    """Delete each key of this database with a chance of one half; return the number of deleted keys."""
    names: list[Any] = sorted(client.scan_iter(count=1000))
    doomed = [key for key in names if chance.random() < 0.5]
    if doomed:
        client.delete(*doomed)
    return len(doomed)


def drop_redis(client: redis.Redis) -> int:
    """End all connections to this database but the client's own; return their number."""
    return sum(client.client_kill_filter(_id=connection_id) for connection_id in redis_connections(client))


def redis_connections(client: redis.Redis) -> list[str]:
    """Return the ids of all connections to this database but the client's own."""
    mine, database = client.client_id(), str(client.connection_pool.connection_kwargs.get("db", 0))
    connections: Any = client.client_list()
    return [
        connection["id"] for connection in connections if connection["db"] == database and int(connection["id"]) != mine
    ]


_OTHERS: Final = "datname = current_database() AND pid <> pg_backend_pid()"


def postgres_connections(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.execute(text(f"SELECT pid FROM pg_stat_activity WHERE {_OTHERS}")).scalars())


def drop_postgres(engine: Engine) -> int:
    """End all connections to this database of Postgres but this one; return their number."""
    with engine.connect() as connection:
        query = f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {_OTHERS}"
        return int(connection.execute(text(query)).scalar_one())
