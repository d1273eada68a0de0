"""Messages that were set aside are put back by HTTP on a running platform: they run, or are set aside again."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from celery import Celery

from tests.fixtures.jobs.setting_aside import queue_of, set_aside, until_set_aside
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.integration.web.test_actions import ADD, act, client, newest, platform

__all__ = ["client", "platform"]


def ids(client: httpx.Client) -> list[int]:
    return [message["id"] for message in client.get("/api/v1/quarantine").json()["messages"]]


@pytest.fixture(autouse=True)
def _emptied(platform: Platform) -> Any:
    yield
    with platform.engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE quarantine RESTART IDENTITY")


def test_message_runs_once_its_constraint_is_mended(
    client: httpx.Client, platform: Platform, submitter: Submitter
) -> None:
    with platform.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs ADD CONSTRAINT closed CHECK (id <> 'late') NOT VALID")
    url = platform.settings.redis_url
    with Celery("old", broker=url, backend=url, set_as_current=False) as old:
        old.send_task(ADD, [20, 22], task_id="late")
        (row,) = until_set_aside(platform, 1)
        assert (row.queue, row.reason.partition(":")[0]) == ("celery", "no_job")
        (message,) = ids(client)
        with platform.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE jobs DROP CONSTRAINT closed")
        done = act(client, "quarantine/requeue", {"ids": [message]})
        assert done == {"id": message, "result": "requeued", "detail": None}
        assert submitter.value("late") == 42
    assert ids(client) == []
    entry = newest(client)
    assert (entry.action, entry.targets, entry.outcome) == ("requeue", [str(message)], "done")
    assert entry.details == {"requeued": 1}


def test_message_that_nobody_can_read_is_set_aside_again(
    client: httpx.Client, platform: Platform, submitter: Submitter
) -> None:
    queues = ["celery", queue_of(submitter)]
    for queue in queues:
        platform.redis.lpush(queue, b"garbage")
    until_set_aside(platform, 2)
    before = ids(client)
    body = {"ids": [*before, 9]}
    results = client.post("/api/v1/quarantine/requeue", json=body).json()["results"]
    assert [result["result"] for result in results] == ["requeued", "requeued", "unknown"]
    until(lambda: len(ids(client)) == 2, lambda: f"both come again: {set_aside(platform)}")
    assert {row.queue for row in set_aside(platform)} == set(queues)
    assert set(ids(client)).isdisjoint(before)
    assert (newest(client).outcome, newest(client).details) == ("partly", {"requeued": 2, "unknown": 1})


def test_attempt_that_ended_is_not_run_by_its_old_message(
    client: httpx.Client, platform: Platform, submitter: Submitter
) -> None:
    job = submitter.send(ADD, 1, 2)
    assert submitter.value(job) == 3
    row = submitter.ended(job)
    queue = queue_of(submitter)
    envelope = json.loads(bytes(row.message))
    envelope["properties"] |= {"delivery_tag": f"{job}:{row.epoch}.{row.attempt}"}
    with platform.engine.begin() as connection:
        added = "INSERT INTO quarantine (raw, queue, reason) VALUES (%s, %s, 'foreign: x') RETURNING id"
        message = connection.exec_driver_sql(added, (json.dumps(envelope).encode(), queue)).scalar_one()
    assert act(client, "quarantine/requeue", {"ids": [message]})["result"] == "requeued"
    until(lambda: not platform.redis.exists(queue), "the worker has taken it")
    assert submitter.value(submitter.send(ADD, 2, 2)) == 4
    assert (submitter.row(job), len(submitter.attempts(job))) == (row, 1)


def test_message_is_refused_with_its_reason(client: httpx.Client, platform: Platform) -> None:
    with platform.engine.begin() as connection:
        added = "INSERT INTO quarantine (raw, queue, reason) VALUES ('x', 'nobodys', 'not_json: x') RETURNING id"
        message = connection.exec_driver_sql(added).scalar_one()
    refused = act(client, "quarantine/requeue", {"ids": [message]})
    assert (refused["id"], refused["result"], "-Q nobodys" in refused["detail"]) == (message, "unknown-queue", True)
    assert (newest(client).outcome, ids(client)) == ("refused", [message])
