"""What the platform makes of what dies: a worker, one of its processes, Redis, Postgres, a message on its way.

Each test kills what its name says, by signal, and then gives no command: what follows the platform does by itself. The
fixture `books` checks after each of them that nothing was left behind.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from celery import Celery
from celery.exceptions import WorkerLostError
from sqlalchemy import text

from platform import postgres, servers, valkey
from routing import keys, roster
from routing.errors import NotAccepted, OutcomeUnknown
from routing.home import Pair
from routing.states import FINAL
from tests.fixtures import tasks
from tests.fixtures.processes import Platform, Process
from tests.fixtures.submitting import RESULT_WITHIN, Submitter, standing_platform
from tests.fixtures.waiting import until
from tests.tasks.work import peaks, read, starts
from workers.duties import DUTIES
from workers.sender import Sender
from workers.stores import Stores

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
WORK = "tests.tasks.work.work"

#: For tests that end a server: the others go on with the one that they share.
own_servers = pytest.mark.parametrize("pair", ["own servers"], indirect=True)


#: Systems give ports from here on to whoever connects somewhere: also that of a server that is
#: down, to a client that asks for it.
OUTGOING = 32768


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    if not hasattr(request, "param"):
        yield request.getfixturevalue("server_pair")
        return
    with servers.private_pair(durable=False) as own:
        server = valkey.running(redis_folder(own))
        assert server is not None and server.kill()
        # Where it comes back is where it was.
        port = OUTGOING - 1 - os.getpid() % 10_000
        yield replace(own, redis_url=valkey.start(redis_folder(own), port, durable=False).url)


@pytest.fixture
def platform(pair: Pair, tmp_path: Path) -> Iterator[Platform]:
    with standing_platform(pair, tmp_path, "tests.tasks.work") as running:
        yield running


def send_work(submitter: Submitter, trace: Path, labels: Iterable[int], seconds: float, **options: Any) -> list[str]:
    """Jobs of one CPU each that leave their label in the trace."""
    return [submitter.send(WORK, str(trace), str(label), seconds, 1000, **options) for label in labels]


def states(platform: Platform) -> Counter[str]:
    """How many jobs are in each state."""
    with platform.engine.connect() as connection:
        rows = connection.execute(text("SELECT state, count(*) FROM jobs GROUP BY state"))
        return Counter({row[0]: row[1] for row in rows})


def all_ended(platform: Platform, jobs: int) -> Counter[str]:
    """The states of all jobs, as soon as there are so many and all are final."""

    def ended() -> Counter[str]:
        found = states(platform)
        return found if found.total() == jobs and found.keys() <= set(FINAL) else Counter()

    return until(ended, lambda: f"{jobs} jobs are over; they are {states(platform)}", 60.0)


def all_outcomes(submitter: Submitter, job: str, *outcomes: str) -> None:
    """Waits for the outcomes of all attempts. (What the ledger noted without the job's worker is written by a duty.)"""
    until(
        lambda: submitter.outcomes(job) == list(outcomes),
        lambda: f"the outcomes {outcomes}, they are {submitter.outcomes(job)}",
    )


def held(platform: Platform, gate: str, job: str) -> int:
    """Waits for the job to run at the gate; the pid of its process."""
    found, pid = tasks.started(platform.redis, gate, 40)
    assert found == job
    return pid


def lease_ms(platform: Platform, worker: str) -> int:
    """When the worker's lease ends, by the ledger's clock."""
    found: Any = platform.redis.hget(keys.book(worker), "lease")
    return int(found)


def views(platform: Platform) -> set[str]:
    """What a person sees by KEYS "worker:*"."""
    found: Any = platform.redis.keys("worker:*")
    return {key.decode() for key in found}


def redis_folder(pair: Pair) -> Path:
    assert pair.data is not None
    return Path(pair.data) / "redis"


def postgres_folder(pair: Pair) -> Path:
    assert pair.data is not None
    return Path(pair.data) / "postgres"


# -- a worker's processes


def test_a_job_whose_process_is_killed_runs_again_as_attempt_2(platform: Platform, submitter: Submitter) -> None:
    worker = platform.worker("a", cpus=2)
    job = submitter.send(HOLD, "gate", cpus=2)
    killed = held(platform, "gate", job)
    os.kill(killed, signal.SIGKILL)
    died = time.time()
    assert held(platform, "gate", job) != killed
    row = until(lambda: (found := submitter.row(job)).attempt == 2 and found, "attempt 2 is in the row")
    assert (row.state, row.losses, row.worker) == ("running", 1, "a")
    assert submitter.allocated_cpus() == "2"
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(job) == "a"
    assert submitter.ended(job).state == "succeeded"
    assert submitter.outcomes(job) == ["lost", "succeeded"]
    first = submitter.attempts(job)[0]
    assert "signal 9" in first.error
    assert first.ended_at.timestamp() - died < 3
    assert submitter.allocated_cpus() == "0"
    assert worker.alive


def test_a_job_that_loses_its_process_three_times_is_lost_and_its_neighbours_are_not(
    platform: Platform, submitter: Submitter
) -> None:
    platform.worker("a", cpus=4)
    neighbours = [submitter.send(HOLD, "neighbours") for _ in range(2)]
    for _ in neighbours:
        tasks.started(platform.redis, "neighbours")
    poison = submitter.send(HOLD, "poison", cpus=2)
    for losses in range(3):
        if losses == 2:
            # They saw two deaths beside them. (The last try may be made alone.)
            tasks.let_go(platform.redis, "neighbours", len(neighbours))
            assert [submitter.ended(job).state for job in neighbours] == ["succeeded"] * 2
        os.kill(held(platform, "poison", poison), signal.SIGKILL)
    row = submitter.ended(poison)
    assert (row.state, row.attempt, row.losses) == ("lost", 3, 3)
    assert "signal 9" in row.error
    assert submitter.outcomes(poison) == ["lost"] * 3
    with pytest.raises(WorkerLostError, match="signal 9"):
        submitter.value(poison)
    assert [submitter.outcomes(job) for job in neighbours] == [["succeeded"]] * 2
    assert submitter.value(submitter.send(ADD, 1, 1, cpus=4)) == 2


# -- a worker


def test_a_killed_worker_vanishes_and_its_job_runs_on_another_when_it_is_lost(
    platform: Platform, submitter: Submitter
) -> None:
    settings = platform.settings
    killed = platform.worker("a", cpus=4)
    job = submitter.send(HOLD, "gate", cpus=4)
    held(platform, "gate", job)
    platform.worker("b", cpus=4)
    waits = submitter.send(HOLD, "beside", cpus=3)
    held(platform, "beside", waits)
    assert views(platform) == {"worker:a", "worker:b"}
    killed.kill()
    until(lambda: views(platform) == {"worker:b"}, "a is no longer seen", settings.worker_ttl + 1)
    lease = lease_ms(platform, "a")
    tasks.let_go(platform.redis, "beside")
    assert submitter.ended(waits).state == "succeeded"
    held(platform, "gate", job)
    row = until(lambda: (found := submitter.row(job)).attempt == 2 and found, "attempt 2 is in the row")
    assert (row.worker, row.losses) == ("b", 1)
    grace = settings.lost_after - settings.worker_ttl
    assert row.admitted_at.timestamp() >= lease / 1000 + grace - 0.01
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(job) == "b"
    assert submitter.ended(job).state == "succeeded"
    all_outcomes(submitter, job, "lost", "succeeded")
    with platform.engine.connect() as connection:
        status = {row.name: row.status for row in connection.execute(text("SELECT name, status FROM workers"))}
    assert status == {"a": "lost", "b": "ready"}
    assert submitter.allocated_cpus() == "0"


def test_a_worker_that_is_started_again_takes_over_from_its_dead_life_at_once(
    platform: Platform, submitter: Submitter
) -> None:
    platform.environment |= {"PLATFORM_WORKER_TTL": "60", "PLATFORM_LOST_AFTER": "75"}
    former = platform.worker("a", cpus=2)
    job = submitter.send(HOLD, "gate", cpus=2)
    held(platform, "gate", job)
    former.kill()
    until_ms = lease_ms(platform, "a")
    again = platform.worker("a", cpus=2)
    held(platform, "gate", job)
    row = until(lambda: (found := submitter.row(job)).attempt == 2 and found, "attempt 2 is in the row")
    assert row.admitted_at.timestamp() < until_ms / 1000
    assert not any("silent" in line for line in again.lines)
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(job).state == "succeeded"
    all_outcomes(submitter, job, "lost", "succeeded")
    first, second = submitter.attempts(job)
    assert first.incarnation != second.incarnation == submitter.view("a")["incarnation"]


# -- a message


def until_nobody_listens(platform: Platform) -> None:
    """A stopped worker that waits at a list would still be given what comes there, into its socket."""

    def listeners() -> list[Any]:
        found: Any = platform.redis.client_list()
        database = str(platform.redis.connection_pool.connection_kwargs["db"])
        return [one for one in found if one["db"] == database and "b" in one["flags"]]

    until(lambda: not listeners(), lambda: f"nobody waits at a list: {listeners()}")


@pytest.fixture
def stopped(platform: Platform) -> Iterator[Process]:
    """The worker `a`, stopped; it goes on at the end, whatever came between."""
    worker = platform.worker("a", cpus=4)
    os.killpg(worker.pid, signal.SIGSTOP)
    until_nobody_listens(platform)
    yield worker
    os.killpg(worker.pid, signal.SIGCONT)


def test_a_message_that_was_lost_on_its_way_is_delivered_again_as_the_same_attempt(
    platform: Platform, stopped: Process, submitter: Submitter
) -> None:
    job = submitter.send(ADD, 40, 2, cpus=4)
    queue = submitter.view("a")["queue"]
    message: Any = platform.redis.lpop(queue)
    assert message is not None and job in message.decode()
    assert platform.redis.llen(queue) == 0
    os.killpg(stopped.pid, signal.SIGCONT)
    assert submitter.value(job) == 42
    row = submitter.ended(job)
    assert (row.state, row.attempt, row.losses) == ("succeeded", 1, 0)
    assert row.started_at.timestamp() - row.admitted_at.timestamp() >= platform.settings.start_timeout
    assert submitter.outcomes(job) == ["succeeded"]


def test_a_message_that_is_delivered_twice_runs_once(
    platform: Platform, stopped: Process, submitter: Submitter, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    (job,) = send_work(submitter, trace, [1], 0.3)
    queue = submitter.view("a")["queue"]
    messages: Any = platform.redis.lrange(queue, 0, -1)
    (message,) = messages
    platform.redis.rpush(queue, message, message)
    os.killpg(stopped.pid, signal.SIGCONT)
    assert submitter.ended(job).state == "succeeded"
    platform.redis.rpush(queue, message)
    stopped.wait_for("a stale or doubled message")
    assert submitter.value(submitter.send(ADD, 1, 1)) == 2
    assert [(event.what, event.attempt) for event in read(trace)] == [("start", 1), ("end", 1)]
    assert submitter.outcomes(job) == ["succeeded"]


# -- what never reached the ledger


def test_jobs_that_were_accepted_before_any_worker_are_taken_by_the_first(
    platform: Platform, submitter: Submitter
) -> None:
    assert not platform.redis.exists(keys.EPOCH)
    jobs = [submitter.send(ADD, n, n, cpus=1 + n % 4) for n in range(10)]
    assert states(platform) == {"accepted": 10}
    platform.worker("a", cpus=4)
    assert [submitter.value(job) for job in jobs] == [2 * n for n in range(10)]
    assert all_ended(platform, 10) == {"succeeded": 10}
    assert {submitter.row(job).attempt for job in jobs} == {1}


def test_duties_need_no_beat(platform: Platform, submitter: Submitter, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = platform.worker("a", cpus=4)
    with monkeypatch.context() as dying:
        # The submitter dies after its insert.
        dying.setattr(Sender, "_to_ledger", lambda *_: None)
        stranded = submitter.send(ADD, 1, 2)
    later = submitter.send(ADD, 3, 4, countdown=0.5)
    assert [submitter.row(job).state for job in (stranded, later)] == ["accepted", "scheduled"]
    assert (submitter.value(stranded), submitter.value(later)) == (3, 7)
    worker.wait_for("duty sweep: submitted 1")
    worker.wait_for("duty due: due 1")
    row = submitter.ended(later)
    assert row.started_at >= row.due_at


def test_the_messages_of_a_producer_that_knows_nothing_of_the_platform_become_jobs(
    platform: Platform, submitter: Submitter
) -> None:
    url = platform.settings.redis_url
    old = Celery("old", broker=url, backend=url, set_as_current=False)
    before = old.send_task(ADD, [1, 2])
    assert platform.redis.llen("celery") == 1
    platform.worker("a", cpus=4)
    after = [old.send_task(ADD, [n, n], task_id=f"after-{n}") for n in range(5)]
    # A producer that was unsure whether it had published.
    after.append(old.send_task(ADD, [4, 4], task_id="after-4"))
    later = old.send_task(ADD, [3, 4], countdown=0.5)
    assert [one.get(timeout=RESULT_WITHIN) for one in (before, *after, later)] == [3, 0, 2, 4, 6, 8, 8, 7]
    row = submitter.ended(before.id)
    assert (row.state, row.worker, row.attempt, row.declared) == ("succeeded", "a", 1, False)
    assert row.request == {"cpus": 1, "slots": 1}
    row = submitter.ended(later.id)
    assert row.started_at >= row.due_at
    assert all_ended(platform, 7) == {"succeeded": 7}

    def left() -> list[Any]:
        return [key for key in ("celery", "unacked", "unacked_index") if platform.redis.exists(key)]

    until(lambda: not left(), lambda: f"all messages are acknowledged: {left()}")
    old.close()


# -- duties


def test_all_duties_done_by_three_at_once_do_no_harm(
    platform: Platform, submitter: Submitter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, over, drift = tmp_path / "trace", threading.Event(), Counter[str]()
    for name in ("a", "b"):
        platform.worker(name, cpus=4, pool="threads")

    def repair() -> int:
        passes, stores = 0, Stores(lambda _: platform.settings)
        while not over.is_set():
            with stores.engine.connect() as connection:
                stores.ledger.epoch = roster.read_authority(connection).epoch
            for duty in DUTIES:
                counts = duty.run(submitter.app, stores)
                drift.update({name: count for name, count in counts.items() if name == "drift"})
            passes += 1
        stores.engine.dispose()
        stores.redis.close()
        return passes

    with ThreadPoolExecutor(3) as executor:
        repairers = [executor.submit(repair) for _ in range(3)]
        try:
            with monkeypatch.context() as dying:
                dying.setattr(Sender, "_to_ledger", lambda *_: None)
                send_work(submitter, trace, range(20), 0.1)
            send_work(submitter, trace, range(20, 40), 0.1, countdown=0.3)
            send_work(submitter, trace, range(40, 100), 0.1)
            assert all_ended(platform, 100) == {"succeeded": 100}
        finally:
            over.set()
        assert all(repairer.result() > 3 for repairer in repairers)
    assert starts(read(trace)) == {str(label): 1 for label in range(100)}
    assert max(peaks(read(trace)).values()) <= 4000
    assert drift.total() == 0


# -- Redis


def test_redis_is_emptied_twice_under_load_and_every_job_runs_once(
    platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    platform.worker("a", cpus=4)
    platform.worker("b", cpus=4, pool="threads")

    def begun() -> int:
        return starts(read(trace)).total()

    def epoch() -> int:
        found: Any = platform.redis.hget(keys.EPOCH, "epoch")
        return int(found or 0)

    send_work(submitter, trace, range(40), 0.3)
    for enough, more in ((15, range(40, 70)), (55, range(70, 100))):
        until(lambda: begun() >= enough, lambda: f"{enough} jobs have begun, {begun()} have")  # noqa: B023
        before = epoch()
        platform.redis.flushdb()
        # Nobody who submits notices.
        send_work(submitter, trace, more, 0.3)
        until(lambda: epoch() > before, "a new epoch is open")  # noqa: B023
    assert all_ended(platform, 100) == {"succeeded": 100}
    assert starts(read(trace)) == {str(label): 1 for label in range(100)}
    assert max(peaks(read(trace)).values()) <= 4000
    assert submitter.allocated_cpus() == "0"
    assert {submitter.view(name)["status"] for name in ("a", "b")} == {"ready"}


@own_servers
def test_without_redis_the_cluster_is_shown_from_postgres(pair: Pair, platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=4)
    job = submitter.send(HOLD, "gate", cpus=3)
    held(platform, "gate", job)
    submitter.until(job, "running")
    server = valkey.running(redis_folder(pair))
    assert server is not None and server.kill()
    shown = platform.celery("cluster", "--json")
    assert shown.returncode == 0, shown.stderr
    cluster = json.loads(shown.stdout)
    assert cluster["source"] == "postgres"
    found = {name: cluster["resources"][name] for name in ("total_cpus", "allocated_cpus", "active_workers")}
    assert found == {"total_cpus": 4, "allocated_cpus": 3, "active_workers": 1}
    # A durable job none the less; it is run when the ledger, which comes back empty, is open again.
    waits = submitter.send(ADD, 40, 2)
    assert submitter.row(waits).state == "accepted"
    assert valkey.start(redis_folder(pair), urlsplit(pair.redis_url).port, durable=False).url == pair.redis_url
    assert submitter.ended(waits, 60).state == "succeeded"
    assert submitter.value(waits) == 42
    # (Its body lost its own connection to Redis.)
    assert submitter.ended(job).state == "failed"


# -- Postgres


@own_servers
def test_without_postgres_running_jobs_end_and_are_written_once_when_it_is_back(
    pair: Pair, platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    trace, folder = tmp_path / "trace", postgres_folder(pair)
    with platform.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # The servers of tests may forget what they committed last, when they are killed.
        database = connection.execute(text("SELECT current_database()")).scalar_one()
        connection.execute(text(f"ALTER DATABASE {database} SET synchronous_commit = on"))
    platform.worker("a", cpus=4)
    jobs = [submitter.send(HOLD, "gate", cpus=2) for _ in range(2)]
    for _ in jobs:
        tasks.started(platform.redis, "gate")
    old = Celery("old", broker=platform.settings.redis_url, set_as_current=False)
    server = postgres.running(folder)
    assert server is not None and server.kill()
    platform.engine.dispose()

    for label in range(3):
        began = time.monotonic()
        with pytest.raises((NotAccepted, OutcomeUnknown)):
            send_work(submitter, trace, [label], 0.0)
        assert time.monotonic() - began < 10
    left = old.send_task(ADD, [40, 2])
    tasks.let_go(platform.redis, "gate", len(jobs))
    assert [submitter.value(job) for job in jobs] == ["a", "a"]
    until(lambda: submitter.allocated_cpus() == "0", "what they held is free")
    platform.processes[0].wait_for("Postgres does not take")
    # The worker stays alive for the others, however long it takes.
    before = lease_ms(platform, "a")
    until(lambda: lease_ms(platform, "a") >= before + 2000, "its heartbeats go on")
    assert submitter.view("a")["status"] == "ready"

    postgres.start(folder, durable=False)
    rows = [submitter.ended(job) for job in jobs]
    assert [(row.state, row.attempt, row.worker) for row in rows] == [("succeeded", 1, "a")] * 2
    assert [submitter.outcomes(job) for job in jobs] == [["succeeded"]] * 2
    assert submitter.ended(left.id).state == "succeeded"
    assert submitter.value(submitter.send(ADD, 1, 1, cpus=4)) == 2
    assert all_ended(platform, 4) == {"succeeded": 4}
    assert read(trace) == []
    old.close()
