"""The worker that opens a lost ledger anew is stopped meanwhile, for longer than any lease, and then goes on."""

from __future__ import annotations

import signal
from typing import Any

import psutil
import pytest

from celery_capacity.routing.ledger import keys
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.tasks.lasting import Gate

#: Points at which the opener is stopped.
POINTS = (
    "before celery_capacity.routing.recovery.rebuild:Opener._wipe@0",
    "before celery_capacity.routing.ledger.client:Ledger.open_epoch@0",
    "before celery_capacity.routing.recovery.rebuild:Opener._file_backlog@0",
    "before celery_capacity.routing.ledger.client:Ledger.finish_epoch@0",
)


@pytest.mark.long
@pytest.mark.parametrize("point", POINTS)
def test_stopped_opener_keeps_nobody_out_and_does_no_harm_later(
    platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate, point: str
) -> None:
    platform.environment["PLATFORM_IMPORTS"] += ",tests.tasks.dying"
    # As long as this file exists, no process stops.
    once = platform.folder / "stopped"
    once.touch()
    platform.environment |= {"DIE_AT": point, "DIE_BY": "SIGSTOP", "DIE_ONCE": str(once)}
    workers = [platform.worker(name, cpus=2, pool="threads") for name in ("a", "b")]

    def epoch() -> int:
        field: Any = platform.redis.hget(keys.EPOCH, "epoch")
        return int(field or 0)

    jobs = oracle.sends(submitter, 16, seconds=gate)
    oracle.until_runs(2)
    until(lambda: platform.redis.zcard(keys.SHAPES), "jobs wait")
    once.unlink()
    platform.redis.flushdb()
    oracle.results_were_lost()
    until(once.exists, "a worker opens the ledger, and is stopped")
    (stopped,) = until(
        lambda: [worker for worker in workers if psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED],
        "it is stopped",
    )
    try:
        gate.open()
        # Jobs of the stopped worker end too: the worker is LOST.
        for job in jobs:
            submitter.ended(job)
        opened = epoch()
        stopped.signal(signal.SIGCONT)
        oracle.whole_again("the opener of the ledger is stopped")
        until(lambda: submitter.view(stopped.name).get("status") == "ready", "it is registered again")
        oracle.sends(submitter, 8, seconds=0.2)
        oracle.assert_zeros()
    finally:
        stopped.signal(signal.SIGCONT)
    assert epoch() == opened, "no ledger was opened, or lost, once more"
