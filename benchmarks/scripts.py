"""Cost of the ledger's scripts and reads, beside the cheapest call that Redis can answer to the same client."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.bench import Bench
from benchmarks.books import CAPACITY_WITH_QUEUE, CPUS, REQUEST, REQUEST_OF_QUEUE, Books, books
from benchmarks.costs.reading import Costs, Meter
from benchmarks.rounds import Sides, in_turn, percentile
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Submitted

#: Calls of each side in one round.
CALLS = 500

#: Text of the bare script.
BARE = "return 1"

#: Admissions between two releases, for the profile: half of a worker's capacity.
BATCH = CPUS // 2

#: Number of jobs in the backlog, and number of their shapes.
WAITING, SHAPES = 100_000, 50

#: Reads of one pipeline, and pipelines of one round.
READS, PIPELINES = 1000, 10


def admit_vs_evalsha_3(bench: Bench) -> Sides:
    """Measure an admission with 3 workers beside a bare EVALSHA, in milliseconds (p50)."""
    return admissions(bench, workers=3, waiting=0)


def admit_vs_evalsha_10000(bench: Bench) -> Sides:
    """Measure an admission with 10,000 workers beside a bare EVALSHA, in milliseconds (p50)."""
    return admissions(bench, workers=10_000, waiting=0)


def admit_vs_evalsha_10000_waiting_100000(bench: Bench) -> Sides:
    """Measure an admission with 10,000 workers while 100,000 jobs of 50 shapes wait, in milliseconds (p50)."""
    return admissions(bench, workers=10_000, waiting=WAITING)


def admit_rare_queue_1000(bench: Bench) -> Sides:
    """Measure the admission of a job of a rare queue beside one of the default queue, in milliseconds (p50).

    One of 1,000 workers serves the rare queue. All serve the default queue.
    """
    with bench.pair() as pair, books(pair, 999) as opened:
        opened.register("x", CAPACITY_WITH_QUEUE)
        sides = paired(
            bench, lambda: admission(opened, REQUEST_OF_QUEUE), lambda: admission(opened), "in the default queue"
        )
        bench.profile = admission_costs(opened, REQUEST_OF_QUEUE)
        return sides


def admissions(bench: Bench, workers: int, waiting: int) -> Sides:
    """Return per round the p50 of a job's admission, with its delivery, and the p50 of a bare EVALSHA.

    Both go through the ledger's own client. Admitted jobs are released outside the timed part.
    """
    with bench.pair() as pair, books(pair, workers) as opened:
        opened.fill_backlog(waiting, SHAPES)
        client = opened.ledger.client
        bare = client.script_load(BARE)

        def evalsha() -> float:
            return milliseconds(lambda: client.evalsha(bare, 0))

        sides = paired(bench, lambda: admission(opened), evalsha, "EVALSHA")
        bench.profile = admission_costs(opened)
        return sides


def read_vs_ping(bench: Bench) -> Sides:
    """Measure a read of `resource:allocated_cpus` beside a PING, in milliseconds (p50)."""
    with bench.pair() as pair, books(pair, workers=3) as opened:
        ledger = opened.ledger
        return paired(
            bench,
            lambda: milliseconds(ledger.allocated_cpus),
            lambda: milliseconds(ledger.client.ping),
            "PING",
        )


def reads_1000_ms(bench: Bench) -> Sides:
    """Measure 1,000 reads of `resource:allocated_cpus` in one pipeline, in milliseconds (p50)."""
    with bench.pair() as pair, books(pair, workers=3) as opened:
        client = opened.ledger.client

        def read() -> None:
            pipe = client.pipeline(transaction=False)
            for _ in range(READS):
                pipe.get(keys.ALLOCATED_CPUS)
            if pipe.execute() != [b"0"] * READS:
                raise RuntimeError("a read of the allocated CPUs was wrong")

        read()
        sides = Sides()
        for _ in range(bench.rounds):
            sides.ours.append(percentile([milliseconds(read) for _ in range(PIPELINES)], 0.5))
            bench.say(f"  ours: {sides.ours[-1]:.2f} ms")
        return sides


def paired(bench: Bench, ours: Callable[[], float], plain: Callable[[], float], peer: str) -> Sides:
    """Return the p50 of both sides per round, of single calls in turn.

    So a slowdown of the machine affects both sides.
    """
    in_turn(CALLS // 10, ours, plain)  # connections and caches are warm from here on
    sides = Sides()
    for _ in range(bench.rounds):
        mine, other = in_turn(CALLS, ours, plain)
        sides.ours.append(percentile(mine, 0.5))
        sides.plain.append(percentile(other, 0.5))
        bench.say(f"  ours: {sides.ours[-1]:.3f} ms, {peer}: {sides.plain[-1]:.3f} ms")
    return sides


def admission(opened: Books, request: str = REQUEST) -> float:
    """Return the milliseconds of one admission."""
    job, place = opened.new_job()
    answers: list[Submitted] = []
    taken = milliseconds(lambda: answers.append(opened.ledger.submit(job, request, place, opened.message)))
    opened.release(job, answers[0])
    return taken


def admission_costs(opened: Books, request: str = REQUEST) -> list[str]:
    """Return the server's work in one admission, and its duration by the server's own count."""
    costs, meter = Costs(), Meter(opened.ledger.client)
    for _ in range(CALLS // BATCH):
        jobs = [opened.new_job() for _ in range(BATCH)]
        before = meter.read()
        answers = [opened.ledger.submit(job, request, place, opened.message) for job, place in jobs]
        costs.add(meter.read().since(before), BATCH)
        for (job, _), answer in zip(jobs, answers, strict=True):
            opened.release(job, answer)
    return costs.lines("ours")


def milliseconds(action: Callable[[], object]) -> float:
    """Return the duration of one call, in milliseconds."""
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1000
