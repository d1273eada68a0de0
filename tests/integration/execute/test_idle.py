"""A worker that has nothing to do costs next to nothing.

The cost is measured on the whole worker, at the usual intervals.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from sqlalchemy import text

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.connection import connect
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.servers.pair import TENTH, empty_database, empty_redis, environment_of
from tests.fixtures.waiting import until

#: Seconds that are measured: two heartbeats and four looks of the election.
SECONDS: Final = 20.0
#: Workers besides the one that runs the duties.
IDLE: Final = 2
#: Most that an idle worker may cost: calls to Redis and commits in Postgres a second, and connections to each.
CALLS: Final = 0.5
COMMITS: Final = 0.1
REDIS_CONNECTIONS: Final = 4
POSTGRES_CONNECTIONS: Final = 1


@pytest.fixture
def platform(own_embedded: Pair, tmp_path: Path) -> Iterator[Platform]:
    """Yield a platform with the usual intervals."""
    with empty_database(own_embedded) as database_url, empty_redis(own_embedded) as redis_url:
        environment = environment_of(redis_url, database_url, tmp_path)
        with platform_on({name: environment[name] for name in environment if name not in TENTH}, tmp_path) as running:
            yield running


@contextmanager
def heard(platform: Platform) -> Iterator[list[dict[str, Any]]]:
    """Yield the commands that clients send meanwhile to this platform's database, without commands within scripts."""
    commands: list[dict[str, Any]] = []
    over = threading.Event()
    number = str(platform.redis.connection_pool.connection_kwargs["db"])
    with connect(str(platform.settings.redis_url), socket_timeout=60.0) as client, client.monitor() as monitor:

        def listen() -> None:
            while not over.is_set():
                command = monitor.next_command()
                if str(command["db"]) == number and command["client_type"] != "lua":
                    commands.append(command)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield commands
        over.set()
        platform.redis.ping()
        thread.join()


def sessions(platform: Platform) -> list[tuple[str, int, str]]:
    """Return (name, pid, last statement) of each connection to this platform's database but the test's own."""
    with platform.engine.connect() as connection:
        query = text(
            "SELECT application_name, pid, query FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return [(row[0], row[1], row[2]) for row in connection.execute(query)]


@contextmanager
def watched(platform: Platform) -> Iterator[dict[int, set[Any]]]:
    """Yield the start times of the statements of each Postgres session, by its pid, sampled ten times a second."""
    begun: dict[int, set[Any]] = {}
    over = threading.Event()

    def look() -> None:
        query = text(
            "SELECT pid, query_start FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with platform.engine.connect() as connection:
            while not over.wait(0.1):
                for pid, since in connection.execute(query):
                    begun.setdefault(pid, set()).add(since)
                connection.commit()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield begun
    over.set()
    thread.join()


def ports(process: Process) -> set[str]:
    """Return the ports from which a worker's processes have connected."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return {str(link.laddr.port) for member in family for link in member.net_connections("tcp")}


@pytest.mark.long(40)
def test_an_idle_worker_asks_little_and_wakes_up_at_once(platform: Platform) -> None:
    first = platform.worker("first", cpus=1, slots=1)
    until(lambda: platform.redis.hget(keys.RUNNER, "fence"), "it runs the duties")
    idle = [platform.worker(f"idle-{number}", cpus=2, slots=2) for number in range(IDLE)]
    # By then the answers of the start have run out, and all questions of the start are over.
    threading.Event().wait(2 * platform.settings.confirm_interval)
    since = time.monotonic()
    with heard(platform) as commands, watched(platform) as begun:
        threading.Event().wait(SECONDS)
        took = time.monotonic() - since
    # The counts of the duties go in the round trip of a script.
    passes: Any = platform.redis.hgetall(keys.COUNTERS)
    assert {f"duty.{duty}.done".encode() for duty in ("stream", "due", "outbox", "lapse")} <= passes.keys(), passes
    last: dict[str, str] = {}
    for command in commands:
        word, port = command["command"].split()[0], command["client_port"]
        assert word != "HINCRBY" or last.get(port) in ("EVALSHA", "HINCRBY"), (last.get(port), command)
        last[port] = word
    those = {port for process in idle for port in ports(process)}
    asked = Counter(" ".join(command["command"].split()[:2]) for command in commands if command["client_port"] in those)
    assert asked.total() / took / IDLE <= CALLS, asked
    connections: Any = platform.redis.client_list()
    waiting = [connection for connection in connections if connection["addr"].rpartition(":")[2] in those]
    assert len(waiting) / IDLE <= REDIS_CONNECTIONS, [(connection["cmd"], connection["idle"]) for connection in waiting]
    # The runner asks and listens, so its sessions do not count.
    statements = sorted(len(times) - 1 for times in begun.values())[: IDLE + 1]
    assert max(statements) / took <= COMMITS, statements
    connected = [name for name, _, _ in sessions(platform)]
    # The runner has another session that listens, and the test has a session of its own.
    assert len(connected) - 1 <= (IDLE + 1) * POSTGRES_CONNECTIONS, connected
    assert first.stop() == 0
    until(
        lambda: any("runs the duties" in line for process in idle for line in process.lines),
        "another one runs the duties",
    )
    submitter = Submitter(platform)
    try:
        job = submitter.send("tests.fixtures.tasks.add", 1, 2, cpus=2)
        row = submitter.ended(job)
        assert row.state == "succeeded"
    finally:
        submitter.close()
    calls = asked.total() / took / IDLE
    print(f"{calls:.2f} calls a second, {len(waiting) / IDLE} connections; {max(statements) / took:.2f} statements")
