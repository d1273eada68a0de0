"""RabbitMQ, of Debian's package, as Celery's broker; the ledger is Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery, states
from celery.exceptions import TaskRevokedError
from sqlalchemy import text

from celery_capacity.routing.model.states import FINAL
from tests.fixtures import tasks
from tests.fixtures.jobs import garbage
from tests.fixtures.jobs.setting_aside import job_states, number_set_aside
from tests.fixtures.jobs.submitting import RESULT_WITHIN, Submitter, platform_with_broker
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.servers.rabbitmq import RabbitMQ, own_rabbitmq
from tests.fixtures.waiting import until

pytestmark = pytest.mark.installed

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
WHERE = "tests.tasks.routed.where"


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    with own_rabbitmq(tmp_path_factory.mktemp("broker") / "rabbitmq") as server:
        yield server


@pytest.fixture
def platform(request: pytest.FixtureRequest, rabbitmq: RabbitMQ, tmp_path: Path) -> Iterator[Platform]:
    with platform_with_broker(request.getfixturevalue("server_pair"), tmp_path, rabbitmq.url) as running:
        running.environment["PLATFORM_IMPORTS"] += ",tests.tasks.routed"
        yield running


@pytest.fixture
def old(rabbitmq: RabbitMQ, platform: Platform) -> Iterator[Celery]:
    """Yield an app of plain Celery, as a producer that knows nothing of the platform has it."""
    backend = platform.settings.redis_url
    with Celery("old", broker=rabbitmq.url, backend=backend, set_as_current=False) as app:
        # Confirmed messages are on RabbitMQ's disk, and survive its death.
        app.conf.broker_transport_options = {"confirm_publish": True}
        yield app


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_main_job_with_rabbitmq_as_the_broker(
    platform: Platform, submitter: Submitter, old: Celery, pool: Pool
) -> None:
    worker = platform.worker("a", 4, pool)
    jobs = [submitter.send(ADD, number, 1, cpus=1 + number % 4) for number in range(12)]
    assert [submitter.value(job) for job in jobs] == list(range(1, 13))
    assert submitter.app.control.ping(timeout=60.0, limit=1)
    packed = list(garbage.packed())
    plain = (b"garbage", b"[]", b"\xff")
    assert old.send_task(ADD, [40, 2], compression="gzip").get(timeout=RESULT_WITHIN) == 42
    with old.connection_for_write() as connection, connection.channel() as channel:
        for headers, body in packed:
            message = channel.prepare_message(body, 0, "application/json", "utf-8", headers)
            channel.basic_publish(message, exchange="", routing_key="celery")
        for body in plain:
            channel.basic_publish(channel.prepare_message(body), exchange="", routing_key="celery")
    before = submitter.view("a")["heartbeat_at"]
    platform.beat(PLATFORM_HEARTBEAT_INTERVAL="0.3")
    until(lambda: submitter.view("a")["heartbeat_at"] > before, "beat's tick is heard")
    until(
        lambda: number_set_aside(platform) == len(packed) + len(plain),
        lambda: f"what cannot be read is set aside: {number_set_aside(platform)}",
    )
    until(lambda: job_states(platform).keys() <= set(FINAL), "all is over")
    assert submitter.value(submitter.send(ADD, 1, 2)) == 3
    assert worker.alive


def test_queues_priorities_revokes_and_replies(platform: Platform, submitter: Submitter, old: Celery) -> None:
    """Priorities are as on Redis: 9 first over all queues, though most queues of RabbitMQ have none."""
    platform.environment["CELERY_RESULT_BACKEND"] = submitter.app.conf.result_backend = "rpc://"
    old.conf.result_backend = "rpc://"
    platform.worker("a", 1, "threads", arguments=("-Q", "celery,video"))
    holder = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    queues = {submitter.send(WHERE, priority=n, queue=q): q for n, q in enumerate(("celery", "video") * 5)}
    theirs = {
        old.send_task(WHERE, priority=8): "celery",
        old.send_task(WHERE, priority=1, queue="video"): "video",
    }
    unserved, unwanted = submitter.send(WHERE, queue="mail"), submitter.send(WHERE, queue="video", priority=9)
    jobs = [*queues, *(result.id for result in theirs)]
    for job in [*jobs, unserved, unwanted]:
        submitter.until(job, "waiting")
    for job in (unserved, unwanted):
        submitter.result(job).revoke()
        assert submitter.ended(job).state == "cancelled"
        with pytest.raises(TaskRevokedError):
            submitter.value(job)
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(holder) == "a"
    assert {job: submitter.value(job) for job in queues} == queues
    assert {result: result.get(timeout=RESULT_WITHIN) for result in theirs} == theirs
    rows = sorted((submitter.ended(job) for job in jobs), key=lambda row: row.started_at)
    assert [row.priority for row in rows] == [9, 8, 8, 7, 6, 5, 4, 3, 2, 1, 1, 0]
    assert {submitter.ended(result.id).queue for result in theirs} == {"celery", "video"}


def test_dying_worker_loses_neither_its_jobs_nor_those_to_be_enrolled(
    platform: Platform, submitter: Submitter, old: Celery, rabbitmq: RabbitMQ
) -> None:
    first = platform.worker("a", 1, "prefork")
    running = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    waiting = submitter.send(ADD, 1, 2)
    submitter.until(waiting, "waiting")
    with platform.engine.connect() as connection:
        # No row can be written: the worker has the message, and its job cannot be committed.
        connection.execute(text("LOCK TABLE jobs IN SHARE MODE"))
        sent = old.send_task(ADD, [40, 2])
        blocked = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'jobs'::regclass")
        until(lambda: connection.execute(blocked).scalar_one(), "the worker is about to write the job")
        assert rabbitmq.ready("celery") == 0
        first.kill()
        until(lambda: rabbitmq.ready("celery") == 1, "the message is there again: it was not acknowledged")
        assert submitter.row(sent.id) is None
    platform.worker("b", 1, "threads")
    assert sent.get(timeout=RESULT_WITHIN) == 42
    assert tasks.started(platform.redis, "gate")[0] == running
    tasks.let_go(platform.redis, "gate")
    assert (submitter.value(running), submitter.value(waiting)) == ("b", 3)
    expected = [["lost", "succeeded"], ["succeeded"]]

    def outcomes() -> list[list[str | None]]:
        return [submitter.outcomes(job) for job in (running, sent.id)]

    until(lambda: outcomes() == expected, lambda: f"the attempts ended as {expected}: {outcomes()}")
    assert rabbitmq.ready("celery") == 0


def test_jobs_wait_through_a_restart_of_the_broker(
    platform: Platform, submitter: Submitter, old: Celery, rabbitmq: RabbitMQ
) -> None:
    workers = [platform.worker("a", 1, "prefork"), platform.worker("b", 1, "threads")]
    running = [submitter.send(HOLD, "gate") for _ in workers]
    for _ in running:
        tasks.started(platform.redis, "gate")
    waiting = [submitter.send(ADD, number, 0) for number in range(6)]
    # A message that no worker serves waits in RabbitMQ, on its disk.
    unserved = old.send_task(ADD, [40, 2], queue="unserved")
    assert rabbitmq.ready("unserved") == 1
    rabbitmq.kill()
    for worker in workers:
        worker.wait_for("Cannot connect to amqp://")
    # Submissions need no broker, and running jobs go on.
    waiting += [submitter.send(ADD, number, 0) for number in range(6, 9)]
    tasks.let_go(platform.redis, "gate", len(running))
    rabbitmq.start()
    assert [submitter.value(job) for job in waiting] == list(range(9))
    every = [submitter.ended(job).id for job in [*running, *waiting]]
    assert {tuple(submitter.outcomes(job)) for job in every} == {("succeeded",)}
    assert unserved.state == states.PENDING
    # Remote control and old producers are heard again.
    control = submitter.app.control
    # The connection is new. For a dead connection in its pool Celery raises an error in the next user of it.
    with submitter.app.connection_for_write() as fresh:
        until(
            lambda: len(control.ping(timeout=2.0, limit=len(workers), connection=fresh)) == len(workers),
            "all workers answer",
        )
        control.add_consumer("unserved", connection=fresh)
    assert unserved.get(timeout=RESULT_WITHIN) == 42
    assert old.send_task(ADD, [1, 1]).get(timeout=RESULT_WITHIN) == 2
    assert all(worker.alive for worker in workers)
