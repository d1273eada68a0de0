"""Private servers for each figure, and the environment in which each side sees them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import redis
import sqlalchemy

from benchmarks.plain import PLAIN_URL
from celery_capacity.platform.embedded import servers

#: Number of plain Celery's Redis database. Ours is the number in the pair's own URL.
PLAIN_DATABASE = 1

#: Bytes of a page of Postgres's log, pages of the file that stands for the log, and number of timed syncs.
PAGE, PAGES, SYNCS = 8192, 512, 400

#: Environment names that must not reach a measured process from outside.
FOREIGN = ("PLATFORM_", "CELERY_", "BENCH_", "REDIS_URL", "DATABASE_URL", "NODE_NAME")


#: Folder that holds `benchmarks`; measured processes run in it.
ROOT = Path(__file__).resolve().parent.parent

#: Program of another checkout: start servers with its tables, print where they are, and end them with the input.
_SERVE = """
import json, sys
from celery_capacity.platform.embedded import servers
with servers.private_pair(durable=True) as pair:
    names = ("redis_url", "database_url", "redis_pid", "postgres_pid")
    print(json.dumps({name: getattr(pair, name) for name in names}), flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Pair:
    """Running servers, Redis for both sides and Postgres for ours, and the code whose processes they serve."""

    redis_url: str
    database_url: str
    redis_pid: int
    postgres_pid: int
    folder: Path
    root: Path = ROOT
    python: str = sys.executable

    @property
    def plain_url(self) -> str:
        """Return the URL of the plain side's database on the Redis server of the pair."""
        return urlunsplit(urlsplit(self.redis_url)._replace(path=f"/{PLAIN_DATABASE}"))

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a measured process: a cleaned copy of this one, with the pair's addresses."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        return {
            **clean,
            "REDIS_URL": self.redis_url,
            "DATABASE_URL": self.database_url,
            "PLATFORM_HOME": str(self.folder / "home"),
            PLAIN_URL: self.plain_url,
            **more,
        }


@contextmanager
def private_pair(folder: Path) -> Iterator[Pair]:
    """Start a migrated pair that syncs to disk as a real one does, and end it afterwards.

    Its data have a temporary folder of their own; `folder` is for the logs of the measured processes.
    """
    with servers.private_pair(durable=True) as pair:
        yield Pair(pair.redis_url, pair.database_url, pair.redis_pid, pair.postgres_pid, folder)


@contextmanager
def pair_of(checkout: Path, folder: Path) -> Iterator[Pair]:
    """Start a pair for the code of another checkout, by the interpreter of its own `.venv`."""
    root = checkout.resolve()
    python = str(root / ".venv" / "bin" / "python")
    server = subprocess.Popen(
        [python, "-c", _SERVE], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with server:
        assert server.stdin is not None
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise RuntimeError(f"no servers of {root}: its program ended with {server.wait()}")
        yield Pair(**json.loads(line), folder=folder, root=root, python=python)


def versions(pair: Pair) -> dict[str, str]:
    """Return name and version of both servers, as the servers report them."""
    with redis.Redis.from_url(pair.redis_url) as client:
        about = {**client.info("server"), **client.info("memory")}
    name = about.get("server_name", "redis")
    engine = sqlalchemy.create_engine(pair.database_url)
    with engine.connect() as connection:
        postgres = connection.execute(sqlalchemy.text("SHOW server_version")).scalar_one()
    engine.dispose()
    return {
        name.capitalize(): f"{about.get(f'{name}_version', about['redis_version'])} with {_allocator(about)}",
        "PostgreSQL": str(postgres).split()[0],
    }


def _allocator(about: Mapping[str, object]) -> str:
    """Return the name of the allocator of a Redis on this machine. It does not know of one that was preloaded."""
    maps = Path(f"/proc/{about['process_id']}/maps")
    preloaded = maps.exists() and "libjemalloc" in maps.read_text()
    return "jemalloc" if preloaded else str(about["mem_allocator"])


def sync_ms(folder: Path) -> float:
    """Measure the median time in which the disk under a folder syncs one overwritten page, in milliseconds.

    Postgres's log is overwritten so with each commit. No submitter can be faster than this sync.
    """
    # fdatasync is Postgres's own default on Linux. macOS has only fsync.
    sync = getattr(os, "fdatasync", os.fsync)
    path = folder / "synced"
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    taken: list[float] = []
    try:
        os.write(file, bytes(PAGES * PAGE))
        os.fsync(file)
        for number in range(SYNCS):
            begin = time.perf_counter()
            os.pwrite(file, number.to_bytes(PAGE, "little"), number % PAGES * PAGE)
            sync(file)
            taken.append((time.perf_counter() - begin) * 1000)
    finally:
        os.close(file)
        path.unlink()
    return statistics.median(taken)
