"""The simulation decides as the specification does, wastes no room, and lets nobody wait for ever."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.model.expected import expected_class
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.learned_times import FEWEST
from celery_capacity.routing.policy.placement import Book, Waiting, order
from celery_capacity.routing.policy.reservation import Rules, earliest_start, large_enough, place_in_line
from celery_capacity.routing.policy.tenants import Rule, Sharing, tenant_term
from celery_capacity.routing.simulation.expectations import SOURCES, Exact, Expectations, Learned, Unknown
from celery_capacity.routing.simulation.jobs import Start, Submission
from celery_capacity.routing.simulation.shares import Shares
from celery_capacity.routing.simulation.simulation import Simulation, simulate


class Wrong(Unknown):
    """Every job is expected to be over at once, whatever it does."""

    def expected(self, submission: Submission) -> int:
        return 1


class Scattered(Unknown):
    """Expected times are too short, too long, right or unknown, by the job."""

    def expected(self, submission: Submission) -> int:
        return (0, submission.run // 3, submission.run, 7 * submission.run)[sum(map(ord, submission.job)) % 4]


SOURCES_OF_TESTS = {**SOURCES, "wrong": Wrong, "scattered": Scattered}


def need(cpus: int, **more: int) -> Request:
    return Request.of({"cpus": cpus, **more})


def workers(**cpus: int) -> dict[str, Book]:
    return {name: Book(name, {"cpus": size, "slots": 20, "gpus": 2}, {}) for name, size in cpus.items()}


class Judged(Simulation):
    """A simulation that compares each pass with the specification, and looks for wasted room after each event."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self.first_reserved: dict[int, int] = {}

    def _fill(self, worker: str) -> None:
        book, reservation = self.books[worker], self.reservations.get(worker)
        expected = fill_or_keep(book, list(self.backlog()), 10**6, (), reservation, self.now, self.sharing()).admitted
        before = len(self.starts)
        super()._fill(worker)
        assert [start.job for start in self.starts[before:]] == [waiting.job for waiting in expected]

    def sharing(self) -> Sharing | None:
        """Return the shares of now."""
        if self.shares is None:
            return None
        self.shares.age(self.now)
        return self.shares.sharing

    def _reserve_anew(self) -> None:
        super()._reserve_anew()
        backlog, sharing = list(self.backlog()), self.sharing()
        for name, book in self.books.items():
            assert not book.over
            reservation = self.reservations.get(name)
            # I5: no job waits while a worker could take it under the policy.
            assert fill_or_keep(book, backlog, 1, (), reservation, self.now, sharing).admitted == []
        if sharing is not None:
            self._check_the_use(sharing)
            backlog = list(sharing.admissible(backlog))
        if backlog and self.rules.depth:
            self._check_the_first(min(backlog, key=lambda entry: place_in_line(entry.shape, entry.order, sharing)))
        for entry in self.reservations.values():
            if not entry.kept:
                self.first_reserved.setdefault(entry.order, entry.at)

    def _check_the_use(self, sharing: Sharing) -> None:
        """Check that tenants together hold what the books say, and none more than its quota."""
        for name in ("cpus", "slots", "gpus"):
            held = sum(book.allocated.get(name, 0) for book in self.books.values())
            assert held == sum(used.get(name, 0) for used in sharing.used.values())
        for tenant, rule in sharing.rules.items():
            used = sharing.used.get(tenant, {})
            assert all(used.get(name, 0) <= amount for name, amount in rule.quota.items())

    def _check_the_first(self, head: Waiting) -> None:
        """Check that the first job has a reservation as soon as a time is known for it."""
        mine = [entry for entry in self.reservations.values() if entry.order == head.order]
        able = large_enough(head, self.books.values())
        held = {name: list(jobs.values()) for name, jobs in self.held.items()}
        times = [earliest_start(head.request, book, held.get(book.worker, ()), self.now) for book in able]
        assert mine or not any(times)


def judge(
    submissions: Sequence[Submission],
    books: dict[str, Book],
    rules: Rules,
    expectations: Expectations,
    shares: Shares | None = None,
) -> Judged:
    simulation = Judged(books, rules, expectations, shares=shares)
    simulation.run(submissions)
    return simulation


