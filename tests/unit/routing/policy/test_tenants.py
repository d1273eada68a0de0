"""Tenants share the workers by their weights, in virtual time."""

from __future__ import annotations

import bisect
import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import Book, Waiting, order
from celery_capacity.routing.policy.shape_indexes import waits_beside
from celery_capacity.routing.policy.tenants import Rule, Sharing, mean_time, tenant_of, tenant_term

#: Half-life of past use, in seconds of the virtual clock.
HALVES_IN = 600.0
TIME = mean_time(HALVES_IN)
MINUTE = 60_000
#: Jobs that one pass admits.
MOST = 16


@dataclass
class Cluster:
    """Workers that fill themselves at each release, in virtual milliseconds. `spent`: millicores times ms by tenant."""

    books: dict[str, Book]
    sharing: Sharing
    waiting: dict[str, list[Waiting]] = field(default_factory=lambda: defaultdict(list))
    now: int = 0
    runs: dict[str, int] = field(default_factory=dict)
    ends: list[tuple[int, int, Waiting, str, int]] = field(default_factory=list)
    started: dict[str, int] = field(default_factory=dict)
    spent: Counter[str] = field(default_factory=Counter)
    _at: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def submit(self, tenant: str, runs_ms: Iterable[int], cpus: int = 1, priority: int = 0) -> list[str]:
        jobs = []
        for run_ms in runs_ms:
            seq = len(self.runs)
            waiting = Waiting(
                f"job-{seq:05}", Request.of({"cpus": cpus * 1000}), order(priority, seq), terms=tenant_term(tenant)
            )
            self.runs[waiting.job] = run_ms
            bisect.insort(self.waiting[tenant], waiting, key=lambda waiting: waiting.order)
            jobs.append(waiting.job)
        return jobs

    def fill(self, worker: str) -> None:
        # The first jobs of each tenant are enough: jobs of one tenant keep their order.
        backlog = [waiting for jobs in self.waiting.values() for waiting in jobs[:MOST]]
        admitted = fill_or_keep(self.books[worker], backlog, MOST, sharing=self.sharing).admitted
        for waiting in admitted:
            self.books[worker] = self.books[worker].holding(waiting.request)
            self.sharing = self.sharing.holding(waiting.shape, waiting.request)
            self.started[waiting.job] = self.now
            heapq.heappush(self.ends, (self.now + self.runs[waiting.job], waiting.order, waiting, worker, self.now))
            self.waiting[tenant_of(waiting.shape)].remove(waiting)

    def steps(self) -> Iterator[int]:
        """End the jobs one after another, and yield the time of each end, once the worker is filled."""
        for worker in self.books:
            self.fill(worker)
        while self.ends:
            at, _, waiting, worker, began = heapq.heappop(self.ends)
            self.sharing, self.now = self.sharing.later(at - self.now, TIME), at
            self.spent[tenant_of(waiting.shape)] += (at - began) * waiting.request.get("cpus")
            self.books[worker] = self.books[worker].without(waiting.request)
            self.sharing = self.sharing.releasing(waiting.shape, waiting.request, at - began, TIME)
            self.fill(worker)
            yield at


def cluster(cpus: int, workers: int = 1, **rules: Rule) -> Cluster:
    capacity = {"cpus": cpus * 1000, "slots": 1000}
    books = {f"w{n}": Book(f"w{n}", capacity, {}) for n in range(workers)}
    total = {name: amount * workers for name, amount in capacity.items()}
    return Cluster(books, Sharing(rules=rules, total=total))


def run_until(cluster_: Cluster, jobs: int) -> None:
    """Let so many jobs end."""
    for number, _ in enumerate(cluster_.steps(), 1):
        if number == jobs:
            return


def part(spent: Counter[str], tenant: str) -> float:
    return spent[tenant] / spent.total()


