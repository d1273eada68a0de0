"""Which job is admitted to which worker, and when: real workers and real jobs, held and released by the test."""

from __future__ import annotations

import random
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.states import State
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.stores.books import job_field
from tests.fixtures.waiting import until
from tests.tasks.work import peaks, read, starts

HOLD = "tests.fixtures.tasks.hold"
ADD = "tests.fixtures.tasks.add"
WORK = "tests.tasks.work"

#: Intervals so long that no timer and no duty does anything while a test runs.
NO_TIMERS: dict[str, Any] = {
    "PLATFORM_RENEW_INTERVAL": "50",
    "PLATFORM_WORKER_TTL": "600",
    "PLATFORM_LOST_AFTER": "700",
    "PLATFORM_START_TIMEOUT": "300",
    "PLATFORM_DUE_INTERVAL": "300",
    "PLATFORM_SWEEP_INTERVAL": "300",
    "PLATFORM_RECONCILE_INTERVAL": "300",
}


def hold(platform: Platform, submitter: Submitter, gate: str, cpus: float, **options: Any) -> tuple[str, str]:
    """Return a job that runs now, and the worker that it was admitted to."""
    job = submitter.send(HOLD, gate, cpus=cpus, **options)
    assert tasks.started(platform.redis, gate)[0] == job
    worker: Any = job_field(platform.redis, job, "worker")
    return job, worker.decode()


def waits(platform: Platform, job: str) -> bool:
    return bool(job_field(platform.redis, job, "state") == b"waiting")


# -- where


def test_the_worker_with_the_least_left_over_is_taken(platform: Platform, submitter: Submitter) -> None:
    for name, cpus in (("large", 8), ("small", 4), ("middle", 6)):
        platform.worker(name, cpus, "threads")
    taken = [hold(platform, submitter, "gate", cpus)[1] for cpus in (4, 5, 0.5, 1, 7, 0.5)]
    # small has room for 4, middle for 5 of 6, then for 0.5 of the 1 left; 1 fits only into large; 7 of its 7; then the
    # last 0.5
    assert taken == ["small", "middle", "middle", "large", "large", "middle"]
    assert submitter.allocated_cpus() == "18"
    tasks.let_go(platform.redis, "gate", 6)
    until(lambda: submitter.allocated_cpus() == "0", "all is given back")


# -- when


def test_a_release_admits_the_next_at_once_without_any_duty(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 4, "threads", **NO_TIMERS)
    platform.worker("b", 1, "prefork", **NO_TIMERS)
    hold(platform, submitter, "gate", 4)
    hold(platform, submitter, "gate", 1)
    jobs = [submitter.send(HOLD, "gate", cpus=cpus) for cpus in (4, 1, 4, 2, 1, 2, 0.5, 3)]
    tasks.let_go(platform.redis, "gate", 10)
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}
    assert all(len(submitter.attempts(job)) == 1 for job in jobs)


def test_a_worker_that_registers_takes_what_waits(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 1, "threads", **NO_TIMERS)
    hold(platform, submitter, "gate", 1)
    jobs = [submitter.send(HOLD, "gate", cpus=2) for _ in range(3)]
    assert all(waits(platform, job) for job in jobs)
    second = platform.worker("b", 4, "threads", **NO_TIMERS)
    assert "2 waiting jobs were admitted" in second.wait_for("published")
    assert {tasks.started(platform.redis, "gate")[0] for _ in range(2)} == set(jobs[:2])
    assert waits(platform, jobs[2])
    tasks.let_go(platform.redis, "gate", 4)
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}


def test_a_worker_that_grows_takes_what_waits(platform: Platform, submitter: Submitter) -> None:
    # The worker's own timer looks at its size. The sweep would help as well, so it does not run.
    platform.worker("a", 4, "prefork", slots=1, **{**NO_TIMERS, "PLATFORM_RENEW_INTERVAL": "0.3"})
    hold(platform, submitter, "gate", 1)
    jobs = [submitter.send(HOLD, "gate", cpus=1) for _ in range(2)]
    assert all(waits(platform, job) for job in jobs)
    submitter.app.control.pool_grow(2)
    until(lambda: submitter.allocated_cpus() == "3", "both are admitted")
    assert submitter.view("a")["slots"] == "3"
    # Celery looks for the new processes only every five seconds.
    assert {tasks.started(platform.redis, "gate")[0] for _ in range(2)} == set(jobs)
    tasks.let_go(platform.redis, "gate", 3)
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}


# -- how much