def starts(simulation: Simulation) -> dict[str, Start]:
    return {start.job: start for start in simulation.starts}


JOBS = st.lists(
    st.tuples(
        st.integers(0, 60),
        st.integers(1, 40),
        st.builds(need, st.integers(0, 10), gpus=st.sampled_from([0, 0, 0, 1])),
        st.sampled_from([0, 0, 0, 5]),
    ),
    max_size=25,
).map(
    lambda jobs: [
        Submission(f"job-{number}", at, run, request, f"task-{run % 3}", priority)
        for number, (at, run, request, priority) in enumerate(jobs)
    ]
)


@given(
    JOBS,
    st.integers(0, 3),
    st.sampled_from(sorted(SOURCES_OF_TESTS)),
    st.sampled_from([0, 15, 10**6]),
)
def test_simulation_follows_the_specification_and_ends_every_job(
    submissions: list[Submission], depth: int, source: str, reserve_after: int
) -> None:
    books = workers(big=10, small=4)
    simulation = judge(submissions, books, Rules(depth, reserve_after), SOURCES_OF_TESTS[source]())
    assert sorted(start.job for start in simulation.starts) == sorted(entry.job for entry in submissions)
    assert all(book.empty for book in simulation.books.values())
    assert all(start.started >= start.submitted for start in simulation.starts)


#: Rules of tenants under which every job can start one day.
RULES = st.dictionaries(
    st.sampled_from(["default", "a", "b"]),
    st.builds(
        Rule,
        st.integers(1, 3),
        st.dictionaries(st.sampled_from(["cpus", "slots"]), st.integers(1, 8), max_size=1),
        st.dictionaries(st.sampled_from(["cpus", "gpus"]), st.integers(10, 12), max_size=1),
    ),
    max_size=2,
)
TOTAL = {"cpus": 14, "slots": 40, "gpus": 4}


@given(JOBS, st.lists(st.sampled_from(["default", "a", "b"]), min_size=25, max_size=25), RULES, st.integers(0, 2))
def test_simulation_follows_the_turns_and_quotas_of_tenants(
    submissions: list[Submission], tenants: list[str], rules: dict[str, Rule], depth: int
) -> None:
    named = [job._replace(terms=tenant_term(tenant)) for job, tenant in zip(submissions, tenants, strict=False)]
    shares = Shares(Sharing(rules, total=TOTAL), mean_time=30.0)
    simulation = judge(named, workers(big=10, small=4), Rules(depth, 15), Exact(), shares)
    assert len(simulation.starts) == len(submissions)
    assert not any(amount for used in shares.sharing.used.values() for amount in used.values())


@given(JOBS)
def test_head_starts_by_its_reserved_time_if_times_are_true(submissions: list[Submission]) -> None:
    equals = [entry._replace(priority=0) for entry in submissions]
    simulation = judge(equals, workers(big=10, small=4), Rules(1, 10**9), Exact())
    assert simulation.overruns == 0
    by_order = sorted(equals, key=lambda entry: entry.at)
    started = {order(0, seq): starts(simulation)[entry.job].started for seq, entry in enumerate(by_order)}
    assert all(started[head] <= at for head, at in simulation.first_reserved.items())


# -- tenants


def test_tenants_start_by_their_weights_and_give_back_what_they_borrowed() -> None:
    rules = {"a": Rule(weight=3)}
    jobs = [Submission(f"b-{n}", 0, 100, need(1), terms=tenant_term("b")) for n in range(40)]
    jobs += [Submission(f"a-{n}", 150, 100, need(1), terms=tenant_term("a")) for n in range(40)]
    begun = starts(judge(jobs, workers(w=8), Rules(1), Exact(), Shares(Sharing(rules, total={"cpus": 8}))))
    assert [sum(start.started == at for job, start in begun.items() if job[0] == "a") for at in (100, 200, 300)] == [
        0,
        6,
        6,
    ]
    assert sum(start.started == 100 for start in begun.values()) == 8


