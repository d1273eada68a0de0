"""Messages that are lost, doubled or invalid: the lease and not the message decides what runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.breaking.faults import World
from tests.faults.judging.oracle import read
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.processes.stopping import stop_deaf
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"


@pytest.fixture
def stopped(platform: Platform) -> Iterator[Process]:
    """Yield the worker `a`, stopped; it goes on at the end of the test in any case."""
    worker = platform.worker("a", cpus=4)
    stop_deaf(platform, worker)
    yield worker
    os.killpg(worker.pid, signal.SIGCONT)


def test_message_lost_on_its_way_is_delivered_again_as_the_same_attempt(
    platform: Platform, stopped: Process, submitter: Submitter
) -> None:
    job = submitter.send(ADD, 40, 2, cpus=4)
    queue = submitter.view("a")["queue"]
    message: Any = platform.redis.lpop(queue)
    assert message is not None and job in message.decode()
    assert platform.redis.llen(queue) == 0
    os.killpg(stopped.pid, signal.SIGCONT)
    assert submitter.value(job) == 42
    row = submitter.ended(job)
    assert (row.state, row.attempt, row.losses) == ("succeeded", 1, 0)
    assert row.started_at.timestamp() - row.admitted_at.timestamp() >= platform.settings.start_timeout
    assert submitter.outcomes(job) == ["succeeded"]


def test_a_message_that_is_delivered_twice_runs_once(
    platform: Platform, stopped: Process, submitter: Submitter, oracle: Oracle
) -> None:
    job = oracle.send(submitter, seconds=0.3)
    queue = submitter.view("a")["queue"]
    messages: Any = platform.redis.lrange(queue, 0, -1)
    (message,) = messages
    platform.redis.rpush(queue, message, message)
    os.killpg(stopped.pid, signal.SIGCONT)
    assert submitter.ended(job).state == "succeeded"
    platform.redis.rpush(queue, message)
    stopped.wait_for("a stale or doubled message")
    oracle.assert_zeros()
    assert [(line.what, line.attempt) for line in read(oracle.trace)] == [("start", 1), ("end", 1)]
    assert submitter.outcomes(job) == ["succeeded"]


def test_raw_messages_that_are_pushed_five_times_run_once(
    platform: Platform, stopped: Process, submitter: Submitter, oracle: Oracle
) -> None:
    jobs = oracle.sends(submitter, 20, seconds=0.02)
    queue = submitter.view("a")["queue"]
    messages: Any = platform.redis.lrange(queue, 0, -1)
    for _ in range(5):
        platform.redis.rpush(queue, *messages)
        # The queue of another worker is no way around the lease, and neither is the queue of old producers.
        platform.redis.rpush("celery", *messages)
    os.killpg(stopped.pid, signal.SIGCONT)
    oracle.whole_again("push messages five times")
    oracle.assert_zeros()
    for job in jobs:
        assert submitter.outcomes(job) == ["succeeded"]
    # The messages come once more, after the end of the jobs.
    platform.redis.rpush(queue, *messages)
    until(lambda: platform.redis.llen(queue) == 0, "they were taken")
    oracle.sends(submitter, 4)
    oracle.assert_zeros()


@pytest.mark.parametrize("kind", ["push garbage", "push messages twice"])
def test_what_is_pushed_into_the_queues_under_load_harms_nobody(
    world: World, submitter: Submitter, oracle: Oracle, kind: str
) -> None:
    for name in ("a", "b"):
        world.start(name, ready=True)
    with oracle.flow(submitter):
        for _ in range(3):
            oracle.until_more(10)
            with world.broken(kind):
                pass
        oracle.until_more(10)
    oracle.assert_zeros()
