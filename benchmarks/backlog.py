"""A backlog of 20,000 jobs: submitted behind it, and drained; and the memory of a waiting job in Redis."""

from __future__ import annotations

import time

import redis

from benchmarks.bench import Bench, Contest
from benchmarks.processes import SIDES, Side, submitter
from benchmarks.rounds import Sides
from benchmarks.throughput import CONCURRENCY, WARM_UP, rate_of

#: Jobs that wait, and jobs that are submitted behind them.
WAITING, BEHIND = 20_000, 1000

#: Maximum number of rounds of the backlog: one takes more than a minute.
MOST_ROUNDS = 3

#: Waiting jobs of which the memory is measured: fewer than the ledger holds at most.
REMEMBERED = 3000

#: Seconds between two looks at the memory. A batch of a submitter is under way for milliseconds.
LOOK_SECONDS = 0.5


def submit_behind_20000(bench: Bench) -> Sides:
    """Measure the jobs a second that one process submits one by one while 20,000 wait for a full worker."""
    return bench.once(long_backlog)[0]


def drain_20000(bench: Bench) -> Sides:
    """Measure the jobs a second of a backlog of 20,000, from the first start to the last end."""
    return bench.once(long_backlog)[1]


def long_backlog(bench: Bench) -> tuple[Sides, Sides]:
    """Return the rates of submission behind a long backlog, and of the worker that drains it.

    The worker is stopped (SIGSTOP) while jobs are submitted, and has room for two. The backlog itself is submitted in
    one call on both sides.
    """
    with bench.contest(concurrency=CONCURRENCY) as contest:

        def rates(side: Side) -> tuple[float, float]:
            sender, receiver = contest.senders[side], contest.workers[side]
            receiver.pause()
            try:
                sender.call("submit_together", task="bench.stamp", count=WAITING)
                with contest.metered(side, BEHIND, phase="submitted behind"):
                    seconds: float = sender.call("submit", task="bench.stamp", count=BEHIND)
            finally:
                receiver.resume()
            with contest.metered(side, WAITING + BEHIND, phase="run"):
                stamps: list[list[float]] = sender.call("gather")
            submitted, drained = BEHIND / seconds, rate_of(stamps)
            bench.say(f"  {side}: submitted {submitted:.0f} jobs/s, run {drained:.0f} jobs/s")
            return submitted, drained

        contest.warm_up("end_to_end", task="bench.noop", count=WARM_UP)
        ours, plain = contest.in_turn(rates, most=MOST_ROUNDS)
        return (
            Sides([submitted for submitted, _ in ours], [submitted for submitted, _ in plain]),
            Sides([drained for _, drained in ours], [drained for _, drained in plain]),
        )


def waiting_job_kb(bench: Bench) -> Sides:
    """Measure the memory of Redis for a waiting job, in kB (1,000 bytes), by the growth of `used_memory`.

    One round is enough: the value varies by a thousandth. The worker is stopped and full.
    """
    with bench.contest(concurrency=CONCURRENCY) as contest:
        contest.warm_up("end_to_end", task="bench.noop", count=WARM_UP)
        ours, plain = (_growth(contest, side) for side in SIDES)
        bench.say(f"  ours: {ours:.3f} kB, plain: {plain:.3f} kB")
        return Sides([ours], [plain])


def _growth(contest: Contest, side: Side) -> float:
    """Return the kB by which Redis grows with each job that is submitted to the stopped worker of a side.

    The submitters have ended when the memory is read, so that their connections and subscriptions do not count.
    """
    receiver = contest.workers[side]
    receiver.pause()
    try:
        with redis.Redis.from_url(contest.pair.redis_url) as client:
            used = []
            for jobs in (WARM_UP, REMEMBERED):
                with submitter(side, contest.pair) as sender:
                    sender.call("submit", task="bench.noop", count=jobs)
                used.append(_settled_memory(client))
            return (used[1] - used[0]) / REMEMBERED / 1000
    finally:
        receiver.kill()  # a warm end would run the jobs first


def _settled_memory(client: redis.Redis) -> int:
    """Return Redis's memory in use when it stopped growing: the last batches of jobs have arrived then."""
    used, before = int(client.info("memory")["used_memory"]), 0
    while used > before:
        time.sleep(LOOK_SECONDS)
        before, used = used, int(client.info("memory")["used_memory"])
    return used
