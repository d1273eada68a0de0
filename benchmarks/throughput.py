"""Throughput in jobs a second: submitted, end to end, and drained from a backlog."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks.bench import Bench
from benchmarks.processes import SIDES, Side, submitter, worker
from benchmarks.rounds import Sides

#: Jobs of one round of each figure.
SUBMITTED, END_TO_END, DRAINED = 1000, 1000, 1000

#: Processes that submit at once, and the jobs of each.
SUBMITTERS, EACH = 4, 250

#: Jobs of one round submitted in one call, and as a chord: more than fit in a chunk, and than workers have room for.
TOGETHER, CHORD = 5000, 1000

#: Jobs that run before the first round, so that connections, scripts and pools are warm.
WARM_UP = 50

#: Worker processes (prefork) of each side, and the CPUs that ours publishes for them.
CONCURRENCY = 2


def submit(bench: Bench) -> Sides:
    """Measure the jobs a second that one process submits one by one, while a worker has room for all of them.

    The worker is stopped (SIGSTOP) while the clock runs. It stands for workers on other machines; ours is admitted to
    and delivered to as if it ran. Afterwards it runs everything, so that a lost job would be noticed.
    """
    with bench.contest(pool="threads", concurrency=2 * SUBMITTED) as contest:

        def rate(side: Side) -> float:
            sender, receiver = contest.senders[side], contest.workers[side]
            receiver.pause()
            try:
                with contest.metered(side, SUBMITTED):
                    seconds: float = sender.call("submit", task="bench.noop", count=SUBMITTED)
            finally:
                receiver.resume()
            sender.call("gather")
            bench.say(f"  {side}: {SUBMITTED / seconds:.0f} jobs/s")
            return SUBMITTED / seconds

        contest.warm_up("end_to_end", task="bench.noop", count=WARM_UP)
        return Sides(*contest.in_turn(rate))


def submit_4(bench: Bench) -> Sides:
    """Measure the jobs a second that four processes submit at once, each one by one.

    The rest is as in `submit`.
    """
    with bench.contest(pool="threads", concurrency=2 * SUBMITTERS * EACH) as contest, ExitStack() as stack:
        senders = {
            side: [
                contest.senders[side],
                *(stack.enter_context(submitter(side, contest.pair)) for _ in range(SUBMITTERS - 1)),
            ]
            for side in SIDES
        }

        def rate(side: Side) -> float:
            receiver, count = contest.workers[side], SUBMITTERS * EACH
            receiver.pause()
            try:
                with contest.metered(side, count, senders=senders[side]):
                    begin = time.perf_counter()
                    for sender in senders[side]:
                        sender.begin("submit", task="bench.noop", count=EACH)
                    for sender in senders[side]:
                        sender.answer("submit")
                    seconds = time.perf_counter() - begin
            finally:
                receiver.resume()
            for sender in senders[side]:
                sender.call("gather")
            bench.say(f"  {side}: {count / seconds:.0f} jobs/s")
            return count / seconds

        for side in SIDES:
            for sender in senders[side]:
                sender.call("end_to_end", task="bench.noop", count=WARM_UP)
        return Sides(*contest.in_turn(rate))


def end_to_end(bench: Bench) -> Sides:
    """Measure the jobs a second from the first submission to the last result.

    There are one submitter and two worker processes.
    """
    with bench.contest(concurrency=CONCURRENCY) as contest:

        def rate(side: Side) -> float:
            with contest.metered(side, END_TO_END):
                seconds: float = contest.senders[side].call("end_to_end", task="bench.noop", count=END_TO_END)
            bench.say(f"  {side}: {END_TO_END / seconds:.0f} jobs/s")
            return END_TO_END / seconds

        contest.warm_up("end_to_end", task="bench.noop", count=WARM_UP)
        return Sides(*contest.in_turn(rate))


def bulk(bench: Bench) -> Sides:
    """Measure the jobs a second that a process submits in one call: `app.submit_many` beside a group of plain Celery.

    The worker is stopped while the clock runs, as in `submit`, and has room for two. So most of our jobs are filed, as
    in a usual bulk.
    """
    with bench.contest(concurrency=CONCURRENCY) as contest:

        def rate(side: Side) -> float:
            sender, receiver = contest.senders[side], contest.workers[side]
            receiver.pause()
            try:
                with contest.metered(side, TOGETHER):
                    seconds: float = sender.call("submit_together", task="bench.noop", count=TOGETHER)
            finally:
                receiver.resume()
            sender.call("gather")
            bench.say(f"  {side}: {TOGETHER / seconds:.0f} jobs/s")
            return TOGETHER / seconds

        contest.warm_up("end_to_end", task="bench.noop", count=WARM_UP)
        return Sides(*contest.in_turn(rate))


def chord(bench: Bench) -> Sides:
    """Measure the jobs a second of a chord of 1,000 tasks, from the call to the result of its body.

    There are two worker processes.
    """
    with bench.contest(concurrency=CONCURRENCY) as contest:

        def rate(side: Side) -> float:
            with contest.metered(side, CHORD):
                seconds: float = contest.senders[side].call("chord", task="bench.noop", count=CHORD)
            bench.say(f"  {side}: {CHORD / seconds:.0f} jobs/s")
            return CHORD / seconds

        contest.warm_up("chord", task="bench.noop", count=WARM_UP)
        return Sides(*contest.in_turn(rate))


def drain(bench: Bench) -> Sides:
    """Measure the jobs a second of a backlog submitted while no worker ran, from the first start to the last end.

    The tasks record starts and ends themselves, so that the boot time of a worker is not included.
    """
    return bench.once(unattended)[1]


def submit_unattended(bench: Bench) -> Sides:
    """Measure the jobs a second that one process submits one by one while no worker lives."""
    return bench.once(unattended)[0]


def unattended(bench: Bench) -> tuple[Sides, Sides]:
    """Return the rates of submission while no worker lives, and those of the worker that starts afterwards."""
    with bench.contest(workers=False) as contest:

        def rates(side: Side) -> tuple[float, float]:
            sender = contest.senders[side]
            with contest.metered(side, DRAINED, phase="submitted"):
                seconds: float = sender.call("submit", task="bench.stamp", count=DRAINED)
            submitted = DRAINED / seconds
            with (
                worker(side, contest.pair, concurrency=CONCURRENCY, cpus=CONCURRENCY) as receiver,
                contest.metered(side, DRAINED, phase="run", worker=receiver),
            ):
                stamps: list[list[float]] = sender.call("gather")
            drained = rate_of(stamps)
            bench.say(f"  {side}: submitted {submitted:.0f} jobs/s, run {drained:.0f} jobs/s")
            return submitted, drained

        for side in SIDES:
            with worker(side, contest.pair, concurrency=CONCURRENCY, cpus=CONCURRENCY):
                contest.senders[side].call("end_to_end", task="bench.noop", count=WARM_UP)
        ours, plain = contest.in_turn(rates)
        return (
            Sides([submitted for submitted, _ in ours], [submitted for submitted, _ in plain]),
            Sides([drained for _, drained in ours], [drained for _, drained in plain]),
        )


def rate_of(stamps: Sequence[Sequence[float]]) -> float:
    """Return the jobs a second from the first start to the last end, of (start, end) in seconds.

    >>> rate_of([(1.0, 1.5), (2.0, 3.0)])
    1.0
    """
    return len(stamps) / (max(end for _, end in stamps) - min(start for start, _ in stamps))
