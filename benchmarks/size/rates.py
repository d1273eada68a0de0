"""The CPU time of Redis's thread for a job and for a heartbeat, with 1, 8 and 64 clients at once.

Each client is a thread with a connection of its own. It makes the ledger's calls, so nothing else stands between it and
Redis. Clients and Redis have a core each. The server's time is what counts: it includes the work for each connection,
and Redis's thread is the part that no second machine can relieve.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.bench import Bench
from benchmarks.books import MOST_LOSSES, REQUEST, Books, books
from benchmarks.size.scale import Scale
from benchmarks.size.server_time import main_thread_seconds
from celery_capacity.routing.ledger.keys import private_queue
from celery_capacity.routing.ledger.replies import Arrived, Ended
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import NO_ATTEMPT, Token

#: Numbers of clients.
CLIENTS: Final = (1, 8, 64)
#: Workers, and the jobs of a pass.
WORKERS: Final = 1000
JOBS: Final = 3200
#: Passes of each number of clients. The cheapest counts: other programs on the machine only make a pass dearer.
PASSES: Final = 3
#: Part of Redis's core that the formula gives to jobs and heartbeats. The rest is for results, duties and peaks.
SHARE: Final = 0.8
#: Seconds between two heartbeats of a worker (`PLATFORM_RENEW_INTERVAL`).
INTERVAL: Final = 10.0
#: The calls for a job, in their order.
STEPS: Final = ("submit", "deliver", "claim", "release", "forget")


@dataclass
class Job:
    """A job on its way through the calls: its id and order, then its worker and token, then the entry of its end."""

    id: str
    place: int
    worker: str = ""
    token: Token = NO_ATTEMPT
    entry: str = ""


def jobs_a_second(job_us: float, beat_us: float, workers: int) -> float:
    """Return the highest rate of one Redis that also takes the heartbeats of so many workers."""
    left = SHARE - workers * beat_us / 1e6 / INTERVAL
    return max(0.0, left / (job_us / 1e6))


def rated(bench: Bench, scale: Scale) -> dict[str, float]:
    """Measure each call with each number of clients."""
    values: dict[str, float] = {}
    with bench.pair() as pair, books(pair, scale.of(WORKERS)) as opened:
        _steps(opened, CLIENTS[-1], scale.of(JOBS))  # opens the connections
        for clients in CLIENTS:
            passes = [_steps(opened, clients, scale.of(JOBS)) for _ in range(PASSES)]
            taken = min(passes, key=lambda steps: sum(steps.values()))
            beat = min(_beats(opened, clients, scale.of(WORKERS)) for _ in range(PASSES))
            values |= {f"rate_{name}_us": taken[name] for name in STEPS}
            values |= {f"rate_job_us_{clients}": sum(taken.values()), f"rate_beat_us_{clients}": beat}
    most = CLIENTS[-1]
    highest = jobs_a_second(values[f"rate_job_us_{most}"], values[f"rate_beat_us_{most}"], 0)
    return values | {"rate_jobs_s": highest}


def _steps(side: Books, clients: int, jobs: int) -> dict[str, float]:
    """Take jobs through all steps, and return the microseconds of Redis for each step of a job."""
    shares = [[Job(*side.new_job()) for _ in range(jobs // clients)] for _ in range(clients)]
    made = sum(map(len, shares))
    calls: dict[str, Callable[[Job], None]] = {
        "submit": lambda job: _submit(side, job),
        "deliver": lambda job: _deliver(side, job),
        "claim": lambda job: _claim(side, job),
        "release": lambda job: _release(side, job),
        "forget": lambda job: _forget(side, job),
    }
    return {name: 1e6 * _together(side, shares, calls[name]) / made for name in STEPS}


def _beats(side: Books, clients: int, workers: int) -> float:
    """Return the microseconds of Redis for a heartbeat of a worker that holds nothing."""
    names = [f"w{number}" for number in range(workers)]
    shares = [names[number::clients] for number in range(clients)]
    return 1e6 * _together(side, shares, lambda worker: side.renew(worker, [])) / workers


def _together(side: Books, shares: Sequence[Sequence[Any]], call: Callable[[Any], None]) -> float:
    """Make the call for each item, a thread for each share. Return the seconds of the server's main thread."""
    errors: list[BaseException] = []

    def work(items: Sequence[Any]) -> None:
        try:
            for item in items:
                call(item)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(items,)) for items in shares]
    before = main_thread_seconds(side.ledger.client)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = main_thread_seconds(side.ledger.client) - before
    if errors:
        raise errors[0]
    return taken


def _submit(side: Books, job: Job) -> None:
    answer = side.ledger.submit(job.id, REQUEST, job.place, side.message)
    if answer.state != "admitted":
        raise RuntimeError(f"a job that fits became {answer.state}")
    job.worker, job.token = str(answer.worker), Token(side.ledger.epoch, answer.attempt or 0)


def _deliver(side: Books, job: Job) -> None:
    client: Any = side.ledger.client
    if client.brpop(private_queue(job.worker, side.incarnation(job.worker)), timeout=1) is None:
        raise RuntimeError("an admitted job has no message")


def _claim(side: Books, job: Job) -> None:
    arrival = Arrived(job.id, job.token, str(uuid.uuid4()))
    incarnation = side.incarnation(job.worker)
    settled = side.ledger.settle(job.worker, incarnation, arrived=[arrival], most_losses=MOST_LOSSES)
    if not settled.claimed[0].ok:
        raise RuntimeError(f"{job.worker} could not claim what was admitted to it")


def _release(side: Books, job: Job) -> None:
    end = Ended(job.id, job.token, Outcome.SUCCEEDED)
    settled = side.ledger.settle(job.worker, side.incarnation(job.worker), ended=[end], most_losses=MOST_LOSSES)
    job.entry = settled.released[0].entry or ""


def _forget(side: Books, job: Job) -> None:
    side.ledger.ack_transitions([(job.entry, job.id)])
