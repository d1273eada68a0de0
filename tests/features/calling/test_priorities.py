"""Message priorities: 9 first and 0 last, on every broker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, group

from celery_capacity import InvalidRequest
from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform

HOLD = "tests.fixtures.tasks.hold"
WHERE = "tests.tasks.routed.where"
MOVES = "tests.tasks.routed.moves"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield a platform of one worker with room for one job, that serves two queues."""
    with standing_platform(server_pair, tmp_path_factory.mktemp("one"), "tests.tasks.routed") as running:
        running.worker("a", cpus=1, pool="threads", arguments=("-Q", "celery,video"))
        yield running


def started_order(submitter: Submitter, jobs: list[str]) -> list[int]:
    """Return the priorities of these jobs, in the order in which their last attempts started.

    The ledger's clock counts milliseconds. The order of two starts within one millisecond is unknown.
    """
    rows = sorted((submitter.ended(job) for job in jobs), key=lambda row: (row.started_at, -row.priority))
    return [row.priority for row in rows]


def test_nine_comes_first_from_whoever_and_in_whichever_queue(platform: Platform, submitter: Submitter) -> None:
    url = platform.settings.redis_url
    holder = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    queues = ("celery", "video") * 5
    jobs = [submitter.send(WHERE, priority=priority, queue=queue) for priority, queue in enumerate(queues)]
    jobs += [submitter.send(WHERE)]
    # A group keeps its members' priorities, and so do messages of plain Celery.
    where = submitter.app.signature(WHERE, immutable=True)
    jobs += [result.id for result in group(where.set(priority=7), where.clone().set(priority=2)).apply_async()]
    again = submitter.send(MOVES, priority=5)
    with Celery("plain", broker=url, set_as_current=False) as plain:
        jobs += [plain.send_task(WHERE, priority=8).id, plain.send_task(WHERE, priority=1, queue="video").id]
    for job in jobs:
        submitter.until(job, "waiting")
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(holder).state == "succeeded"
    order = started_order(submitter, jobs)
    assert order == sorted(order, reverse=True)
    assert order == [9, 8, 8, 7, 7, 6, 5, 4, 3, 2, 2, 1, 1, 0, 0]
    # A retry keeps the job's priority.
    row = submitter.ended(again)
    assert (row.priority, row.retries, row.attempt) == (5, 1, 2)


@pytest.mark.parametrize("priority", [-1, 10, 2.5, "9", True])
def test_no_other_number_is_one(submitter: Submitter, priority: Any) -> None:
    with pytest.raises(InvalidRequest, match="priority"):
        submitter.send(WHERE, priority=priority)
