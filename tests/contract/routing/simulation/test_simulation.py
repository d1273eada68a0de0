"""The platform starts the jobs that the simulation starts, on the same workers, after each submission and each end.

Expected times are hours, so the milliseconds that a test takes change no decision. No two of them are alike: of two
equal ones, milliseconds would decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Arrived, Ended
from celery_capacity.routing.model.expected import UNKNOWN, RunTime
from celery_capacity.routing.model.request import Request, alternatives_term, timed
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import Book, order
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT, Rule, Sharing, mean_time, tenant_term
from celery_capacity.routing.recovery.reservations import Memory, renew_reservations
from celery_capacity.routing.recovery.workers_with_room import fill_all
from celery_capacity.routing.simulation.expectations import Exact
from celery_capacity.routing.simulation.jobs import Submission
from celery_capacity.routing.simulation.shares import Shares
from celery_capacity.routing.simulation.simulation import Simulation
from tests.contract.routing.ledger.test_admission import ON_A_SERVER, write
from tests.contract.routing.policy.test_tenants import write_sharing
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW, open_ledger

#: CPUs of the workers.
WORKERS: Final = {"big": 8, "small": 4}
#: Shortest expected time (ms), and the factor to the next one: more than a class of times.
SHORTEST, STEP = 2**24, 1.5
#: Most jobs of an example.
MOST: Final = 14
FIRST: Final = Token(1, 1)

#: Events: a job with CPUs, GPUs or other CPUs as alternatives, a priority, and an expected time or none comes; or a
#: running job ends.
COMES: Final = st.tuples(
    st.integers(1, 8),
    st.sampled_from([(0,), (0,), (0,), (1,), (1, 5), (2, 3), (0, 1)]),
    st.sampled_from([0, 0, 0, 5]),
    st.sampled_from([True, True, False]),
)
EVENTS: Final = st.lists(st.one_of(COMES, COMES, st.integers(0, 20)), min_size=4, max_size=2 * MOST)


class Both:
    """A simulation and a ledger to which the same things happen."""

    def __init__(self, ledger: Ledger, depth: int, sharing: Sharing | None = None) -> None:
        write(ledger, [])
        if sharing is not None:
            write_sharing(ledger, sharing)
        shares = None if sharing is None else Shares(sharing, mean_time(HALVES_IN), ledger.now_ms())
        capacities = {name: {"cpus": cpus, "gpus": 1, "slots": 20} for name, cpus in WORKERS.items()}
        self.rules = Rules(depth, 10**15)
        books = {name: Book(name, capacity, {}) for name, capacity in capacities.items()}
        self.simulation = Simulation(books, self.rules, Exact(), shares=shares)
        self.ledger, self.memory = ledger, Memory()
        for name, capacity in capacities.items():
            ledger.register(name, f"{name}-life", f"queue.{name}", Request.of(capacity).shape, VIEW)
        self.look()
        self.running: dict[str, str] = {}
        self.jobs = 0

    def look(self) -> None:
        if self.simulation.shares is not None:
            fill_all(self.ledger)
        while renew_reservations(self.ledger, self.rules, self.memory).get("admitted"):
            pass

    def tick(self) -> None:
        """Let the time be later than at the last event, in both."""
        while (now := self.ledger.now_ms()) <= self.simulation.now:
            pass
        self.simulation.now = now

    def come(
        self, cpus: int, kinds: tuple[int, ...], priority: int, expected: int, tenant: str = DEFAULT_TENANT
    ) -> None:
        self.tick()
        self.jobs += 1
        gpus, *others = kinds
        requests = [Request.of({"cpus": cpus, "gpus": gpus}), *(Request.of({"cpus": other}) for other in others)]
        requests = list(dict.fromkeys(requests))
        job, request = f"job-{self.jobs:02}", requests[0]
        terms = alternatives_term(requests) + tenant_term(tenant)
        run_time = RunTime(expected, expected) if expected else UNKNOWN
        entry = Submission(job, 0, expected, request, priority=priority, terms=terms)
        self.simulation._submissions[job] = entry
        self.simulation._submit(self.jobs, entry)
        self.ledger.submit(job, timed(request.shape + terms, run_time), order(priority, self.jobs), MESSAGE)
        self.look()

    def end(self, number: int) -> None:
        self.tick()
        job = sorted(self.running)[number % len(self.running)]
        worker = self.running.pop(job)
        self.simulation._end(job, worker)
        ended = [Ended(job, FIRST, Outcome("succeeded"))]
        arrived = [Arrived(job, FIRST, "nonce")]
        self.ledger.settle(worker, f"{worker}-life", arrived=arrived, most_losses=MOST_LOSSES)
        self.ledger.settle(worker, f"{worker}-life", ended=ended, most_losses=MOST_LOSSES)
        self.look()

    def compare(self) -> None:
        self.running = {job: worker for worker, jobs in self.simulation.held.items() for job in jobs}
        client: Any = self.ledger.client
        held: dict[str, list[bytes]] = {name: client.hkeys(keys.held(name)) for name in WORKERS}
        assert {job.decode(): name for name, jobs in held.items() for job in jobs} == self.running


@settings(ON_A_SERVER, max_examples=examples(120))
@given(EVENTS, st.permutations(range(MOST)), st.sampled_from([0, 1, 1, 2]))
def test_platform_starts_what_the_simulation_starts(
    ledger: Ledger, events: list[tuple[int, tuple[int, ...], int, bool] | int], times: list[int], depth: int
) -> None:
    both = Both(ledger, depth)
    for event in events:
        if isinstance(event, tuple) and both.jobs < MOST:
            cpus, kinds, priority, timed = event
            both.come(cpus, kinds, priority, round(SHORTEST * STEP ** times[both.jobs]) if timed else 0)
        elif isinstance(event, int) and both.running:
            both.end(event)
        both.compare()
    while both.running:
        both.end(0)
        both.compare()
    assert len(both.simulation.starts) == both.jobs


#: A half-life beside which the milliseconds of a test count for nothing.
HALVES_IN: Final = 365 * 86_400.0
TENANTS: Final = ("default", "physics", "art-3")
PART: Final = st.dictionaries(st.sampled_from(["cpus", "slots"]), st.sampled_from([1, 2, 4]), max_size=2)
QUOTA: Final = st.dictionaries(st.sampled_from(["cpus", "slots", "gpus"]), st.sampled_from([1, 3, 8]), max_size=1)
RULES_OF_TENANTS: Final = st.dictionaries(
    st.sampled_from(TENANTS), st.builds(Rule, st.sampled_from([1, 2, 3]), PART, QUOTA), max_size=3
)
PAST: Final = st.dictionaries(st.sampled_from(TENANTS), st.sampled_from([0.125, 0.5]), max_size=2)
CAPACITY: Final = {"cpus": sum(WORKERS.values()), "gpus": len(WORKERS), "slots": 20 * len(WORKERS)}


@pytest.fixture
def slow_ledger(redis_url: str) -> Iterator[Ledger]:
    with open_ledger(redis_url, PLATFORM_SHARE_HALF_LIFE=str(HALVES_IN)) as ledger:
        yield ledger


@settings(ON_A_SERVER, max_examples=examples(180))
@given(
    st.lists(st.one_of(st.tuples(COMES, st.sampled_from(TENANTS)), st.integers(0, 20)), min_size=4, max_size=2 * MOST),
    st.permutations(range(MOST)),
    st.sampled_from([0, 1, 1, 2]),
    st.builds(Sharing, rules=RULES_OF_TENANTS, past=PAST, total=st.just(CAPACITY)),
)
def test_platform_starts_what_the_simulation_starts_among_tenants(
    slow_ledger: Ledger,
    events: list[tuple[tuple[int, tuple[int, ...], int, bool], str] | int],
    times: list[int],
    depth: int,
    sharing: Sharing,
) -> None:
    both = Both(slow_ledger, depth, sharing)
    for event in events:
        if isinstance(event, tuple) and both.jobs < MOST:
            (cpus, kinds, priority, timed), tenant = event
            expected = round(SHORTEST * STEP ** times[both.jobs]) if timed else 0
            both.come(cpus, kinds, priority, expected, tenant)
        elif isinstance(event, int) and both.running:
            both.end(event)
        both.compare()
    while both.running:
        both.end(0)
        both.compare()
    write(slow_ledger, [])
