"""A worker dies with a job that it had just claimed, and Redis is emptied, before Postgres has the claim."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from tests.faults.judging.oracle import read
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.stores.books import job_field
from tests.fixtures.waiting import until
from tests.tasks.lasting import Gate


@pytest.mark.long
@pytest.mark.parametrize("rerun", [True, False])
def test_unknown_claim_is_counted_or_has_not_started(
    platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate, rerun: bool
) -> None:
    worker = platform.worker("a", cpus=1, pool="threads")
    before = oracle.send(submitter, seconds=gate)
    until(lambda: oracle.starts_of(before) == 1, "the worker is busy")
    # The dead worker's statement may still be executed when the row is free: then the claim is known, and lost.
    job = oracle.send(submitter, seconds=3.0, rerun=rerun, expected=["succeeded"] if rerun else ["succeeded", "lost"])
    # Lock the row, so that nobody can write a transition of the job meanwhile.
    with platform.engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": job})
        gate.open()
        until(lambda: job_field(platform.redis, job, "state") == b"running", "it is claimed")
        if rerun:
            until(lambda: oracle.starts_of(job) == 1, "its body begins all the same")
        else:
            worker.wait_for("starts when Postgres has its claim")
        oracle.asked(worker)
        worker.kill()
        assert oracle.starts_of(job) == int(rerun)
        platform.redis.flushdb()
        oracle.results_were_lost()
    platform.worker("b", cpus=1, pool="threads")
    row = submitter.ended(job)
    oracle.whole_again("a claim that nobody knew")
    starts = [line.attempt for line in read(oracle.trace) if line.job == job and line.what == "start"]
    if rerun:
        assert (row.state, row.losses, starts) == ("succeeded", 1, [1, 2])
    else:
        assert (row.state, row.losses, starts) in [("succeeded", 0, [2]), ("lost", 1, [])]
    oracle.assert_zeros()
