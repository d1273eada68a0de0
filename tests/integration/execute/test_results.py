"""The messages of an attempt on behalf of its job: its result, its part of a chord, and its publishes.

They count once, from the attempt that holds the lease, whichever store is away at that moment.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chord
from celery.exceptions import ChordError, TaskRevokedError, WorkerLostError
from celery.result import AsyncResult
from sqlalchemy import text

from celery_capacity.platform.embedded import postgres, servers, valkey
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.errors import LeaseLost
from celery_capacity.routing.ledger import keys
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until
from tests.tasks import speaking
from tests.tasks.canvas import total

IMPORTS = ("tests.tasks.speaking", "tests.tasks.canvas")


@pytest.fixture
def own_pair() -> Iterator[Pair]:
    with servers.private_pair(durable=False) as pair:
        yield pair


@pytest.fixture
def platform(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Platform]:
    has_own_pair = "own_pair" in request.fixturenames
    pair = request.getfixturevalue("own_pair" if has_own_pair else "server_pair")
    with standing_platform(pair, tmp_path, *IMPORTS) as running:
        yield running


@pytest.fixture(params=["redis", "redis elsewhere", "sql"])
def results(request: pytest.FixtureRequest, platform: Platform, tmp_path: Path) -> str:
    """Return the URL of the result store: with the ledger, in another database of Redis, or in SQL."""
    url = {
        "redis": platform.settings.redis_url,
        "redis elsewhere": request.getfixturevalue("redis_url"),
        "sql": f"db+sqlite:///{tmp_path}/results.db",
    }[request.param]
    platform.environment["CELERY_RESULT_BACKEND"] = str(url)
    return str(url)


@pytest.fixture
def speaker(results: str, submitter: Submitter) -> Submitter:
    """Return a submitter that reads results where the workers keep them."""
    submitter.app.conf.result_backend = results
    return submitter


def counter(platform: Platform, name: str) -> int:
    count: Any = platform.redis.hget(keys.COUNTERS, name)
    return int(count or 0)


def made_a_zombie(platform: Platform, gate: str, job: str, worker: Process | None = None) -> Process:
    """Stop the worker `a`, which runs the job at the gate, until the job runs as attempt 2 on `b`. Return `a`."""
    worker = worker or platform.worker("a", cpus=2, pool="threads")
    assert tasks.started(platform.redis, f"{gate}.1")[0] == job
    os.killpg(worker.pid, signal.SIGSTOP)
    platform.worker("b", cpus=2, pool="threads")
    assert tasks.started(platform.redis, f"{gate}.2")[0] == job
    return worker


def test_the_result_of_an_attempt_that_lost_its_lease_reaches_nobody(platform: Platform, speaker: Submitter) -> None:
    job = speaker.send("tests.tasks.speaking.numbered", "gate", 10)
    zombie = made_a_zombie(platform, "gate", job)
    os.killpg(zombie.pid, signal.SIGCONT)
    tasks.let_go(platform.redis, "gate.1")
    zombie.wait_for("no longer held its lease")
    assert speaker.result(job).state == "PENDING"
    assert counter(platform, "stale.release") == 1
    tasks.let_go(platform.redis, "gate.2")
    assert speaker.value(job) == 12
    assert speaker.ended(job).state == "succeeded"
    assert speaker.result(job).get() == 12


def test_what_an_attempt_without_a_lease_publishes_is_refused_and_counted(
    platform: Platform, submitter: Submitter
) -> None:
    job = submitter.send("tests.tasks.speaking.sending", "gate", "published-1")
    zombie = made_a_zombie(platform, "gate", job)
    os.killpg(zombie.pid, signal.SIGCONT)
    tasks.let_go(platform.redis, "gate.1")
    zombie.wait_for("LeaseLost")
    assert submitter.row("published-1") is None
    assert counter(platform, "stale.publish") == 1
    tasks.let_go(platform.redis, "gate.2")
    assert submitter.value(job) == "sent"
    assert submitter.value("published-1") == 2


def test_each_part_of_a_chord_counts_once(platform: Platform, submitter: Submitter) -> None:
    parts = [speaking.numbered.s("gate", 10), speaking.numbered.s("other", 100)]
    body: AsyncResult = chord(parts, app=submitter.app)(total.s())
    first, second = (part.id for part in body.parent.results)
    tasks.let_go(platform.redis, "other.1")
    worker = platform.worker("a", cpus=2, pool="threads")
    assert submitter.ended(second).state == "succeeded"
    zombie = made_a_zombie(platform, "gate", first, worker)
    os.killpg(zombie.pid, signal.SIGCONT)
    tasks.let_go(platform.redis, "gate.1")
    zombie.wait_for("no longer held its lease")
    assert submitter.row(body.id) is None
    tasks.let_go(platform.redis, "gate.2")
    assert body.get(timeout=60) == 12 + 101
    assert submitter.ended(body.id).attempt == 1


def test_states_on_the_way_are_seen_and_never_stand_over_an_end(platform: Platform, speaker: Submitter) -> None:
    platform.worker("a", cpus=2)
    job = speaker.send("tests.tasks.speaking.announcing", "gate")
    tasks.started(platform.redis, "gate.1")
    result = speaker.result(job)
    assert (result.state, result.info) == ("HALF", {"attempt": 1})
    tasks.let_go(platform.redis, "gate.1")
    assert speaker.value(job) == "done"
    speaker.app.backend.store_result(job, {}, "SUCCESS")
    assert speaker.result(job).state == "SUCCESS"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_result_waits_with_its_outcome_while_the_backend_is_away(
    platform: Platform, own_pair: Pair, submitter: Submitter, pool: Any, tmp_path: Path
) -> None:
    backend = valkey.start(tmp_path / "results", 0, durable=False)
    platform.environment["CELERY_RESULT_BACKEND"] = submitter.app.conf.result_backend = backend.url
    worker = platform.worker("a", cpus=2, pool=pool)
    job = submitter.send("tests.tasks.speaking.numbered", "gate")
    tasks.started(platform.redis, "gate.1")
    assert valkey.running(tmp_path / "results").kill()  # type: ignore[union-attr]
    tasks.let_go(platform.redis, "gate.1")
    row = submitter.ended(job)
    assert (row.state, row.attempt) == ("succeeded", 1)
    until(lambda: submitter.row(job).outbox, "the result waits in the row")
    # The next job is not held up.
    after = submitter.send("tests.fixtures.tasks.add", 1, 1, cpus=2)
    assert submitter.ended(after).state == "succeeded"
    again = valkey.start(tmp_path / "results", int(backend.url.rpartition(":")[2].split("/")[0]), durable=False)
    try:
        assert again.url == backend.url
        until(lambda: submitter.row(job).outbox is None, "it was delivered")
        until(lambda: submitter.row(after).outbox is None, "it was delivered")
        assert (submitter.value(job), submitter.value(after)) == (1, 2)
        assert worker.alive
    finally:
        assert valkey.running(tmp_path / "results").kill()  # type: ignore[union-attr]


def make_durable(platform: Platform) -> None:
    """Make the database keep its last commits when it is killed, which test servers may otherwise forget."""
    with platform.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        database = connection.execute(text("SELECT current_database()")).scalar_one()
        connection.execute(text(f"ALTER DATABASE {database} SET synchronous_commit = on"))
    platform.engine.dispose()


def kill_postgres(platform: Platform, pair: Pair) -> None:
    server = postgres.running(Path(str(pair.data)) / "postgres")
    assert server is not None and server.kill()
    platform.engine.dispose()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_is_published_while_postgres_is_away_waits_with_its_attempt(
    platform: Platform, own_pair: Pair, submitter: Submitter, pool: Any
) -> None:
    make_durable(platform)
    worker = platform.worker("a", cpus=3, pool=pool)
    chain: AsyncResult = (speaking.numbered.s("gate", 10) | tasks.add.s(100)).apply_async()
    retried = submitter.send("tests.tasks.speaking.again_after", "gate")
    sent = submitter.send("tests.tasks.speaking.sending", "gate", "published-2")
    for _ in range(3):
        tasks.started(platform.redis, "gate.1")
    kill_postgres(platform, own_pair)
    tasks.let_go(platform.redis, "gate.1", 3)
    assert submitter.value(sent) == "sent"
    assert chain.parent.get(timeout=60) == 11
    until(lambda: submitter.allocated_cpus() == "0", "what they held is free")
    postgres.start(Path(str(own_pair.data)) / "postgres", durable=False)
    assert chain.get(timeout=60) == 111
    assert submitter.value("published-2") == 1
    assert submitter.value(retried) == 2
    assert submitter.ended(retried).retries == 1
    assert submitter.outcomes(retried) == ["retried", "succeeded"]
    assert [submitter.ended(job).state for job in (chain.parent.id, chain.id, sent, "published-2")] == ["succeeded"] * 4
    assert submitter.jobs() == 5
    assert worker.alive


def test_the_chord_of_a_job_that_ended_before_it_started_hears_of_it(platform: Platform, speaker: Submitter) -> None:
    platform.worker("a", cpus=1)
    holder = speaker.send("tests.fixtures.tasks.hold", "gate")
    tasks.started(platform.redis, "gate")
    body: AsyncResult = chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], app=speaker.app)(total.s())
    revoked, other = body.parent.results
    speaker.app.control.revoke(revoked.id)
    with pytest.raises(TaskRevokedError):
        speaker.value(revoked.id)
    tasks.let_go(platform.redis, "gate")
    assert speaker.ended(other.id).state == "succeeded"
    # Celery raises the error of the body's part by way of the chord.
    with pytest.raises((ChordError, TaskRevokedError)):
        body.get(timeout=60)
    assert speaker.ended(holder).state == "succeeded"


def test_a_job_that_kills_its_process_each_time_fails_in_the_end(platform: Platform, speaker: Submitter) -> None:
    platform.worker("a", cpus=2)
    job = speaker.send("tests.tasks.speaking.dying")
    with pytest.raises(WorkerLostError):
        speaker.value(job)
    assert speaker.ended(job).state == "lost"
    assert speaker.outcomes(job) == ["lost"] * 3


@pytest.mark.parametrize("module", ["routing.errors", "celery_capacity"])
def test_error_in_a_result_has_its_type_whichever_version_stored_it(submitter: Submitter, module: str) -> None:
    backend = submitter.app.backend
    stored = backend.prepare_exception(LeaseLost("of 3.1"))
    assert stored["exc_module"] == "celery_capacity"
    error = backend.exception_to_python({**stored, "exc_module": module})
    assert (type(error), str(error)) == (LeaseLost, str(LeaseLost("of 3.1")))
