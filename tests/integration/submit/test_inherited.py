"""A fork copies its parent's descriptors: the child leaves none of the platform's connections open, and sends nothing.

The connections are those to Redis and Postgres.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from sqlalchemy import text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.process import fork_safety
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"


@pytest.fixture
def stores(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stores]:
    """Yield stores with a connection to each server, as a submitter has them."""
    made = Stores()
    made._made["settings"] = settings
    with made.engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    made.redis.ping()
    made.sending.ask(lambda ledger: ledger.client.ping())
    yield made
    made.engine.dispose()
    made.redis.close()
    made.sending.close()


def in_a_child(do: Callable[[], object]) -> str:
    """Return the result of `do` in a forked child, as text. The child's end closes nothing."""
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(send, repr(do()).encode())
        except BaseException as error:
            os.write(send, repr(error).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def sockets(settings: Settings) -> list[int]:
    return fork_safety.sockets_to(fork_safety.endpoints_of(settings))


def test_spare_connections_close_also_those_of_senders(stores: Stores) -> None:
    assert stores.ledger.descriptors() and stores.breaker.descriptors()
    stores.close_spare_connections()
    assert [*stores.ledger.descriptors(), *stores.breaker.descriptors()] == []
    # They are made anew when they are needed.
    assert stores.sending.ask(lambda ledger: ledger.client.ping())


def test_a_child_has_no_connection_of_its_parent(stores: Stores, settings: Settings) -> None:
    ours = {*stores.ledger.descriptors(), *stores.breaker.descriptors()}
    with stores.engine.connect() as connection:
        ours.add(connection.connection.driver_connection.fileno())  # type: ignore[union-attr]
    assert len(ours) == 3
    assert ours <= set(sockets(settings))
    assert in_a_child(lambda: ours & set(sockets(settings))) == "set()"


def test_the_parent_s_connections_go_on_after_a_child_has_ended(stores: Stores) -> None:
    with stores.engine.connect() as connection:
        before = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    mine = stores.redis.client_id()

    def both_answer() -> tuple[Any, ...]:
        return stores.redis.ping(), stores.engine.connect().execute(text("SELECT 7")).scalar_one()

    assert in_a_child(both_answer) == "(True, 7)"
    with stores.engine.connect() as connection:
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() == before
    assert stores.redis.client_id() == mine


def test_a_child_that_outlives_its_parent_keeps_no_session_alive(settings: Settings, stage: Stage) -> None:
    """The parent here is a child of the test, and leaves a child of its own."""

    def leave_a_child() -> tuple[Any, ...]:
        stores = Stores()
        stores._made["settings"] = settings
        with stores.engine.connect() as connection:
            session = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        client = stores.redis.client_id()
        if (child := os.fork()) == 0:
            # The child's copy of the pipe would keep the test waiting.
            os.closerange(0, 3)
            for name in os.listdir("/dev/fd"):
                with suppress(OSError):
                    if stat.S_ISFIFO(os.fstat(int(name)).st_mode):
                        os.close(int(name))
            signal.pause()
        return session, client, child

    session, client, orphan = map(int, in_a_child(leave_a_child).strip("()").split(","))
    try:
        listed: Callable[[], Any] = stage.redis.client_list
        until(
            lambda: all(int(client_entry["id"]) != client for client_entry in listed()),
            "Redis sees that the parent has gone",
        )

        def gone() -> bool:
            with stage.engine.connect() as connection:
                query = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
                return bool(connection.execute(query, {"pid": session}).scalar_one() == 0)

        until(gone, "Postgres sees that the parent has gone")
    finally:
        os.kill(orphan, signal.SIGKILL)


def peers(process: psutil.Process) -> set[int]:
    """Return the ports that a process is connected to, or none where it has ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        return {link.raddr.port for link in process.net_connections("tcp") if len(link.raddr)}
    return set()


def test_the_children_of_a_pool_have_no_connection_of_their_worker(platform: Platform, submitter: Submitter) -> None:
    worker = platform.worker("a", cpus=2, arguments=("--max-tasks-per-child", "1"))
    for number in range(4):
        job = submitter.send(ADD, number, 1)
        assert submitter.value(job) == number + 1
    port = urlsplit(str(platform.settings.redis_url)).port
    main = psutil.Process(worker.pid)
    # The connection is made anew after each job, while the worker has all its connections.
    assert port in peers(main)

    def free_of_them() -> bool:
        try:
            children = [child for child in main.children() if child.status() != psutil.STATUS_ZOMBIE]
            return len(children) >= 2 and not any(port in peers(child) for child in children)
        except psutil.NoSuchProcess:
            # A child ended between two looks: the pool replaces each after a job.
            return False

    until(free_of_them, "no child of the pool is connected to Redis")
