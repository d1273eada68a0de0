"""The process of a worker dies at each step of a job's handling and of its own life.

The surviving workers, or the next worker, go on from the contents of the stores.
"""

from __future__ import annotations

import signal
from importlib import import_module
from itertools import count
from operator import attrgetter
from typing import Any

import pytest

from celery_capacity.routing.ledger import keys
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import READY, Platform, Pool, Process
from tests.fixtures.waiting import until

#: Number of the call at which the process dies. A later call is chosen so that earlier steps are in flow.
LATER = "@4"

DELIVER_AND_CLAIM = (
    f"before celery_capacity.workers.settle.settle_thread:LedgerThread.arrive{LATER}",
    f"before celery_capacity.routing.ledger.client:Ledger.settle{LATER}",
    f"after celery_capacity.routing.ledger.client:Ledger.settle{LATER}",
    f"before celery_capacity.workers.execute.start_queue:StartQueue.take{LATER}",
)
FINISH = (
    f"before celery_capacity.workers.settle.settle_thread:LedgerThread.end{LATER}",
    f"after celery_capacity.workers.settle.settle_thread:LedgerThread.end{LATER}",
    f"before celery_capacity.routing.ledger.client:Ledger._released{LATER}",
)
RELEASE = (
    f"after celery_capacity.routing.ledger.client:Ledger._released{LATER}",
    f"before celery_capacity.workers.results.outcome_writer:Recorder.add{LATER}",
    f"before celery_capacity.routing.store.job_transitions:apply{LATER}",
    f"after celery_capacity.routing.store.job_transitions:apply{LATER}",
    f"before celery_capacity.routing.ledger.client:Ledger.ack_transitions{LATER}",
)
REGISTER = (
    "after celery_capacity.workers.membership.name_claim:NameClaim.take",
    "after celery_capacity.workers.membership.registration:Membership._write_seen",
    "before celery_capacity.routing.ledger.client:Ledger.register",
    "after celery_capacity.routing.ledger.client:Ledger.register",
)
DRAIN = (
    "before celery_capacity.routing.ledger.client:Ledger.drain",
    "after celery_capacity.routing.ledger.client:Ledger.drain",
    "before celery_capacity.routing.ledger.client:Ledger.leave",
    "after celery_capacity.routing.ledger.client:Ledger.leave",
)
#: The second opening: the first one opens a ledger that was never open.
REBUILD = (
    "after celery_capacity.routing.recovery.rebuild:Opener._wipe@2",
    "after celery_capacity.routing.ledger.client:Ledger.open_epoch@2",
    "after celery_capacity.routing.ledger.client:Ledger.reserve_book",
    "before celery_capacity.routing.recovery.rebuild:Opener._file_backlog@2",
    "before celery_capacity.routing.ledger.client:Ledger.finish_epoch@2",
)
#: In a process of the pool: the effect is committed, and nobody has heard of the end.
CHILD = ("before tests.tasks.traced:leave_effect@2", "after tests.tasks.traced:leave_effect@2")

#: All steps at which a worker dies.
STEPS = (*DELIVER_AND_CLAIM, *FINISH, *RELEASE, *REGISTER, *DRAIN, *REBUILD, *CHILD)

_points = count()


class Mortal:
    """Starts workers that die at a step, and asserts that they did."""

    def __init__(self, platform: Platform, oracle: Oracle) -> None:
        self.platform = platform
        self.oracle = oracle

    def start(self, name: str, point: str, pool: Pool, ready: bool = True) -> Process:
        once = self.platform.folder / f"died-{next(_points)}"
        worker = self.platform.worker(
            name, cpus=2, pool=pool, ready=ready, DIE_AT=point, DIE_ONCE=str(once), PYTHONFAULTHANDLER="1"
        )
        self.oracle.asked(worker)
        return worker

    def died(self, worker: Process, point: str) -> None:
        assert worker.wait() == -signal.SIGKILL, f"{worker.name} did not die {point}:\n{worker.tail()}"
        # Processes that it forked end too, by themselves or with the group.
        worker.kill()


@pytest.fixture
def mortal(platform: Platform, oracle: Oracle) -> Mortal:
    platform.environment["PLATFORM_IMPORTS"] += ",tests.tasks.dying"
    # A job may be on the worker at each of these deaths.
    platform.environment["PLATFORM_MOST_LOSSES"] = str(max(map(len, (DELIVER_AND_CLAIM, FINISH, RELEASE))) + 1)
    return Mortal(platform, oracle)


