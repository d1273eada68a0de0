"""Workers are asked to end in every way and at any moment: their jobs go to others, and no job counts as lost."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
from collections.abc import Callable

import pytest
from celery.exceptions import WorkerLostError
from sqlalchemy import text

from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import READY, Platform, Pool, Process
from tests.fixtures.waiting import until

#: Number of worker ends in all; ROUNDS=100 for a night.
ROUNDS = int(os.environ.get("ROUNDS", "8"))


def warm(submitter: Submitter, worker: Process) -> None:
    worker.signal(signal.SIGTERM)


def cold(submitter: Submitter, worker: Process) -> None:
    worker.signal(signal.SIGQUIT)


def warm_and_then_cold(submitter: Submitter, worker: Process) -> None:
    worker.signal(signal.SIGTERM)
    worker.signal(signal.SIGQUIT)


def by_control(submitter: Submitter, worker: Process) -> None:
    submitter.app.control.shutdown(destination=[f"{worker.name}@{socket.gethostname()}"])


WAYS: list[Callable[[Submitter, Process], None]] = [warm, cold, warm_and_then_cold, by_control]


@pytest.mark.long
@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_workers_that_are_told_to_end_at_any_moment_lose_nothing(
    platform: Platform, submitter: Submitter, oracle: Oracle, pool: Pool
) -> None:
    chance, pause = random.Random(11), threading.Event()
    platform.worker("b", cpus=2, pool="threads")
    # Send no more jobs than the remaining worker can run.
    with oracle.flow(submitter, every=0.15, seconds=0.2):
        for number in range(ROUNDS // 2):
            soft = "0.1" if number % 3 == 2 else ""
            worker = platform.worker("a", cpus=4, pool=pool, ready=False, SOFT_SHUTDOWN_SECONDS=soft)
            oracle.asked(worker)
            way = WAYS[number % len(WAYS)]
            # A worker that is not ready yet reacts to signals only.
            if way is by_control or chance.random() < 0.8:
                worker.wait_for(READY)
            pause.wait(chance.uniform(0.0, 0.6))
            way(submitter, worker)
            worker.wait(60)
        oracle.whole_again(f"end workers ({pool})")
    oracle.assert_zeros()
    with platform.engine.connect() as connection:
        lost = connection.execute(text("SELECT id, losses FROM jobs WHERE losses > 0")).all()
    assert lost == []


@pytest.mark.long
@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_cold_shutdown_starts_no_job_twice_that_may_start_once(
    platform: Platform, submitter: Submitter, oracle: Oracle, pool: Pool
) -> None:
    # A pool of threads cannot break a body off: there the worker waits for the body.
    worker = platform.worker("a", cpus=2, pool=pool)
    once = oracle.send(submitter, seconds=30.0, rerun=False, expected=["lost"])
    again = oracle.send(submitter, seconds=0.2)
    submitter.ended(again)
    until(lambda: oracle.starts_of(once) == 1, "its body has begun")
    oracle.asked(worker)
    other = platform.worker("b", cpus=2, pool="threads")
    cold(submitter, worker)
    worker.wait(60)
    row = submitter.ended(once)
    assert (row.state, row.attempt, row.losses) == ("lost", 1, 1)
    assert row.error
    with pytest.raises(WorkerLostError):
        submitter.value(once)
    oracle.whole_again(f"QUIT with a job that may start once ({pool})")
    oracle.assert_zeros()
    assert oracle.starts_of(once) == 1
    assert other.alive
