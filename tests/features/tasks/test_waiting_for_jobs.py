"""Waiting for jobs in asyncio programs: `job.wait(state)` and `job.events()`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event, text

import celery_capacity
from celery_capacity import AsyncJob, InvalidRequest, JobEvent, PlatformError
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.ledger import keys
from celery_capacity.workers.process.job_watcher import NAME
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD, FAIL, HOLD = (f"tests.fixtures.tasks.{name}" for name in ("add", "fail", "hold"))
AGAIN = "tests.tasks.canvas.again_by_itself"
#: Seconds that no test comes near.
LONG = 30.0


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("waiting"), "tests.tasks.canvas") as running:
        running.worker("a", cpus=2, pool="threads", slots=4)
        yield running


def watched(submitter: Submitter, job: str) -> AsyncJob:
    return celery_capacity.job(job, app=submitter.app).aio


@pytest.fixture
def looks(submitter: Submitter) -> Iterator[list[str]]:
    """Yield the statements by which this process looks at a job in Postgres."""
    statements: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "FROM jobs" in statement:
            statements.append(statement)

    engine = submitter.app.platform.engine
    event.listen(engine, "before_cursor_execute", note)
    yield statements
    event.remove(engine, "before_cursor_execute", note)


def listening(platform: Platform) -> list[dict[str, Any]]:
    database = str(platform.redis.connection_pool.connection_kwargs["db"])
    clients: Any = platform.redis.client_list(_type="pubsub")
    return [client for client in clients if client["name"] == NAME and client["db"] == database]


async def all_of(job: AsyncJob, begun: asyncio.Event | None = None) -> list[JobEvent]:
    events = []
    async for seen in job.events():
        events.append(seen)
        if begun is not None:
            begun.set()
    return events


def test_a_job_s_states_are_told_as_they_come(submitter: Submitter, platform: Platform, looks: list[str]) -> None:
    first = submitter.send(HOLD, "first", cpus=2)
    tasks.started(platform.redis, "first")
    second = watched(submitter, submitter.send(HOLD, "second", cpus=2))

    async def follow() -> list[JobEvent]:
        seen = asyncio.create_task(all_of(second))
        assert (await second.wait("waiting", timeout=LONG)).state == "waiting"
        with pytest.raises(TimeoutError):
            await second.wait("running", timeout=0.05)
        running = asyncio.create_task(second.wait("running", timeout=LONG))
        await watched(submitter, first).wait("running", timeout=LONG)
        tasks.let_go(platform.redis, "first")
        assert (await running).worker == "a"
        tasks.let_go(platform.redis, "second")
        ended = await second.wait(timeout=LONG)
        assert (ended.state, ended.final, ended.attempt) == ("succeeded", True, 1)
        events = await seen
        # Each of the six waits looks once, and hears the rest.
        assert len(looks) <= 6
        return events

    events = asyncio.run(follow())
    assert [seen.state for seen in events] in (
        ["waiting", "running", "succeeded"],
        ["waiting", "admitted", "running", "succeeded"],
    )
    times = [seen.at for seen in events if seen.at is not None]
    assert times == sorted(times)
    assert len(times) >= 2
    assert {seen.job for seen in events} == {second.id}


def test_what_has_ended_is_told_at_once_and_waits_for_nothing(submitter: Submitter) -> None:
    job = submitter.send(FAIL, "no")
    submitter.ended(job)
    result = submitter.result(job)
    ending = asyncio.run(celery_capacity.job(result).aio.wait("running", timeout=LONG))
    assert (ending.state, ending.job) == ("failed", job)
    assert [seen.state for seen in asyncio.run(all_of(watched(submitter, job)))] == ["failed"]
    assert asyncio.run(watched(submitter, job).now()).final


def test_a_retry_is_another_attempt_and_a_revoke_an_end(submitter: Submitter) -> None:
    again = submitter.send(AGAIN, countdown=3)
    put_off = submitter.send(ADD, 1, 2, countdown=3600)

    async def follow() -> tuple[list[JobEvent], list[JobEvent]]:
        begun = asyncio.Event()
        both = asyncio.gather(all_of(watched(submitter, again)), all_of(watched(submitter, put_off), begun))
        await begun.wait()
        assert (await watched(submitter, put_off).wait("scheduled", timeout=LONG)).state == "scheduled"
        await asyncio.to_thread(submitter.app.control.revoke, put_off)
        first, second = await asyncio.wait_for(both, LONG)
        return first, second

    retried, revoked = asyncio.run(follow())
    assert [seen.state for seen in revoked] == ["scheduled", "cancelled"]
    assert (retried[0].state, retried[-1].state, retried[-1].attempt) == ("scheduled", "failed", 2)
    assert [seen.attempt for seen in retried if seen.state == "running"] == [1, 2]


def test_a_job_that_is_cancelled_since_one_that_it_needs_failed_has_ended(submitter: Submitter) -> None:
    needed = submitter.send(FAIL, "no", countdown=0.5)
    withdrawn = submitter.send(ADD, 1, 2, countdown=3600)
    left = [watched(submitter, submitter.send(ADD, 1, 2, after=dependency)) for dependency in (needed, withdrawn)]
    left.append(watched(submitter, submitter.send(ADD, 1, 2, after=left[0].id)))

    async def follow() -> list[JobEvent]:
        waiting = [asyncio.create_task(dependent.wait(timeout=LONG)) for dependent in left]
        await watched(submitter, needed).wait(timeout=LONG)
        await asyncio.to_thread(submitter.app.control.revoke, withdrawn)
        return await asyncio.gather(*waiting)

    assert [seen.state for seen in asyncio.run(follow())] == ["cancelled"] * 3


def test_all_that_a_process_watches_shares_one_connection(submitter: Submitter, platform: Platform) -> None:
    jobs = [watched(submitter, submitter.send(HOLD, "many", cpus=0.5)) for _ in range(8)]

    async def follow() -> list[JobEvent]:
        waits = [asyncio.create_task(job.wait(timeout=LONG)) for job in (*jobs, *jobs)]
        await asyncio.gather(*(job.wait("running", timeout=LONG) for job in jobs[:4]))
        assert len(listening(platform)) == 1
        tasks.let_go(platform.redis, "many", 8)
        return await asyncio.gather(*waits)

    assert {seen.state for seen in asyncio.run(follow())} == {"succeeded"}
    # Another thread of the program may wait in another loop.
    assert asyncio.run(jobs[0].wait(timeout=LONG)).final


def test_after_a_gap_the_job_is_looked_at_again(
    submitter: Submitter, platform: Platform, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = watched(submitter, submitter.send(HOLD, "gap", cpus=1))

    async def follow() -> JobEvent:
        ended = asyncio.create_task(job.wait(timeout=LONG))
        await job.wait("running", timeout=LONG)
        before = len(looks)
        for client in listening(platform):
            platform.redis.client_kill_filter(_id=client["id"])
        # Between the two connections the program looks, and then listens again.
        await asyncio.to_thread(until, lambda: len(looks) > before and listening(platform), "it listens again")
        tasks.let_go(platform.redis, "gap")
        return await ended

    assert asyncio.run(follow()).state == "succeeded"


def test_job_that_ended_is_awaited_while_the_ledger_is_left_alone(
    submitter: Submitter, platform: Platform, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = watched(submitter, submitter.send(HOLD, "unwritten", cpus=1))
    sending = submitter.app.platform.sending

    async def follow() -> JobEvent:
        await job.wait("running", timeout=LONG)
        with platform.engine.begin() as connection:
            # Postgres hears of the end only after the message on the job's channel and the look below.
            connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": job.id})
            first = asyncio.create_task(job.wait(timeout=LONG))
            tasks.let_go(platform.redis, "unwritten")
            assert (await first).final
            monkeypatch.setattr(sending, "ask", lambda _: None)
            before = len(looks)
            ended = asyncio.create_task(job.wait(timeout=LONG))
            await asyncio.to_thread(until, lambda: len(looks) > before, "it looked in Postgres")
        return await ended

    assert asyncio.run(follow()).state == "succeeded"


def test_what_nobody_told_is_seen_when_a_new_epoch_is(submitter: Submitter, platform: Platform) -> None:
    job = watched(submitter, submitter.send(ADD, 1, 2, countdown=3600))

    async def follow() -> JobEvent:
        ended = asyncio.create_task(job.wait(timeout=LONG))
        await job.wait("scheduled", timeout=LONG)
        # Postgres ends the job like this while it decides.
        with platform.engine.begin() as connection:
            query = "UPDATE jobs SET state = 'expired', finished_at = now(), step = 12 WHERE id = :id"
            connection.execute(text(query), {"id": job.id})
        platform.redis.publish(keys.EPOCH, "2")
        return await ended

    assert asyncio.run(follow()).state == "expired"


def test_what_cannot_be_waited_for_is_refused(submitter: Submitter) -> None:
    with pytest.raises(InvalidRequest, match="there is no job nobody"):
        asyncio.run(watched(submitter, "nobody").wait(timeout=LONG))
    with pytest.raises(InvalidRequest, match="state 'done' is not valid"):
        asyncio.run(watched(submitter, "nobody").wait("done"))
    with pytest.raises(InvalidRequest, match="task_id"):
        watched(submitter, "a b")
    from celery import Celery

    with pytest.raises(PlatformError, match="not on the platform"):
        celery_capacity.job("x", app=Celery("plain", set_as_current=False))
