"""The wall clocks of workers are stepped by an hour: nothing dies, nothing is taken over, nothing runs again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from celery_capacity.routing.ledger import keys
from celery_capacity.workers.process.exit_codes import Exit
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.waiting import until

HOUR = 3600.0


#: Workers whose clock is stepped, and their pools.
STEPPED: Final[dict[str, Pool]] = {"a": "prefork", "b": "threads"}


@pytest.mark.long(50)
@pytest.mark.parametrize("step", [-HOUR, HOUR], ids=["back", "forward"])
def test_step_of_the_workers_wall_clocks_changes_nothing(
    platform: Platform, submitter: Submitter, oracle: Oracle, tmp_path: Path, step: float
) -> None:
    clock = tmp_path / "step"
    imports = f"{platform.environment['PLATFORM_IMPORTS']},tests.tasks.stepped"
    environment: dict[str, Any] = {"PLATFORM_IMPORTS": imports, "WALL_CLOCK_STEP": str(clock)}
    workers = [platform.worker(name, cpus=4, pool=pool, **environment) for name, pool in STEPPED.items()]
    workers.append(platform.worker("c", cpus=4, pool="threads"))
    incarnations = {worker.name: submitter.view(worker.name)["incarnation"] for worker in workers}
    jobs = oracle.sends(submitter, 12, seconds=platform.settings.lost_after * 2, cpus=0.5)
    oracle.until_runs(12)
    with oracle.flow(submitter, every=0.1):
        oracle.until_more(10)
        clock.write_text(str(step))
        lease = lease_ms(platform)
        longer = platform.settings.lost_after * 1500
        until(lambda: lease_ms(platform) > lease + longer, "the clocks were off for longer than each lease", 120.0)
        # The workers live, whatever their clock says. A twin on the machine is refused, and ends nothing of its worker.
        twins = [platform.worker(name, 4, pool, ready=False, **environment) for name, pool in STEPPED.items()]
        oracle.asked(*twins)
        assert [twin.wait() for twin in twins] == [Exit.UNAVAILABLE] * len(twins)
        oracle.until_more(10)
    oracle.assert_zeros()
    assert all(worker.alive for worker in workers)
    assert {worker.name: submitter.view(worker.name)["incarnation"] for worker in workers} == incarnations
    assert [submitter.outcomes(job) for job in jobs] == [["succeeded"]] * len(jobs)
    counters = platform.redis.hgetall(keys.COUNTERS)
    assert {name for name in counters if name in (b"lost", b"taken_back", b"lapsed", b"stale.release")} == set()


def lease_ms(platform: Platform) -> int:
    """Return the earlier end of the stepped workers' leases in milliseconds, by the ledger's clock."""
    return min(int(platform.redis.hget(keys.book(name), "lease") or 0) for name in STEPPED)
