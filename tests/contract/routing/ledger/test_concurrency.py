"""Many submitters and several workers at once: no book is ever above its capacity, and every job runs once."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Final

import pytest

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Arrived, Ended, Filled
from celery_capacity.routing.model.amounts import CPUS, format_cpus
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import Book, order
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW, open_ledger

SUBMITTERS: Final = 32
JOBS: Final = 10_000
#: Every request fits on an empty `wide`.
CAPACITIES: Final = {
    "wide": {"cpus": 16_000, "memory": 64, "slots": 24, "licence": 2},
    "even": {"cpus": 8_000, "memory": 32, "slots": 8},
    "odd": {"cpus": 6_500, "memory": 64, "slots": 40, "licence": 1},
    "slim": {"cpus": 2_000, "memory": 8, "slots": 3},
}
#: Seconds after which something hangs. An idle machine takes a twentieth of that.
PATIENCE: Final = 600.0


def random_request(chance: random.Random) -> Request:
    return Request.of(
        {
            "cpus": chance.choice([0, 250, 500, 1000, 1000, 2000, 3500, 8000, 16_000]),
            "memory": chance.choice([0, 0, 1, 4, 16]),
            "licence": chance.choice([0, 0, 0, 0, 1, 2]),
        }
    )


class Bench:
    """State that the threads share. A job's id is `<seq>`, and its request is known before the ledger is."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self.requests = [random_request(chance) for _ in range(JOBS)]
        self.priorities = [chance.choice([0, 0, 0, 3, 9]) for _ in range(JOBS)]
        self.starts: Counter[str] = Counter()
        self.ended = 0
        self.samples = 0
        self.lock = threading.Lock()
        self.over = threading.Event()

    def request(self, job: str) -> Request:
        return self.requests[int(job)]

    def submit(self, ledger: Ledger, own: int) -> int:
        """Submit every 32nd job, and return how many of them had to wait."""
        waiting = 0
        for seq in range(own, JOBS, SUBMITTERS):
            place = order(self.priorities[seq], seq)
            done = ledger.submit(str(seq), self.requests[seq].shape, place, MESSAGE)
            assert done.state in ("admitted", "waiting")
            waiting += done.state == "waiting"
        return waiting

    def work(self, ledger: Ledger, name: str) -> None:
        """Claim each job that arrives, and end running jobs in random order, keeping a count of its own."""
        client: Any = ledger.client
        chance = random.Random(name)
        book = Book(name, CAPACITIES[name], {})
        running: list[tuple[str, Token]] = []
        nonces = 0
        while not self.over.is_set():
            first = client.brpop(f"queue.{name}", 0.01) if not running else None
            messages = ([first[1]] if first else []) + (client.rpop(f"queue.{name}", 50) or [])
            tags = [message.rpartition(b'"delivery_tag":"')[2].removesuffix(b'"}}').decode() for message in messages]
            arrived = [
                Arrived(job, Token.parse(token), f"{job}:{token}") for job, token in (tag.split(":") for tag in tags)
            ]
            chance.shuffle(running)
            ending = running[: chance.randrange(len(running) + 1)]
            del running[: len(ending)]
            nonces += 1
            settled = ledger.settle(
                name,
                f"{name}-life",
                ended=[Ended(job, token, Outcome.SUCCEEDED) for job, token in ending],
                arrived=arrived,
                most_losses=MOST_LOSSES,
                # Half of the time the next jobs that fit come with the answer, half of the time by the queue.
                nonce=f"{name}{nonces}" if chance.random() < 0.5 else "",
            )
            assert [handed.verdict for handed in settled.released] == ["released"] * len(ending)
            assert all(claim.ok for claim in settled.claimed)
            new = [(claim.job, claim.token) for claim in settled.claimed]
            new += [(handed.job, handed.token) for handed in settled.handed_over]
            for job, _ in ending:
                book = book.without(self.request(job))
            for job, _ in new:
                book = book.holding(self.request(job))
            assert book.over is None, f"{name} runs more than it has: {book.allocated}"
            running += new
            with self.lock:
                self.starts.update(job for job, _ in new)
                self.ended += len(ending)
                if self.ended == JOBS:
                    self.over.set()

    def watch(self, ledger: Ledger) -> None:
        """Read the books as of one moment, again and again."""
        while not self.over.is_set():
            sample(ledger, self.request)
            self.samples += 1