def test_freed_quota_starts_a_job_on_another_worker_at_once() -> None:
    terms = tenant_term("a")
    jobs = [
        Submission("first", 0, 100, need(1), terms=terms),
        Submission("held-back", 1, 10, need(4), terms=terms),
    ]
    shares = Shares(Sharing({"a": Rule(quota={"slots": 1})}, total={"cpus": 6}))
    begun = starts(judge(jobs, workers(small=2, w=4), Rules(1), Exact(), shares))
    assert (begun["held-back"].started, begun["held-back"].worker) == (100, "w")


#: Mean time (ms) for which past use counts.
HALF_HOUR = 1_800_000.0


def flood(tenant: str, sizes: Sequence[int]) -> list[Submission]:
    """Return a long backlog of a tenant, all at once."""
    runs = (20_000, 30_000, 50_000, 40_000, 25_000)
    return [
        Submission(f"{tenant}-{n}", 0, runs[n % len(runs)], need(sizes[n % len(sizes)]), terms=tenant_term(tenant))
        for n in range(200)
    ]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_reservations_leave_equal_tenants_equal_starts(depth: int) -> None:
    jobs = [*flood("a", (6, 3, 8, 5, 2, 4)), *flood("b", (6, 3, 8, 5, 2, 4))]
    simulation = simulate(
        jobs, workers(v=8, w=8), Rules(depth), Exact(), Shares(Sharing(total={"cpus": 16}), HALF_HOUR)
    )
    until = 3_000_000
    used = {
        tenant: sum(
            need_of[start.job] * (min(start.ended, until) - start.started)
            for start in simulation.starts
            if start.job[0] == tenant and start.started < until
        )
        for need_of in [{entry.job: dict(entry.request.amounts)["cpus"] for entry in jobs}]
        for tenant in "ab"
    }
    assert used["a"] == pytest.approx(used["b"], rel=0.06)


@pytest.mark.parametrize("depth", [1, 2])
def test_reservation_of_a_flood_holds_no_other_tenant_up(depth: int) -> None:
    late = Submission("late", 95_000, 10_000, need(8), terms=tenant_term("b"))
    jobs = [*flood("a", (8, 7, 6, 5)), late]
    begun = starts(simulate(jobs, workers(w=8), Rules(depth), Exact(), Shares(Sharing(total={"cpus": 8}), HALF_HOUR)))
    assert begun["late"].started <= 95_000 + 50_000


# -- starvation


def stream(until: int, cpus: int = 1, every: int = 15, run: int = 100, priority: int = 0) -> list[Submission]:
    """Return narrow jobs that come for ever, and that could keep all CPUs of a worker busy."""
    return [
        Submission(f"narrow-{at}", at, run + at % 30, need(cpus), "narrow", priority) for at in range(0, until, every)
    ]


@pytest.mark.parametrize("source", sorted(SOURCES_OF_TESTS))
@pytest.mark.parametrize("depth", [1, 3])
def test_wide_job_starts_under_an_endless_stream_of_narrow_ones(source: str, depth: int) -> None:
    wide = Submission("wide", 1_005, 50, need(8), "wide")
    jobs = [*stream(20_000), wide]
    simulation = judge(jobs, workers(w=8), Rules(depth, 500), SOURCES_OF_TESTS[source]())
    # The first reserved time is at most 130 ms away. The worker is kept 500 ms after it, and its jobs end 130 ms later.
    assert starts(simulation)["wide"].started <= 1_005 + 130 + 500 + 130
    assert not simulation.reservations


def test_wide_job_costs_the_others_nothing_while_it_waits_for_older_jobs() -> None:
    old, wide = Submission("old", 0, 10_000, need(4)), Submission("wide", 1, 50, need(8), "wide")
    narrow = stream(9_000, cpus=4, every=100, run=60)
    begun = starts(
        judge([old, wide, *(job._replace(at=job.at + 2) for job in narrow)], workers(w=8), Rules(1, 500), Unknown())
    )
    assert all(begun[job.job].started == job.at + 2 for job in narrow)
    assert begun["wide"].started == 10_000