@pytest.mark.parametrize("step", STEPS)
def test_step_at_which_a_worker_dies_is_a_function(step: str) -> None:
    module, _, name = step.partition(" ")[2].partition("@")[0].partition(":")
    assert callable(attrgetter(name)(import_module(module)))


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "points", "pool"),
    [
        ("deliver and claim", DELIVER_AND_CLAIM, "threads"),
        ("finish", FINISH, "prefork"),
        ("release", RELEASE, "threads"),
    ],
)
def test_a_worker_dies_at_each_step_of_a_job(
    platform: Platform,
    submitter: Submitter,
    oracle: Oracle,
    mortal: Mortal,
    what: str,
    points: tuple[str, ...],
    pool: Pool,
) -> None:
    platform.worker("b", cpus=2, pool="threads")
    # More jobs are sent than one of the two workers can run, so that both have enough to do.
    with oracle.flow(submitter, every=0.05, seconds=0.15):
        for point in points:
            mortal.died(mortal.start("a", point, pool), point)
        platform.worker("a", cpus=2, pool=pool)
        oracle.whole_again(f"a worker dies at each step of: {what}")
        oracle.until_more(10)
    oracle.assert_zeros()


@pytest.mark.long
def test_a_worker_dies_at_each_step_of_its_registration(
    platform: Platform, submitter: Submitter, oracle: Oracle, mortal: Mortal
) -> None:
    platform.worker("b", cpus=2, pool="threads")
    with oracle.flow(submitter, every=0.1, seconds=0.05):
        for point in REGISTER:
            worker = mortal.start("a", point, "threads", ready=False)
            mortal.died(worker, point)
            assert not any(READY in line for line in worker.lines)
        platform.worker("a", cpus=2, pool="threads")
        oracle.whole_again("a worker dies at each step of: register")
        oracle.until_more(10)
    oracle.assert_zeros()


@pytest.mark.long
def test_a_worker_dies_at_each_step_of_its_drain(
    platform: Platform, submitter: Submitter, oracle: Oracle, mortal: Mortal
) -> None:
    platform.worker("b", cpus=2, pool="threads")
    with oracle.flow(submitter, every=0.05, seconds=0.1):
        for point in DRAIN:
            worker = mortal.start("a", point, "threads")
            oracle.until_more(4)
            worker.signal(signal.SIGTERM)
            mortal.died(worker, point)
        platform.worker("a", cpus=2, pool="threads")
        oracle.whole_again("a worker dies at each step of: drain")
        oracle.until_more(10)
    oracle.assert_zeros()


@pytest.mark.long
def test_the_only_worker_dies_at_each_step_of_a_rebuild(
    platform: Platform, submitter: Submitter, oracle: Oracle, mortal: Mortal
) -> None:
    def waiting() -> int:
        count: Any = platform.redis.zcard(keys.SHAPES)
        return int(count)

    for number, point in enumerate(REBUILD):
        if number:
            # A later worker's first opening is that of the ledger that the dead worker left.
            point = point.removesuffix("@2")
        worker = mortal.start("a", point, "threads", ready=number == 0)
        if number == 0:
            oracle.sends(submitter, 10, seconds=0.3)
            oracle.until_more(2)
            until(lambda: waiting() > 0, "jobs wait")
            platform.redis.flushdb()
            oracle.results_were_lost()
        mortal.died(worker, point)
        # The next worker finds a ledger that is half open. Here the ledger is emptied once more.
        platform.redis.flushdb()
        oracle.results_were_lost()
    platform.worker("a", cpus=2, pool="threads")
    oracle.whole_again("a worker dies at each step of: rebuild")
    oracle.sends(submitter, 10)
    oracle.assert_zeros()


@pytest.mark.long
def test_what_a_dead_worker_left_of_a_rebuild_is_finished_by_another(
    platform: Platform, submitter: Submitter, oracle: Oracle, mortal: Mortal
) -> None:
    for number, point in enumerate(REBUILD):
        if number:
            # The ledger is open when this worker comes.
            point = point.removesuffix("@2")
        worker = mortal.start("a", point, "threads")
        jobs = oracle.sends(submitter, 6, seconds=0.3)
        oracle.until_more(2)
        platform.redis.flushdb()
        oracle.results_were_lost()
        mortal.died(worker, point)
        # Nothing is emptied meanwhile: the next worker goes on where the dead worker ended.
        after = platform.worker("a", cpus=2, pool="threads")
        for job in jobs:
            submitter.ended(job)
        # The next worker must die in the rebuild that it is made to begin, and must not finish this rebuild first.
        until(lambda: not platform.redis.hexists(keys.EPOCH, "rebuilding"), "the rebuild is finished")
        oracle.asked(after)
        after.kill()
    platform.worker("a", cpus=2, pool="threads")
    oracle.whole_again("a rebuild that another one finishes")
    oracle.assert_zeros()


@pytest.mark.long
def test_a_process_of_the_pool_dies_around_the_commit_of_its_effect(
    platform: Platform, submitter: Submitter, oracle: Oracle, mortal: Mortal
) -> None:
    platform.worker("b", cpus=2, pool="threads")
    for point in CHILD:
        worker = mortal.start("a", point, "prefork")
        with oracle.flow(submitter, every=0.05, seconds=0.05):
            worker.wait_for("died")
            oracle.until_more(10)
        assert worker.stop() == 0
    oracle.whole_again("a process of the pool dies around the commit of its effect")
    oracle.assert_zeros()