def sample(ledger: Ledger, request_of: Callable[[str], Request]) -> None:
    """Check that each book is the sum of its held jobs, and that no book is above its capacity.

    The sums of the cluster have to be those of the books.
    """
    pipe = ledger.client.pipeline(transaction=True)
    for name in CAPACITIES:
        pipe.hgetall(keys.book(name))
        pipe.hgetall(keys.held(name))
        pipe.zscore(keys.FREE, name)
    pipe.mget(keys.ALLOCATED, keys.ALLOCATED_CPUS)
    *replies, (allocated, shown) = pipe.execute()
    total = 0
    for name, capacity in CAPACITIES.items():
        fields, held, free = (replies.pop(0) for _ in range(3))
        book = Book(name, capacity, {})
        for job in held:
            book = book.holding(request_of(job.decode()))
        amounts = {field.decode()[2:]: int(value) for field, value in fields.items() if field.startswith(b"a.")}
        assert book.over is None, f"{name} is above its capacity: {book.allocated}"
        assert {resource: amount for resource, amount in amounts.items() if amount} == {
            resource: amount for resource, amount in book.allocated.items() if amount
        }, name
        assert free == (book.free(CPUS) if book.free("slots") >= 1 else None), name
        total += amounts.get(CPUS, 0)
    assert (int(allocated), shown.decode()) == (total, format_cpus(total))


@pytest.fixture
def ledgers(redis_url: str) -> Iterator[Callable[[], Ledger]]:
    """Yield a function that opens a ledger, so that each thread has a connection of its own."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(open_ledger(redis_url))


@pytest.mark.long(70)
def test_32_submitters_and_10000_random_requests_are_never_over_capacity(ledgers: Callable[[], Ledger]) -> None:
    bench = Bench(seed=20_260_101)
    first = ledgers()
    for name, capacity in CAPACITIES.items():
        done = first.register(name, f"{name}-life", f"queue.{name}", Request.of(capacity).shape, VIEW)
        assert done == Filled(0)
    end = time.monotonic() + PATIENCE
    with ThreadPoolExecutor(SUBMITTERS + len(CAPACITIES) + 1) as threads:
        watching = threads.submit(bench.watch, ledgers())
        workers: list[Future[None]] = [threads.submit(bench.work, ledgers(), name) for name in CAPACITIES]
        for future in (*workers, watching):
            # A thread that failed ends the others.
            future.add_done_callback(lambda _: bench.over.set())
        submitting = [threads.submit(bench.submit, ledgers(), number) for number in range(SUBMITTERS)]
        try:
            waited = sum(submitter.result(PATIENCE) for submitter in submitting)
            for future in (*workers, watching):
                future.result(max(0.0, end - time.monotonic()))
        finally:
            bench.over.set()
    assert waited > JOBS / 4, "the workers were full most of the time"
    assert bench.samples > 100
    assert bench.starts == Counter(str(seq) for seq in range(JOBS)), "each job runs once"
    sample(first, bench.request)
    assert first.client.mget(keys.ALLOCATED, keys.ALLOCATED_CPUS) == [b"0", b"0"]
    assert first.client.zcard(keys.SHAPES) == first.client.zcard(keys.UNCLAIMED) == 0
    for kind in ("wait", "held"):
        assert list(first.client.scan_iter(match=keys.KEYS[kind] + "*")) == []
    assert first.client.hmget(keys.COUNTERS, "stale.claim", "stale.release", "drift", "lost") == [None] * 4
    counted = first.client.hmget(keys.COUNTERS, "admitted", "filed")
    assert counted == [str(JOBS).encode(), str(waited).encode()]
    for name in CAPACITIES:
        assert first.leave(name, f"{name}-life") == 0


def test_many_submits_of_one_job_make_one_attempt(ledgers: Callable[[], Ledger]) -> None:
    first = ledgers()
    first.register("w", "w-life", "queue.w", "cpus=64000,slots=64", VIEW)
    barrier = threading.Barrier(8)

    def submit(ledger: Ledger) -> list[str]:
        barrier.wait()
        return [ledger.submit(f"job-{n}", "cpus=1000,slots=1", order(0, n), MESSAGE).state for n in range(30)]

    with ThreadPoolExecutor(8) as threads:
        states = list(threads.map(submit, [ledgers() for _ in range(8)]))
    assert Counter(state for each in states for state in each) == {"admitted": 30, "exists": 210}
    assert first.client.llen("queue.w") == 30


def test_many_claims_of_one_attempt_grant_one(ledgers: Callable[[], Ledger]) -> None:
    first = ledgers()
    first.register("w", "w-life", "queue.w", "cpus=64000,slots=64", VIEW)
    for n in range(30):
        first.submit(f"job-{n}", "cpus=1000,slots=1", order(0, n), MESSAGE)
    barrier = threading.Barrier(8)

    def claim(number: int) -> int:
        ledger = ledgers()
        barrier.wait()
        arrived = [Arrived(f"job-{n}", Token(1, 1), f"nonce-{number}") for n in range(30)]
        claimed = [
            ledger.settle("w", "w-life", arrived=[message], most_losses=MOST_LOSSES).claimed[0] for message in arrived
        ]
        return sum(attempt.ok for attempt in claimed)

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(claim, range(8))) == 30
