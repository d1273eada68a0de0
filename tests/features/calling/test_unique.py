"""`unique=` and `unique_for=` with a worker: one job of equal ones, and the answer to the submitter of the second."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import signals
from celery.beat import Scheduler
from celery.result import AsyncResult
from sqlalchemy import event, text

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.tasks import gated


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("unique"), gated.__name__) as running:
        running.worker("a", cpus=4, pool="threads")
        yield running


def test_whoever_submits_the_second_one_gets_the_result_of_the_first(platform: Platform, submitter: Submitter) -> None:
    only = submitter.app.tasks[gated.only.name]
    before = submitter.jobs()
    first = only.delay("gate")
    tasks.started(platform.redis, "gate")
    # The first job runs, and is not over.
    again = only.s("gate").apply_async()
    mine = only.apply_async(("gate",), task_id="mine")
    assert isinstance(again, AsyncResult)
    assert (again.id, mine.id) == (first.id, first.id)
    other = only.delay("another gate")
    tasks.let_go(platform.redis, "another gate")
    assert other.get(timeout=60) == "another gate"
    tasks.let_go(platform.redis, "gate")
    assert (first.get(timeout=60), again.get(timeout=60)) == ("gate", "gate")
    assert submitter.ended(first.id).state == "succeeded"
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(only.delay("gate").id) == "gate"
    assert submitter.jobs() == before + 3


def test_whoever_has_the_result_of_the_first_submits_another(platform: Platform, submitter: Submitter) -> None:
    only, before = submitter.app.tasks[gated.only.name], submitter.jobs()
    engine, looked = submitter.app.platform.engine, threading.Event()

    @event.listens_for(engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "FROM jobs WHERE id" in statement:
            looked.set()

    first = only.delay("gate")
    tasks.started(platform.redis, "gate")
    with ThreadPoolExecutor(1) as pool, platform.engine.connect() as connection, connection.begin() as locking:
        # The job's end cannot be written.
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": first.id})
        tasks.let_go(platform.redis, "gate")
        assert first.get(timeout=60) == "gate"
        second = pool.submit(only.delay, "gate")
        assert looked.wait(60)
        assert not second.done()
        locking.rollback()
        assert second.result(timeout=60).id != first.id
    event.remove(engine, "before_cursor_execute", note)
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(second.result().id) == "gate"
    for _ in range(20):
        tasks.let_go(platform.redis, "gate")
        assert only.delay("gate").get(timeout=60) == "gate"
    assert submitter.jobs() == before + 22


def test_a_call_says_otherwise_than_its_task(platform: Platform, submitter: Submitter) -> None:
    only = submitter.app.tasks[gated.only.name]
    ids = {only.apply_async(("gate",), unique=unique).id for unique in (True, False, "a text", "a text")}
    assert len(ids) == 3
    tasks.let_go(platform.redis, "gate", 3)
    assert {submitter.value(job) for job in ids} == {"gate"}


def test_a_job_that_is_unique_retries(submitter: Submitter) -> None:
    job = submitter.send(gated.only_again.name)
    assert submitter.value(job) == 1
    assert submitter.ended(job).retries == 1
    assert submitter.outcomes(job) == ["retried", "succeeded"]


def test_what_a_task_publishes_is_unique_too_and_waits_for_others(submitter: Submitter) -> None:
    first, again, last = submitter.value(submitter.send(gated.twice.name))
    assert first == again != last
    assert (submitter.value(first), submitter.value(last)) == (2, 4)
    assert submitter.ended(first).finished_at <= submitter.ended(last).started_at


def test_a_signature_carries_it_and_a_canvas_refuses_it(submitter: Submitter) -> None:
    once = submitter.app.signature(gated.unlimited.name).set(unique="signed", unique_for=60)
    first = once.apply_async()
    submitter.ended(first.id)
    assert once.apply_async().id == first.id
    with pytest.raises(ValueError, match="cannot be unique"):
        (once | submitter.app.signature("celery.accumulate")).apply_async()


def test_a_tick_is_skipped_while_the_last_run_goes_on(platform: Platform, submitter: Submitter) -> None:
    """Ticks of an entry with the option `unique` make no second job until the last run has ended."""
    scheduler: Any = Scheduler(app=submitter.app, lazy=True)
    entry = scheduler.Entry(
        name="often",
        task="tests.fixtures.tasks.hold",
        schedule=1.0,
        args=("tick",),
        options={"unique": True},
        app=submitter.app,
    )
    before = submitter.jobs()
    ticks = [scheduler.apply_async(entry).id for _ in range(3)]
    assert (len(set(ticks)), submitter.jobs()) == (1, before + 1)
    tasks.let_go(platform.redis, "tick")
    submitter.ended(ticks[0])
    tasks.let_go(platform.redis, "tick")
    assert submitter.ended(scheduler.apply_async(entry).id).state == "succeeded"
    assert submitter.jobs() == before + 2


def test_signals_tell_what_was_published(submitter: Submitter) -> None:
    heard: list[str] = []

    def asked(**_: Any) -> None:
        heard.append("before")

    def published(**_: Any) -> None:
        heard.append("after")

    signals.before_task_publish.connect(asked)
    signals.after_task_publish.connect(published)
    try:
        ids = {submitter.send(gated.unlimited.name, unique="told", unique_for=60) for _ in range(2)}
    finally:
        signals.before_task_publish.disconnect(asked)
        signals.after_task_publish.disconnect(published)
    assert heard == ["before", "after", "before"]
    submitter.ended(ids.pop())
    # Nobody listens for the result of an id without a job.
    consumer: Any = submitter.app.backend.result_consumer
    assert {key.decode().rpartition("-meta-")[2] for key in consumer.subscribed_to} & ids == set()
