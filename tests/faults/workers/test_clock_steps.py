"""The wall clock of a worker is stepped by an hour: nothing dies, nothing is taken over, nothing runs again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from celery_capacity.routing.ledger import keys
from celery_capacity.workers.process.exit_codes import Exit
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.waiting import until

HOUR = 3600.0


@pytest.mark.long
@pytest.mark.parametrize("step", [-HOUR, HOUR], ids=["back", "forward"])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_step_of_a_worker_s_wall_clock_changes_nothing(
    platform: Platform, submitter: Submitter, oracle: Oracle, tmp_path: Path, step: float, pool: Pool
) -> None:
    clock = tmp_path / "step"
    imports = f"{platform.environment['PLATFORM_IMPORTS']},tests.tasks.stepped"
    environment: dict[str, Any] = {"PLATFORM_IMPORTS": imports, "WALL_CLOCK_STEP": str(clock)}
    stepped = platform.worker("a", cpus=4, pool=pool, **environment)
    other = platform.worker("b", cpus=4, pool="threads")
    incarnations = {name: submitter.view(name)["incarnation"] for name in ("a", "b")}
    jobs = oracle.sends(submitter, 8, seconds=platform.settings.lost_after * 2, cpus=0.5)
    oracle.until_runs(8)
    with oracle.flow(submitter, every=0.1):
        oracle.until_more(10)
        clock.write_text(str(step))
        lease = lease_ms(platform)
        longer = platform.settings.lost_after * 1500
        until(lambda: lease_ms(platform) > lease + longer, "the clock was off for longer than each lease", 120.0)
        # The worker lives, whatever its machine's clock says. A twin on the machine is refused, and ends nothing of it.
        twin = platform.worker("a", cpus=4, pool=pool, ready=False, **environment)
        oracle.asked(twin)
        assert twin.wait() == Exit.UNAVAILABLE
        oracle.until_more(10)
    oracle.assert_zeros()
    assert stepped.alive and other.alive
    assert {name: submitter.view(name)["incarnation"] for name in ("a", "b")} == incarnations
    assert [submitter.outcomes(job) for job in jobs] == [["succeeded"]] * len(jobs)
    counters = platform.redis.hgetall(keys.COUNTERS)
    assert {name for name in counters if name in (b"lost", b"taken_back", b"lapsed", b"stale.release")} == set()


def lease_ms(platform: Platform) -> int:
    """Return the end of the lease of `a` in milliseconds, by the ledger's clock."""
    return int(platform.redis.hget(keys.book("a"), "lease") or 0)