@pytest.mark.parametrize(("cpus", "workers"), [(1, 1), (4, 1), (16, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_equal_tenants_get_equal_cpu_seconds(cpus: int, workers: int, seed: int) -> None:
    chance, shared = random.Random(seed), cluster(cpus, workers)
    # The tenant of the long jobs comes first with all of them.
    shared.submit("long", [chance.randrange(20_000, 40_000) for _ in range(2000)])
    shared.submit("short", [chance.randrange(500, 3_000) for _ in range(20_000)])
    run_until(shared, 1000)
    spent = shared.spent + Counter({"long": 0})
    for _, _, waiting, _, began in shared.ends:
        spent[tenant_of(waiting.shape)] += (shared.now - began) * waiting.request.get("cpus")
    assert part(spent, "long") == pytest.approx(0.5, abs=0.025)


def test_tenants_get_cpu_seconds_by_their_weights() -> None:
    shared = cluster(8, heavy=Rule(weight=3))
    shared.submit("heavy", [1000] * 3000)
    shared.submit("light", [1000] * 3000)
    run_until(shared, 1000)
    assert part(shared.spent, "heavy") == pytest.approx(0.75, abs=0.025)


def test_newcomer_gets_its_share_within_the_length_of_a_job() -> None:
    shared = cluster(10)
    shared.submit("first", [MINUTE + 1000 * n for n in range(500)])
    steps = shared.steps()
    while next(steps) < 10 * MINUTE:
        pass
    came, longest = shared.now, max(at - began for at, _, _, _, began in shared.ends)
    newcomers = shared.submit("second", [MINUTE] * 500)
    while next(steps) < came + longest:
        pass
    running = [waiting.job for _, _, waiting, _, _ in shared.ends]
    assert len(set(running) & set(newcomers)) >= 5


def test_flood_delays_the_first_start_of_another_by_one_release() -> None:
    shared = cluster(4)
    shared.submit("flood", [1000 + n for n in range(5000)])
    steps = shared.steps()
    for _ in range(10):
        next(steps)
    (job,) = shared.submit("other", [1000])
    next(steps)
    assert shared.started[job] == shared.now


def test_higher_priority_starts_first_whichever_tenant_submits_it() -> None:
    shared = cluster(1)
    shared.submit("greedy", [1000] * 5)
    steps = shared.steps()
    next(steps)
    shared.submit("modest", [1000])
    urgent = shared.submit("greedy", [1000], priority=5)
    next(steps)
    assert list(shared.started)[-1] == urgent[0]


def test_nominal_share_is_lent_while_idle_and_given_back_at_releases() -> None:
    shared = cluster(10, owner=Rule(nominal={"cpus": 6000}))
    shared.submit("guest", [1000 + 100 * n for n in range(100)])
    steps = shared.steps()
    next(steps)
    assert shared.sharing.used["guest"]["cpus"] == 10_000
    shared.submit("owner", [MINUTE] * 20)
    for _ in range(6):
        next(steps)
    assert shared.sharing.used["owner"]["cpus"] == 6000
    # Above its nominal share the owner is a tenant as all others: its level is higher now.
    next(steps)
    assert shared.sharing.used["owner"]["cpus"] == 6000


def test_quota_holds_a_tenant_back_and_lets_others_pass() -> None:
    shared = cluster(8, small=Rule(quota={"cpus": 2000}))
    shared.submit("small", [1000] * 50)
    shared.submit("other", [1000] * 50)
    for _ in shared.steps():
        assert shared.sharing.used.get("small", {}).get("cpus", 0) <= 2000
    assert not any(shared.waiting.values())


def test_quota_names_the_first_exceeded_resource() -> None:
    sharing = Sharing({"a": Rule(quota={"cpus": 2000, "slots": 1})}, used={"a": {"cpus": 1000, "slots": 1}})
    assert sharing.exceeded("a", Request.of({"cpus": 2000})) == "cpus"
    assert sharing.exceeded("a", Request.of({"cpus": 1000})) == "slots"
    assert sharing.exceeded("b", Request.of({"cpus": 9000})) == ""


def test_level_is_the_dominant_share_beside_the_weight() -> None:
    sharing = Sharing(
        {"b": Rule(weight=2)},
        used={"a": {"cpus": 1000, "memory": 6}, "b": {"cpus": 4000, "memory": 1}},
        past={"b": 0.1},
        total={"cpus": 8000, "memory": 12},
    )
    assert (sharing.level("a"), sharing.level("b"), sharing.level("c")) == (500_000, 300_000, 0)
    assert replace(sharing, total={}).level("a") == 0


def test_past_use_halves_in_a_half_life() -> None:
    sharing = Sharing(past={"a": 0.5}, total={"cpus": 1000})
    assert sharing.later(HALVES_IN * 1000, TIME).past["a"] == pytest.approx(0.25)
    assert sharing.later(1, mean_time(0)).past["a"] == 0


def test_shape_of_a_tenant_waits_in_the_index_of_the_tenant() -> None:
    shape = Waiting("job", Request.of({"cpus": 1000, "gpus": 1}), 0, "tasks.render", terms=tenant_term("bio")).shape
    assert shape == "cpus=1000,gpus=1,slots=1,tasks.render,$bio"
    assert (tenant_of(shape), waits_beside(shape)) == ("bio", "$bio")
    assert tenant_term("default") == ""
    assert tenant_of("cpus=1000,slots=1") == "default"