def test_the_allocated_cpus_are_exact_after_each_step(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 4, "threads", **NO_TIMERS)
    assert submitter.allocated_cpus() == "0"
    jobs = []
    for cpus, sum_ in ((0.5, "0.5"), (1.25, "1.75"), (2, "3.75"), (0.001, "3.751"), (0, "3.751")):
        jobs.append(submitter.send(HOLD, f"gate {cpus}", cpus=cpus))
        # No waiting is needed: the admission and the sum are one step.
        assert submitter.allocated_cpus() == sum_
        assert submitter.view("a")["allocated_cpus"] == sum_
    for cpus, sum_ in ((2, "1.751"), (0.5, "1.251"), (0, "1.251"), (1.25, "0.001"), (0.001, "0")):
        tasks.let_go(platform.redis, f"gate {cpus}")
        job = next(job for job, asked in zip(jobs, (0.5, 1.25, 2, 0.001, 0), strict=True) if asked == cpus)
        submitter.ended(job)
        assert submitter.allocated_cpus() == sum_
        assert submitter.view("a")["allocated_cpus"] == sum_


class Sampler(threading.Thread):
    """Look at the books as fast as possible: the figures of one moment must add up."""

    def __init__(self, platform: Platform, capacity: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self._redis = platform.redis
        self._capacity = capacity
        self._ending = threading.Event()
        self.samples = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self._ending.wait(0.002):
            pipe = self._redis.pipeline(transaction=True)
            pipe.get(keys.ALLOCATED_CPUS)
            for worker in self._capacity:
                pipe.hget(keys.book(worker), "a.cpus")
            shown, *parts = pipe.execute()
            allocated = {worker: int(part or 0) for worker, part in zip(self._capacity, parts, strict=True)}
            self.samples += 1
            if round(float(shown or 0) * 1000) != sum(allocated.values()):
                self.wrong.append(f"{shown} CPUs are shown, {allocated} allocated")
            self.wrong += [
                f"{worker}: {allocated[worker]} of {most}"
                for worker, most in self._capacity.items()
                if allocated[worker] > most
            ]

    def stop(self) -> None:
        self._ending.set()
        self.join()


def test_many_jobs_from_many_submitters_never_exceed_any_capacity(
    platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    capacity = {"a": 3000, "b": 8000, "c": 5500}
    platform.environment["PLATFORM_IMPORTS"] += f",{WORK}"
    for name, millicores in capacity.items():
        platform.worker(name, millicores / 1000, "threads", slots=12)
    trace, seed = tmp_path / "trace", 4339
    source = random.Random(seed)
    asked = [source.choice([1, 250, 500, 1000, 1500, 2000, 3000, 5500, 8000]) for _ in range(160)]
    sampler = Sampler(platform, capacity)
    sampler.start()
    jobs: list[str] = []

    def submit(part: list[tuple[int, int]]) -> None:
        for number, millicores in part:
            arguments = (str(trace), str(number), 0.02, millicores)
            jobs.append(submitter.send(f"{WORK}.work", *arguments, cpus=millicores / 1000, priority=number % 10))

    numbered = list(enumerate(asked))
    submitters = [threading.Thread(target=submit, args=(numbered[first::8],)) for first in range(8)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}
    sampler.stop()
    assert (sampler.wrong, sampler.samples > 10) == ([], True)
    events = read(trace)
    assert starts(events) == {str(number): 1 for number in range(len(asked))}
    assert all(most <= capacity[worker] for worker, most in peaks(events).items()), (seed, peaks(events))
    assert submitter.allocated_cpus() == "0"


def test_jobs_that_ended_before_any_worker_came_never_run(platform: Platform, submitter: Submitter) -> None:
    revoked, expired, kept = (
        submitter.send(ADD, 1, 1),
        submitter.send(ADD, 1, 2, expires=0.1),
        submitter.send(ADD, 1, 3),
    )
    submitter.app.control.revoke(revoked)
    # The ledger was never opened, so nobody can say yet whether a worker holds the job. The job's row is marked.
    assert submitter.row(revoked).revoked_at is not None
    until(lambda: submitter.row(expired).expires_at < datetime.now(UTC), "it is too late for one")
    platform.worker("a", 1, "solo")
    assert submitter.value(kept) == 4
    assert submitter.ended(expired).state == State.EXPIRED
    assert submitter.ended(revoked).state == State.CANCELLED
    until(lambda: submitter.result(revoked).state == "REVOKED", "its result says so")
    assert submitter.attempts(revoked) == []


def test_without_a_worker_jobs_are_accepted_and_wait(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(ADD, 1, 2)
    assert submitter.row(job).state == State.ACCEPTED
    platform.worker("a", 1, "solo", **NO_TIMERS)
    assert submitter.value(job) == 3
    assert submitter.ended(job).attempt == 1