def test_wide_job_waits_for_a_gap_without_reservations() -> None:
    jobs = [*stream(20_000), Submission("wide", 1_005, 50, need(8), "wide")]
    simulation = judge(jobs, workers(w=8), Rules(0), Exact())
    assert starts(simulation)["wide"].started > 19_000


def test_wide_job_with_known_times_starts_when_its_turn_comes() -> None:
    jobs = [*stream(20_000), Submission("wide", 1_005, 50, need(8), "wide")]
    simulation = judge(jobs, workers(w=8), Rules(1, 10**9), Exact())
    assert starts(simulation)["wide"].started <= 1_005 + 2 * 155
    assert simulation.keepings == 0


def test_higher_priority_passes_a_lower_reservation() -> None:
    running = Submission("running", 0, 100, need(6))
    wide, high = Submission("wide", 1, 10, need(8)), Submission("high", 2, 500, need(2), priority=9)
    simulation = judge([running, wide, high], workers(w=8), Rules(), Exact())
    assert starts(simulation)["high"].started == 2
    assert starts(simulation)["wide"].started == 502


def test_lower_priority_passes_no_reservation_unless_it_ends_before() -> None:
    jobs = [
        Submission("running", 0, 10_000, need(6)),
        Submission("wide", 1, 1_000, need(8), priority=5),
        Submission("long", 2, 50_000, need(2)),
        Submission("short", 3, 5_000, need(2)),
    ]
    begun = {job: start.started for job, start in starts(judge(jobs, workers(w=8), Rules(), Exact())).items()}
    assert begun == {"running": 0, "short": 3, "wide": 10_000, "long": 11_000}


def test_other_workers_stay_free_for_all() -> None:
    jobs = [
        Submission("running", 0, 100, need(6)),
        Submission("wide", 1, 10, need(8)),
        Submission("long", 2, 500, need(4)),
    ]
    begun = starts(judge(jobs, workers(other=4, w=8), Rules(), Exact()))
    assert (begun["long"].started, begun["long"].worker) == (2, "other")


def test_overrun_moves_the_reservation_and_is_counted() -> None:
    class TooShort(Exact):
        def expected(self, submission: Submission) -> int:
            return 4_000 if submission.job == "running" else submission.run

    jobs = [
        Submission("running", 0, 10_000, need(6)),
        Submission("wide", 1, 1_000, need(8)),
        Submission("later", 2, 4_500, need(2)),
    ]
    simulation = judge(jobs, workers(w=8), Rules(), TooShort())
    assert simulation.overruns > 0
    begun = starts(simulation)
    # The reserved time moved so far that the later job could pass. It delays the wide one by no more than its own time.
    assert begun["later"].started < 10_000
    assert begun["wide"].started == begun["later"].ended < 14_500


# -- expected run times


def test_learned_time_is_that_of_the_task_and_request() -> None:
    learned = Learned()
    job = Submission("job", 0, 50_000, need(1), "task")
    for _ in range(FEWEST):
        assert learned.expected(job) == 0
        learned.learn(job)
    assert learned.expected(job) == expected_class(job.run)
    assert learned.expected(job._replace(request=need(9))) == 0
    assert learned.expected(job._replace(task="other")) == 0


def test_reservation_is_kept_while_a_higher_priority_is_blocked() -> None:
    jobs = [
        *stream(3_000),
        Submission("wide", 1_005, 50, need(8), "wide"),
        *(Submission(f"high-{at}", at, 40, need(7), "high", 9) for at in range(1_300, 3_000, 200)),
    ]
    simulation = judge(jobs, workers(w=8, other=7), Rules(1, 200), Unknown())
    assert starts(simulation)["wide"].started < 2_500


def test_simulation_is_the_same_each_time() -> None:
    jobs = stream(2_000, cpus=3, every=7)
    once = simulate(jobs, workers(w=8, v=5), Rules(), Exact())
    again = simulate(list(reversed(jobs)), workers(v=5, w=8), Rules(), Exact())
    assert once.starts == again.starts
