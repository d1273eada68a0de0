"""Feasibility, reasons and positions of waiting jobs: equal to a brute-force oracle on random books."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from celery_capacity.routing.model.amounts import LABEL, ONLY_LABELLED
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request, filed_shape
from celery_capacity.routing.policy.feasibility import count_before, find_shortfall, judge, kinds_of
from celery_capacity.routing.policy.placement import Admission, Book, Refusal

#: Random books on which the functions and the oracle are compared.
BOOKS: Final = 6000
TASKS: Final = ("tasks.a", "tasks.b", "tasks.c")


@dataclass(frozen=True)
class Job:
    """A waiting job as the oracle sees it: the amounts as a plain dict, the queue and the task beside them."""

    amounts: dict[str, int]
    queue: str
    task: str

    @property
    def request(self) -> Request:
        return Request.of(self.amounts).within(self.queue)

    @property
    def filed(self) -> str:
        return filed_shape(self.request.shape, self.task)


def random_job(chance: random.Random) -> Job:
    amounts = {"cpus": chance.randint(0, 9), "memory": chance.randint(0, 5) * 2**20, "slots": 1}
    if chance.random() < 0.3:
        amounts[chance.choice(["gpus", "licence"])] = chance.randint(1, 3)
    if chance.random() < 0.1:
        amounts["alone"] = 1
    return Job(amounts, chance.choice(["celery", "celery", "video"]), chance.choice(["", *TASKS]))


def random_book(chance: random.Random, name: str) -> Book:
    capacity = {"cpus": chance.randint(1, 8), "memory": chance.randint(1, 4) * 2**20, "slots": chance.randint(1, 4)}
    for resource in ("gpus", "licence"):
        if chance.random() < 0.3:
            capacity[resource] = chance.randint(1, 3)
    if chance.random() < 0.3:
        capacity[LABEL + "video"] = 1000
        if chance.random() < 0.5:
            capacity[ONLY_LABELLED] = 1
    allocated: dict[str, int] = {}
    if chance.random() < 0.6:
        # Now and then more than there is: the capacity shrank.
        allocated = {resource: chance.randint(0, amount + (chance.random() < 0.05)) for resource, amount in
                     capacity.items() if not resource.startswith("queue:")}  # fmt: skip
    if allocated.get("slots") == 1 and chance.random() < 0.2:
        allocated["alone"] = 1
    kept = "alone=1,cpus=1,slots=1" if chance.random() < 0.05 else ""
    tasks = None if chance.random() < 0.5 else frozenset(chance.sample(TASKS, chance.randint(0, 2)))
    return Book(name, capacity, allocated, chance.random() < 0.8, kept, tasks)


# -- the oracle: no function of the policy is called below


def knows(book: Book, job: Job) -> bool:
    return not job.task or book.tasks is None or job.task in book.tasks


def serves(book: Book, job: Job) -> bool:
    if job.queue == "celery":
        return ONLY_LABELLED not in book.capacity
    return LABEL + job.queue in book.capacity


def holds_when_empty(book: Book, job: Job) -> bool:
    return all(book.capacity.get(name, 0) >= amount for name, amount in job.amounts.items() if name != "alone")


def could_ever_take(book: Book, job: Job) -> bool:
    return knows(book, job) and serves(book, job) and holds_when_empty(book, job)


def has_room_now(book: Book, job: Job) -> bool:
    used = {name: amount for name, amount in book.allocated.items() if not name.startswith("queue:")}
    if any(amount > book.capacity.get(name, 1 if name == "alone" else 0) for name, amount in used.items()):
        return False
    if book.kept or used.get("alone") or (job.amounts.get("alone") and used.get("slots")):
        return False
    return all(
        book.capacity.get(name, 0) - used.get(name, 0) >= amount
        for name, amount in job.amounts.items()
        if name != "alone"
    )


def reason_by_brute_force(job: Job, books: list[Book], ahead: int) -> Reason | None:
    if not books:
        return Reason.NO_WORKER
    if not any(knows(book, job) for book in books):
        return Reason.NO_TASK
    possible = [book for book in books if knows(book, job) and serves(book, job)]
    if not possible:
        return Reason.NO_QUEUE
    asked = {name for name, amount in job.amounts.items() if amount and name != "alone"}
    if not all(any(book.capacity.get(name) for book in possible) for name in asked):
        return Reason.UNKNOWN_RESOURCE
    large = [book for book in possible if holds_when_empty(book, job)]
    if not large:
        return Reason.TOO_LARGE
    if not any(book.admitting for book in large):
        return Reason.NO_WORKER
    if any(book.admitting and has_room_now(book, job) for book in large):
        return Reason.BEHIND_SHAPE if ahead else None
    return Reason.ALONE if job.amounts.get("alone") else Reason.NO_ROOM


def test_reason_equals_that_of_a_brute_force_oracle_on_random_books() -> None:
    chance, seen = random.Random(16), Counter[Reason | None]()
    for _ in range(BOOKS):
        books = [random_book(chance, name) for name in "abcde"[: chance.randint(0, 5)]]
        job, ahead = random_job(chance), chance.choice([0, 0, 3])
        decision = judge(job.request, books, ahead, job.task)
        reason = None if isinstance(decision, Admission) else decision.reason
        assert reason == reason_by_brute_force(job, books, ahead), (job, books)
        seen[reason] += 1
    assert {None, *list(Reason)[:6], Reason.BEHIND_SHAPE, Reason.ALONE} <= set(seen), seen


def test_position_equals_that_of_a_brute_force_oracle_on_random_books() -> None:
    chance = random.Random(17)
    for _ in range(BOOKS):
        books = [random_book(chance, name) for name in "abcde"[: chance.randint(0, 5)]]
        kinds = [random_job(chance) for _ in range(chance.randint(1, 4))]
        backlog = [chance.choice(kinds) for _ in range(chance.randint(1, 8))]
        number = chance.randrange(len(backlog))
        expected = sum(any(could_ever_take(book, job) for book in books) for job in backlog[:number])
        assert count_before(Counter(job.filed for job in backlog[:number]), books) == expected, (backlog, books)


def test_position_leaves_out_jobs_that_outlive_every_worker() -> None:
    short, longer = (Book(name, {"cpus": 4, "slots": 4}, {}, left=left) for name, left in (("a", 1000), ("b", 90_000)))
    filed = {"cpus=1,slots=1,~60000": 2, "cpus=1,slots=1,^600000,~60000": 3, "cpus=1,slots=1": 4}
    assert count_before(filed, [short, longer]) == 6
    assert count_before(filed, [short, longer, replace(longer, left=None)]) == 9


def test_shortfall_equals_that_of_a_brute_force_oracle_on_random_books() -> None:
    chance = random.Random(18)
    for _ in range(BOOKS):
        books = [random_book(chance, name) for name in "abcde"[: chance.randint(0, 5)]]
        job = random_job(chance)
        serving = [book for book in books if serves(book, job)]
        shortfall = find_shortfall(job.request, books)
        possible = any(holds_when_empty(book, job) for book in serving)
        assert (shortfall is None) == (not serving or possible), (job, books)
        if shortfall is not None and shortfall.worker:
            largest = max(book.capacity.get(shortfall.resource, 0) for book in serving)
            assert shortfall.asked == job.amounts[shortfall.resource] > shortfall.largest
            assert (shortfall.asked > largest) == (not shortfall.combined)
            assert shortfall.combined or shortfall.largest == largest


# -- examples


def book(name: str, admitting: bool = True, allocated: Any = None, **capacity: int) -> Book:
    return Book(name, {"slots": 8, **capacity}, allocated or {}, admitting)


WIDE: Final = Request.of({"cpus": 128_000})
BIG: Final = book("worker-07", cpus=96_000)


def test_shortfall_names_the_largest_worker_and_its_amount() -> None:
    shortfall = find_shortfall(WIDE, [book("worker-01", cpus=8000), BIG, book("worker-09", cpus=96_000)])
    assert str(shortfall) == "asks for 128 CPUs; the largest registered worker has 96 CPUs (worker-07)"


def test_shortfall_of_memory_names_the_largest_memory_not_the_most_cpus() -> None:
    workers = [book("a", cpus=32_000, memory=2**34), book("b", cpus=8000, memory=2**35)]
    shortfall = find_shortfall(Request.of({"cpus": 1000, "memory": 2**36}), workers)
    assert str(shortfall) == "asks for 64 GiB memory; the largest registered worker has 32 GiB memory (b)"


def test_shortfall_tells_that_no_worker_has_all_of_it_together() -> None:
    workers = [book("a", cpus=96_000), book("b", cpus=8000, gpus=4)]
    shortfall = find_shortfall(Request.of({"cpus": 64_000, "gpus": 4}), workers)
    words = "asks for 4 gpus beside the rest of its request; the registered worker that comes closest has 0 gpus (a)"
    assert str(shortfall) == words


def test_shortfall_names_a_resource_that_nobody_publishes() -> None:
    shortfall = find_shortfall(Request.of({"cpus": 1000, "licence": 1}), [BIG])
    assert str(shortfall) == "asks for 1 licence; no registered worker publishes licence"


@pytest.mark.parametrize("workers", [[], [Book("a", {"slots": 1, "cpus": 1, ONLY_LABELLED: 1}, {})]])
def test_nothing_is_infeasible_without_a_worker_that_serves_the_queue(workers: list[Book]) -> None:
    assert find_shortfall(WIDE, workers) is None


def test_request_is_feasible_while_a_large_worker_admits_nothing() -> None:
    workers = [book("a", cpus=8000), book("b", admitting=False, cpus=128_000)]
    assert find_shortfall(WIDE, workers) is None
    assert judge(WIDE, workers) == Refusal(Reason.NO_WORKER, worker="b")


def test_too_large_request_is_so_while_no_worker_admits() -> None:
    workers = [book("a", admitting=False, cpus=8000)]
    assert judge(WIDE, workers) == Refusal(Reason.TOO_LARGE, "cpus", 128_000, 8000, "a")


def test_kinds_are_one_worker_of_each_capacity_first_by_name() -> None:
    workers = [book(name, allocated={"cpus": 1}, cpus=cpus) for name, cpus in (("c", 1), ("b", 1), ("a", 2))]
    assert kinds_of(workers) == [book("b", cpus=1), book("a", cpus=2)]
