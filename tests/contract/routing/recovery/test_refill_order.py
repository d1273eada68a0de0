"""The head of the backlog changes no order: neither between jobs of a shape, nor when each is fetched in time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect import verify
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.policy.placement import SHAPES, order
from celery_capacity.routing.recovery import controls
from tests.fixtures.stores.headed import Head

#: Workers of the property tests, by name with their millicores.
WORKERS: Final = {"a": 1000, "b": 2000, "c": 3000}
#: A step: a job of a priority and of a size comes, or one of the running jobs ends.
COMES: Final = st.tuples(st.sampled_from([0, 0, 0, 5, 9]), st.sampled_from([1000, 1000, 2000]))
STEPS: Final = st.lists(st.one_of(COMES, st.integers(0, 5)), min_size=4, max_size=40)
#: Steps, and after which of them jobs are fetched.
FETCHED: Final = st.lists(st.tuples(st.one_of(COMES, st.integers(0, 5)), st.booleans()), min_size=4, max_size=40)


class Course:
    """Steps on several workers, with a limit of the ledger's backlog (0: none)."""

    def __init__(self, engine: Engine, settings: Settings, most: int) -> None:
        # Nobody beats for the workers, and a course may take longer than their leases.
        self.stage = Head(engine, replace(settings, max_ledger_backlog=most, worker_ttl=600.0, lost_after=900.0))
        self.stage.sql("TRUNCATE jobs, attempts")
        self.stage.redis.flushdb()
        self.stage.ledger.open_epoch(self.stage.ledger.epoch)
        self.stage.ledger.finish_epoch(self.stage.ledger.epoch)
        for name, cpus in WORKERS.items():
            self.stage.worker(name, cpus=cpus)
        #: Order and size of each job that came.
        self.came: dict[str, tuple[int, int]] = {}
        #: Jobs with their workers, in the order of their starts.
        self.started: list[tuple[str, str]] = []

    def step(self, step: Any, *, fetch: bool) -> list[str]:
        """Take a step; return the jobs that started by it."""
        if isinstance(step, tuple):
            priority, cpus = step
            job = self.stage.add(priority, cpus)
            self.came[job] = order(priority, self.stage.row(job).seq), cpus
        elif running := self._running():
            job = running[step % len(running)]
            self.stage.start(job)
            self.stage.end(job)
        if fetch:
            self.stage.refill()
        held = self._held()
        new = [job for job in sorted(held) if (job, held[job]) not in self.started]
        self.started += [(job, held[job]) for job in new]
        return new

    def drain(self) -> None:
        """End all jobs, in turn from the last start and from the first."""
        for number in range(2 * len(self.came)):
            self.step(-(number % 2), fetch=True)
        assert sorted(job for job, _ in self.started) == sorted(self.came)
        assert verify.check(self.stage.engine, self.stage.redis, at_rest=True, patience=0).lines() == []
        assert not self.stage.ledger.borders()

    def _held(self) -> dict[str, str]:
        client: Any = self.stage.redis
        return {job.decode(): worker for worker in WORKERS for job in client.hkeys(keys.held(worker))}

    def _running(self) -> list[str]:
        held = self._held()
        return [job for job, _ in self.started if job in held]


SLOW: Final = hypothesis_settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def taken(course: Course, steps: list[Any]) -> list[tuple[str, str]]:
    """Take steps, and end all jobs; return the starts."""
    for step in steps:
        course.step(step, fetch=True)
    course.drain()
    course.stage.close()
    return course.started


@SLOW
@given(STEPS)
def test_jobs_start_in_the_order_of_an_unlimited_ledger(
    short_head: None, engine: Engine, settings: Settings, steps: list[Any]
) -> None:
    """Several workers, several priorities, and ends in any order: each job starts when and where it would without."""
    limited, unlimited = (taken(Course(engine, settings, most), steps) for most in (1, 0))
    assert limited == unlimited


@SLOW
@given(FETCHED)
def test_no_job_overtakes_one_of_its_shape_however_late_it_is_fetched(
    short_head: None, engine: Engine, settings: Settings, steps: list[tuple[Any, bool]]
) -> None:
    course = Course(engine, settings, 1)
    for step, fetch in steps:
        waiting = {job: place for job, place in course.came.items() if job not in dict(course.started)}
        for job in course.step(step, fetch=fetch):
            place, cpus = course.came[job]
            waiting.pop(job, None)
            earlier = [other for other, (at, size) in waiting.items() if size == cpus and at < place]
            assert set(earlier) <= set(dict(course.started)), (job, earlier)
    course.drain()
    course.stage.close()


def test_flood_of_a_tenant_delays_the_first_start_of_no_other(
    short_head: None, engine: Engine, settings: Settings
) -> None:
    """More shapes of the flood wait than a script looks at, and most of its jobs are in Postgres alone."""
    course = Course(engine, settings, 1)

    def come(tenant: str, memory: int) -> str:
        job = course.stage.insert({"cpus": 1000, "memory": memory}, tenant=tenant)
        course.stage.bring(job)
        course.stage.apply()
        course.came[job] = 0, 1000
        return job

    flood = [come("flood", 1 + number % (SHAPES + 6)) for number in range(3 * (SHAPES + 6))]
    course.stage.refill()
    controls.refresh_shares(engine, course.stage.ledger)
    assert sum(course.stage.staying().values()) > len(flood) // 4
    course.step(0, fetch=True)
    assert len(course.started) == sum(WORKERS.values()) // 1000
    first = come("other", SHAPES + 10)
    assert course.step(0, fetch=False) == [first]
    course.drain()
    course.stage.close()
