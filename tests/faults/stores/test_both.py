"""Redis and Postgres are both down when everything starts, and come back in either order."""

from __future__ import annotations

import pytest

from celery_capacity.routing.errors import NotAccepted
from tests.faults.breaking.servers import Servers
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import READY, Platform


@pytest.mark.long
@pytest.mark.parametrize("first", ["Redis", "Postgres"])
def test_workers_that_start_before_their_servers_work_once_these_run(
    servers: Servers, platform: Platform, submitter: Submitter, oracle: Oracle, first: str
) -> None:
    servers.kill_redis()
    servers.kill_postgres()
    platform.engine.dispose()
    workers = [
        platform.worker("a", cpus=4, ready=False),
        platform.worker("b", cpus=2, pool="threads", ready=False),
    ]
    with pytest.raises(NotAccepted):
        oracle.send(submitter)
    for worker in workers:
        worker.wait_for("waiting for")
    starts = [servers.start_redis, servers.start_postgres]
    for start in starts if first == "Redis" else reversed(starts):
        start()
    oracle.whole_again(f"both down at the start, {first} back first")
    with oracle.flow(submitter):
        for worker in workers:
            worker.wait_for(READY)
        oracle.until_runs(20)
    oracle.assert_zeros()
