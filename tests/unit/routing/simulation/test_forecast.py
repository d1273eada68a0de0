"""The estimated start of a job is its start in a replay, where all run times are known and no job comes later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Book, Waiting, order
from celery_capacity.routing.policy.reservation import Held, Rules
from celery_capacity.routing.simulation import forecast as module
from celery_capacity.routing.simulation.expectations import Unknown
from celery_capacity.routing.simulation.forecast import (
    Cluster,
    Estimate,
    NoEstimate,
    estimate,
    forecast,
    running_until,
)
from celery_capacity.routing.simulation.jobs import Queued, Running
from celery_capacity.routing.simulation.simulation import Simulation

#: Time at which the clusters of these tests are copied.
NOW = 1_000_000
GREEDY, EASY = Rules(0), Rules(1, reserve_after=10**12)


class Job(NamedTuple):
    """A job of the oracle: its CPUs, the time that it still needs, and its worker, None while it waits."""

    cpus: int
    run: int
    worker: str | None = None


def oracle(workers: dict[str, int], jobs: Sequence[Job], easy: bool) -> list[int | None]:
    """Replay millisecond by millisecond which job starts when, by the words of the policy; None for never.

    The waiting jobs come in order. Independent of the simulation: it has one resource, and no queues or events.
    """
    ends = {number: job.run for number, job in enumerate(jobs) if job.worker}
    places = {number: job.worker for number, job in enumerate(jobs) if job.worker}
    starts: list[int | None] = [0 if job.worker else None for job in jobs]
    reserved: tuple[int, str, int, int] | None = None
    come = 0

    def free(worker: str, at: int) -> int:
        return workers[worker] - sum(jobs[n].cpus for n, w in places.items() if w == worker and ends[n] > at)

    def reserve(now: int) -> tuple[int, str, int, int] | None:
        """Return head, worker, time and room beside the head of the first waiting job that a worker could hold."""
        for head, job in enumerate(jobs[:come]):
            able = [worker for worker in workers if workers[worker] >= job.cpus]
            if starts[head] is None and able:
                times = {
                    w: next(t for t in sorted({now, *ends.values()}) if t >= now and free(w, t) >= job.cpus)
                    for w in able
                }
                worker = min(able, key=lambda w: (times[w], free(w, now), w))
                return head, worker, times[worker], free(worker, times[worker]) - job.cpus
        return None

    def start_on(worker: str, now: int) -> bool:
        """Start the first job that may start on a worker."""
        nonlocal reserved
        for number, job in enumerate(jobs[:come]):
            if starts[number] is not None or job.cpus > free(worker, now):
                continue
            if reserved and reserved[1] == worker and number > reserved[0]:
                head, _, at, beside = reserved
                if now + job.run > at:
                    if job.cpus > beside:
                        continue
                    reserved = (head, worker, at, beside - job.cpus)
            if reserved and number == reserved[0]:
                reserved = None
            starts[number], places[number], ends[number] = now, worker, now + job.run
            return True
        return False

    def fill(names: Sequence[str], now: int) -> None:
        for name in names:
            while start_on(name, now):
                pass

    def renew(now: int) -> None:
        nonlocal reserved
        while easy:
            before, running = reserved, len(places)
            reserved = reserve(now)
            if before and before != reserved:
                fill([before[1]], now)
            if len(places) == running:
                return

    # The backlog comes job by job.
    for come, job in enumerate(jobs, 1):
        if not job.worker:
            free_ones = sorted((w == (reserved or "  ")[1], free(w, 0), w) for w in workers if free(w, 0) >= job.cpus)
            if not any(start_on(worker, 0) for _, _, worker in free_ones) or (
                reserved and (places[come - 1] == reserved[1])
            ):
                renew(0)
    now, pending = 0, True
    while pending:
        renew(now)
        later = sorted((end, number) for number, end in ends.items() if end > now)
        pending = bool(later)
        if pending:
            now = later[0][0]
            fill(sorted({places[number] or "" for end, number in later if end == now}), now)
    return starts


def cluster(workers: dict[str, int], jobs: Sequence[Job]) -> Cluster:
    books = {name: Book(name, {"cpus": cpus, "slots": 50}, {}) for name, cpus in workers.items()}
    running, waiting = [], []
    for number, (cpus, run, worker) in enumerate(jobs):
        request = Request.of({"cpus": cpus})
        if worker is None:
            task = f"task-{number}"  # a queue for each job, so that a run time need not be a class
            queued = Waiting(f"job-{number}", request, order(0, number), task, Exact(run, run))
            waiting.append(Queued(queued, run))
        else:
            books[worker] = books[worker].holding(request)
            running.append(Running(f"job-{number}", worker, Held(request, NOW, run), NOW + run))
    return Cluster(NOW, books, running, waiting)


class Exact(RunTime):
    """Run time of a test: to the millisecond, where the ledger has classes."""


@st.composite
def clusters(draw: st.DrawFn) -> tuple[dict[str, int], list[Job]]:
    """Draw workers, jobs that run there within their room, and jobs that wait. No two ends of runs coincide."""
    workers = {f"w{n}": draw(st.integers(2, 8)) for n in range(draw(st.integers(1, 3)))}
    free = dict(workers)
    jobs: list[Job] = []
    for _ in range(draw(st.integers(0, 5))):
        name = draw(st.sampled_from(sorted(workers)))
        cpus = draw(st.integers(1, 8))
        if cpus <= free[name]:
            free[name] -= cpus
            jobs.append(Job(cpus, draw(st.integers(1, 30)) * 100_000 + 2 ** len(jobs), name))
    waiting = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), max_size=8))
    jobs += [Job(cpus, run * 100_000 + 2**number) for number, (cpus, run) in enumerate(waiting, len(jobs))]
    return workers, jobs


@pytest.mark.parametrize("rules", [GREEDY, EASY], ids=["greedy", "easy"])
@given(drawn=clusters())
def test_estimates_equal_the_starts_of_a_brute_force_replay(
    rules: Rules, drawn: tuple[dict[str, int], list[Job]]
) -> None:
    workers, jobs = drawn
    copy = cluster(workers, jobs)
    expected = oracle(workers, jobs, easy=bool(rules.depth))
    for number, job in enumerate(jobs):
        if job.worker is None:
            start = estimate(copy, rules, f"job-{number}").at
            assert (None if start is None else start - NOW) == expected[number], f"job-{number}"


def test_unknown_run_time_before_a_job_leaves_its_start_unknown() -> None:
    request = Request.of({"cpus": 2})
    copy = cluster({"w": 2}, [Job(2, 5, "w"), Job(2, 7), Job(2, 9)])
    waiting = [copy.waiting[0]._replace(run=0), copy.waiting[1]]
    unknown = replace(copy, waiting=waiting)
    assert estimate(unknown, GREEDY, "job-1").at == NOW + 5
    assert estimate(unknown, GREEDY, "job-2") == Estimate(None, NoEstimate.UNKNOWN_RUN_TIMES, 2)
    stays = running_until("job-0", "w", Held(request, NOW), 0, NOW)
    assert estimate(replace(copy, running=[stays]), GREEDY, "job-1").why_not is NoEstimate.UNKNOWN_RUN_TIMES


def test_unknown_run_time_does_not_matter_where_room_is_left() -> None:
    copy = cluster({"w": 4}, [Job(2, 5, "w"), Job(2, 9, "w"), Job(2, 7)])
    running = [copy.running[0]._replace(ends=0), copy.running[1]]
    assert estimate(replace(copy, running=running), GREEDY, "job-2").at == NOW + 9


def test_job_that_no_worker_would_ever_take_has_no_start() -> None:
    assert estimate(cluster({"w": 4}, [Job(5, 7)]), EASY, "job-0").why_not is NoEstimate.NEVER_FITS


def test_job_behind_the_simulated_ones_starts_at_their_pace() -> None:
    copy = replace(cluster({"w": 1}, [Job(1, 10, "w"), *[Job(1, 10)] * 9]), beyond=91)
    assert estimate(copy, GREEDY, "far") == Estimate(NOW + 1000, None, 9, extrapolated=True)
    large = replace(cluster({"w": 1}, [Job(1, 10, "w"), Job(1, 10), Job(2, 10), Job(2, 10)]), beyond=91)
    assert estimate(large, GREEDY, "far").why_not is NoEstimate.TOO_FAR


def test_worker_that_ends_takes_no_job_that_would_outlive_it() -> None:
    copy = cluster({"w": 2}, [Job(2, 10, "w"), Job(2, 5), Job(2, 5)])
    books = {"w": replace(copy.books["w"], left=16)}
    assert estimate(replace(copy, books=books), EASY, "job-1").at == NOW + 10
    assert estimate(replace(copy, books=books), EASY, "job-2").at is None


def test_overrun_job_is_expected_to_go_on_for_a_while() -> None:
    held = Held(Request.of({"cpus": 1}), NOW - 100, 80)
    assert running_until("a", "w", held, 50, NOW).ends == NOW + 20
    assert running_until("a", "w", held._replace(expected=150), 50, NOW).ends == NOW + 50
    assert running_until("a", "w", held, 120, NOW).ends == NOW + 20


def test_large_cluster_is_forecast_without_reservations(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = cluster({"w": 4}, [Job(2, 10, "w"), Job(4, 5), Job(2, 50)])
    whole = estimate(copy, EASY, "job-2")
    assert (whole.at, whole.without_reservations) == (NOW + 15, False)
    monkeypatch.setattr(module, "MAX_WORK", 2)
    partial = estimate(copy, EASY, "job-2")
    assert (partial.at, partial.without_reservations) == (NOW, True)
    assert module.outcome(copy, EASY).without_reservations
    assert not module.outcome(copy, Rules(depth=0)).without_reservations


@given(drawn=clusters(), depth=st.integers(1, 3), patience=st.sampled_from([0, 500_000, 10**12]))
def test_reservations_are_those_among_all_workers(
    drawn: tuple[dict[str, int], list[Job]], depth: int, patience: int
) -> None:
    class Thorough(Simulation):
        def _reservable(self, heads: Sequence[Waiting]) -> Iterable[str]:
            return self.books

    copy, rules = cluster(*drawn), Rules(depth, patience)
    thorough = Thorough(dict(copy.books), rules, Unknown(), now=NOW)
    thorough.begin(copy.running, copy.waiting)
    thorough.advance()
    assert forecast(copy, rules).starts == thorough.starts
