"""Jobs age while they wait: with real workers."""

from __future__ import annotations

import pytest

from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"


@pytest.mark.parametrize("head", ["10000", "1"], ids=["in-redis", "in-postgres"])
def test_old_job_starts_before_later_ones_of_a_higher_priority(
    platform: Platform, submitter: Submitter, head: str
) -> None:
    platform.environment["PLATFORM_MAX_LEDGER_BACKLOG"] = head
    platform.worker("a", cpus=1, PLATFORM_AGEING="0.5", PLATFORM_DUE_INTERVAL="0.1")
    holder = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    first, low = submitter.send(ADD, 0, 0), submitter.send(ADD, 1, 2)
    until(lambda: submitter.row(low).priority > 3, "a priority above 3")
    high = [submitter.send(ADD, 3, 4, priority=3) for _ in range(3)]
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(holder).state == "succeeded"
    starts = [submitter.ended(job).started_at for job in (first, low, *high)]
    assert starts == sorted(starts)
