"""Shortage of each worker for a request, and the smallest set of running jobs whose ends make room."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any, Final

import pytest

from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy import missing
from celery_capacity.routing.policy.missing import Missing, Room, Running, Unblocking, missing_on_each, unblocked_by
from celery_capacity.routing.policy.placement import Book, fits

ASKED: Final = Request.of({"cpus": 4000, "memory": 2**30})


def book(name: str, free: int, *, cpus: int = 8000, admitting: bool = True, **more: Any) -> Book:
    capacity = {"cpus": cpus, "memory": 2**32, "slots": 8}
    return Book(name, capacity, {"cpus": cpus - free, "slots": 1}, admitting, **more)


def test_closest_worker_comes_first_and_one_that_admits_nothing_last() -> None:
    workers = [book("a", 1000), book("b", 3000), book("c", 8000, admitting=False), book("d", 3000)]
    assert [line.worker for line in missing_on_each(ASKED, workers)] == ["b", "d", "a", "c"]


def test_missing_has_a_room_for_each_resource_of_the_request() -> None:
    (line,) = missing_on_each(ASKED, [book("a", 1000)])
    cpus, memory = Room("cpus", 4000, 1000, 8000), Room("memory", 2**30, 2**32, 2**32)
    assert line == Missing("a", True, (cpus, memory, Room("slots", 1, 7, 8)))
    assert (cpus.enough, memory.enough) == (False, True)


def test_worker_that_does_not_know_the_task_is_not_listed() -> None:
    workers = [book("a", 1000, tasks=frozenset({"tasks.other"})), book("b", 1000)]
    assert [line.worker for line in missing_on_each(ASKED, workers, "tasks.render")] == ["b"]


def test_worker_that_is_kept_for_a_job_is_listed_as_such() -> None:
    (line,) = missing_on_each(ASKED, [book("a", 8000, kept="alone=1,cpus=1,slots=1")])
    assert line.alone


def running(job: str, since: float, **amounts: int) -> Running:
    return Running(job, Request.of(amounts), since)


def holding(name: str, jobs: list[Running], **capacity: int) -> Book:
    worker = Book(name, {"slots": 8, **capacity}, {})
    for job in jobs:
        worker = worker.holding(job.request)
    return worker


def test_smallest_set_is_taken_though_its_jobs_are_younger() -> None:
    small = [running("old-1", 1, cpus=1000), running("old-2", 2, cpus=1000)]
    large = [running("young", 9, cpus=2000)]
    workers = [holding("a", small, cpus=2000), holding("b", large, cpus=2000)]
    asked = Request.of({"cpus": 2000})
    assert unblocked_by(asked, workers, {"a": small, "b": large}) == Unblocking("b", ("young",))


def test_oldest_job_is_taken_of_those_that_make_room() -> None:
    jobs = [running("second", 2, cpus=1000), running("first", 1, cpus=1000)]
    assert unblocked_by(Request.of({"cpus": 1000}), [holding("a", jobs, cpus=2000)], {"a": jobs}) == Unblocking(
        "a", ("first",)
    )


def test_job_that_must_run_alone_waits_for_all_jobs_of_a_worker() -> None:
    jobs = [running("first", 1, cpus=1000), running("second", 2, cpus=1000)]
    asked = Request.of({"cpus": 1000, "alone": 1})
    assert unblocked_by(asked, [holding("a", jobs, cpus=8000)], {"a": jobs}) == Unblocking("a", ("first", "second"))


@pytest.mark.parametrize("admitting", [True, False])
def test_worker_that_is_too_small_or_admits_nothing_unblocks_nothing(admitting: bool) -> None:
    jobs = [running("first", 1, cpus=1000)]
    worker = Book("a", {"slots": 8, "cpus": 1000 if admitting else 9000}, {"cpus": 1000, "slots": 1}, admitting)
    assert unblocked_by(Request.of({"cpus": 9000}), [worker], {"a": jobs}) is None


def test_unblocking_set_equals_that_of_a_brute_force_oracle() -> None:
    chance = random.Random(19)
    for _ in range(1000):
        jobs: dict[str, list[Running]] = {}
        workers = []
        for name in "abc":
            jobs[name] = [
                running(f"{name}{n}", chance.randint(0, 5), cpus=chance.randint(0, 3), memory=chance.randint(0, 3))
                for n in range(chance.randint(0, 5))
            ]
            worker = holding(name, jobs[name], cpus=8, memory=8)
            workers.append(worker)
        asked = Request.of({"cpus": chance.randint(1, 9), "memory": chance.randint(1, 9)})
        sets = [
            (size, sorted(job.since for job in chosen), worker, chosen)
            for worker in workers
            for size in range(1, 6)
            for chosen in combinations(jobs[worker.worker], size)
            if fits(asked, released(worker, chosen)) is None
        ]
        unblocking = unblocked_by(asked, workers, jobs)
        if not sets:
            assert unblocking is None
            continue
        assert unblocking is not None
        size, ages, name = min((size, ages, worker.worker) for size, ages, worker, _ in sets)
        since = {job.job: job.since for job in jobs[name]}
        assert (len(unblocking.jobs), [since[job] for job in unblocking.jobs]) == (size, ages)
        assert unblocking.worker == name


def released(worker: Book, jobs: Any) -> Book:
    for job in jobs:
        worker = worker.without(job.request)
    return worker


def test_set_beyond_the_limit_makes_room_and_has_no_needless_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missing, "MAX_SETS", 3)
    jobs = [running(f"job-{n}", n, cpus=100 * n, memory=7 * (9 - n)) for n in range(1, 9)]
    worker = holding("a", jobs, cpus=3600, memory=300)
    asked = Request.of({"cpus": 1500, "memory": 150})
    unblocking = unblocked_by(asked, [worker], {"a": jobs})
    assert unblocking is not None
    chosen = [job for job in jobs if job.job in unblocking.jobs]
    assert fits(asked, released(worker, chosen)) is None
    for job in chosen:
        assert fits(asked, released(worker, [other for other in chosen if other is not job])) is not None
