"""The duties bring in jobs that never reached the ledger, and old producers' messages become jobs.

The deaths of processes and their results are in `tests/faults`.
"""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from celery_capacity.routing.ledger import keys
from celery_capacity.workers.dispatch.submission_queue import SubmissionQueue
from tests.fixtures.jobs.submitting import RESULT_WITHIN, Submitter
from tests.fixtures.jobs.working import all_ended, states
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"


def test_jobs_that_were_accepted_before_any_worker_are_taken_by_the_first(
    platform: Platform, submitter: Submitter
) -> None:
    assert not platform.redis.exists(keys.EPOCH)
    jobs = [submitter.send(ADD, n, n, cpus=1 + n % 4) for n in range(10)]
    assert states(platform) == {"accepted": 10}
    platform.worker("a", cpus=4)
    assert [submitter.value(job) for job in jobs] == [2 * n for n in range(10)]
    assert all_ended(platform, 10) == {"succeeded": 10}
    assert {submitter.row(job).attempt for job in jobs} == {1}


def test_duties_need_no_beat(platform: Platform, submitter: Submitter, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = platform.worker("a", cpus=4)
    with monkeypatch.context() as dying:
        # The submitter dies after its insert.
        dying.setattr(SubmissionQueue, "add", lambda *_, **__: None)
        stranded = submitter.send(ADD, 1, 2)
    later = submitter.send(ADD, 3, 4, countdown=0.5)
    assert submitter.row(later).state == "scheduled"
    # The sweep brings in the first job, or the listener if it begins just now.
    assert (submitter.value(stranded), submitter.value(later)) == (3, 7)
    worker.wait_for("duty due: due 1")
    row = submitter.ended(later)
    assert row.started_at >= row.due_at


def test_a_worker_misses_its_book_between_two_heartbeats(platform: Platform, submitter: Submitter) -> None:
    platform.environment |= {
        "PLATFORM_RENEW_INTERVAL": "100",
        "PLATFORM_WORKER_TTL": "300",
        "PLATFORM_LOST_AFTER": "400",
    }
    platform.worker("a", cpus=2, pool="threads")
    platform.redis.delete(keys.book("a"))
    until(lambda: platform.redis.hget(keys.book("a"), "status") == b"ready", "its book is there again")
    assert submitter.value(submitter.send(ADD, 1, 2)) == 3


def test_messages_of_a_plain_producer_become_jobs(platform: Platform, submitter: Submitter) -> None:
    url = platform.settings.redis_url
    old = Celery("old", broker=url, backend=url, set_as_current=False)
    before = old.send_task(ADD, [1, 2])
    assert platform.redis.llen("celery") == 1
    platform.worker("a", cpus=4)
    after = [old.send_task(ADD, [n, n], task_id=f"after-{n}") for n in range(5)]
    # A producer publishes again because it was unsure of the first time.
    after.append(old.send_task(ADD, [4, 4], task_id="after-4"))
    later = old.send_task(ADD, [3, 4], countdown=0.5)
    assert [result.get(timeout=RESULT_WITHIN) for result in (before, *after, later)] == [3, 0, 2, 4, 6, 8, 8, 7]
    row = submitter.ended(before.id)
    assert (row.state, row.worker, row.attempt, row.declared) == ("succeeded", "a", 1, True)
    assert row.request == {"cpus": 1, "slots": 1}
    row = submitter.ended(later.id)
    assert row.started_at >= row.due_at
    assert all_ended(platform, 7) == {"succeeded": 7}

    def left() -> list[Any]:
        return [key for key in ("celery", "unacked", "unacked_index") if platform.redis.exists(key)]

    until(lambda: not left(), lambda: f"all messages are acknowledged: {left()}")
    old.close()
