"""Producers that know nothing of the platform: plain Celery, and messages written by hand, by both protocols.

Their tasks are enrolled, admitted, run and answered.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import InvalidTaskError, TaskRevokedError
from kombu.utils.uuid import uuid

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.workers.execute.enroll import with_arguments
from tests.fixtures.jobs.setting_aside import until_set_aside
from tests.fixtures.jobs.submitting import RESULT_WITHIN, Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform

ADD = "tests.fixtures.tasks.add"
FAIL = "tests.fixtures.tasks.fail"
WHERE = "tests.tasks.routed.where"
THREE = "tests.tasks.declared.three_again"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    modules = ("tests.tasks.routed", "tests.tasks.declared")
    with standing_platform(server_pair, tmp_path_factory.mktemp("old"), *modules) as running:
        running.worker("a", cpus=4, pool="threads", arguments=("-Q", "celery,video"))
        yield running


@pytest.fixture(params=[1, 2], ids=["protocol 1", "protocol 2"])
def protocol(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
def plain(protocol: int, platform: Platform) -> Iterator[Celery]:
    """Yield an app of plain Celery."""
    url = platform.settings.redis_url
    with Celery("plain", broker=url, backend=url, set_as_current=False) as app:
        app.conf.task_protocol = protocol
        yield app


def test_what_plain_celery_sends_is_enrolled_admitted_run_and_answered(plain: Celery, submitter: Submitter) -> None:
    sent = plain.send_task(ADD, [40, 2], priority=6)
    routed = plain.send_task(WHERE, queue="video")
    # The sender need not know the workers' declarations.
    wide = plain.send_task(THREE)
    failed = plain.send_task(FAIL, ["it is so"])
    assert sent.get(timeout=RESULT_WITHIN) == 42
    row = submitter.ended(sent.id)
    assert (row.state, row.queue, row.priority, row.request) == ("succeeded", "celery", 6, {"cpus": 1, "slots": 1})
    assert routed.get(timeout=RESULT_WITHIN) == "video"
    assert submitter.ended(routed.id).queue == "video"
    assert wide.get(timeout=RESULT_WITHIN) is None
    row = submitter.ended(wide.id)
    assert (row.request["cpus"], row.declared, row.attempt, row.retries) == (3, True, 2, 1)
    with pytest.raises(ValueError, match="it is so"):
        failed.get(timeout=RESULT_WITHIN)
    assert submitter.ended(failed.id).state == "failed"


def test_its_times_links_and_chords_are_kept(plain: Celery, submitter: Submitter) -> None:
    add = plain.signature(ADD, [1, 1])
    later = add.clone().apply_async(countdown=3600)
    too_late = add.clone().apply_async(expires=datetime.now(UTC) - timedelta(seconds=5))
    linked = add.clone().apply_async(link=plain.signature(ADD, [40]).set(task_id=f"linked-{plain.conf.task_protocol}"))
    row = submitter.until(later.id, "scheduled")
    assert timedelta(minutes=59) < row.due_at - row.submitted_at < timedelta(minutes=61)
    later.revoke()
    submitter.app.control.revoke(later.id)
    assert submitter.ended(later.id).state == "cancelled"
    assert submitter.ended(too_late.id).state == "expired"
    with pytest.raises(TaskRevokedError):
        too_late.get(timeout=RESULT_WITHIN)
    assert linked.get(timeout=RESULT_WITHIN) == 2
    assert submitter.value(f"linked-{plain.conf.task_protocol}") == 42


def test_a_sender_on_the_platform_may_speak_the_first_protocol(protocol: int, submitter: Submitter) -> None:
    submitter.app.conf.task_protocol = protocol
    job = submitter.send(ADD, 40, 2, cpus=2, priority=3, queue="video")
    assert submitter.value(job) == 42
    row = submitter.ended(job)
    assert (row.queue, row.priority, row.request["cpus"], row.declared) == ("video", 3, 2, True)
    retried = submitter.send(THREE)
    assert submitter.value(retried) is None
    assert submitter.ended(retried).retries == 1


def push(platform: Platform, queue: str, body: Any, headers: Any = None, **properties: Any) -> None:
    """Push a message as a client of Redis may write it, with the least that a worker of Celery takes."""
    envelope = {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": headers or {},
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": "any",
            "delivery_info": {"exchange": "", "routing_key": queue},
            **properties,
        },
    }
    platform.redis.lpush(queue, json.dumps(envelope))


def test_a_message_written_by_hand_is_a_job(platform: Platform, submitter: Submitter) -> None:
    push(platform, "celery", {"task": ADD, "id": "by-hand-1", "args": [40, 2], "kwargs": {}})
    push(platform, "video", [[], {}, {}], {"lang": "go", "task": WHERE, "id": "by-hand-2"})
    push(
        platform, "celery", {"task": ADD, "id": "by-hand-3", "kwargs": {"x": 40, "y": 2}, "taskset": None, "retries": 0}
    )
    # The message's times name no zone. They mean UTC unless the message says otherwise.
    eta = (datetime.now(UTC) + timedelta(hours=2)).replace(tzinfo=None).isoformat()
    push(platform, "celery", {"task": ADD, "id": "by-hand-4", "args": [1, 2], "eta": eta, "utc": True})
    assert submitter.until("by-hand-1", "succeeded").queue == "celery"
    assert (submitter.value("by-hand-1"), submitter.value("by-hand-3")) == (42, 42)
    assert submitter.until("by-hand-2", "succeeded").queue == "video"
    assert submitter.value("by-hand-2") == "video"
    later = submitter.until("by-hand-4", "scheduled")
    assert timedelta(minutes=119) < later.due_at - later.submitted_at < timedelta(minutes=121)
    submitter.app.control.revoke("by-hand-4")
    assert submitter.ended("by-hand-4").state == "cancelled"


@pytest.mark.parametrize(("args", "kwargs"), [([40, 2], None), ([40, 2], []), (None, {"x": 40, "y": 2})])
def test_what_other_languages_write_for_no_arguments_is_that(
    platform: Platform, submitter: Submitter, args: Any, kwargs: Any
) -> None:
    job = uuid()
    push(platform, "celery", [args, kwargs, None], {"lang": "php", "task": ADD, "id": job})
    assert submitter.value(job) == 42


def test_what_is_given_its_arguments_keeps_its_encoding() -> None:
    body = [None, {"x": "ü"}, {}]
    assert json.loads(with_arguments(json.dumps(body).encode())) == [[], {"x": "ü"}, {}]
    for kept in (b"[1, 2]", b"no JSON", b"[[1], {}, {}]", b"\xff[", json.dumps([[1], {"x": 1}, None]).encode()):
        assert with_arguments(kept) == kept


@pytest.mark.parametrize("kwargs", [5, "x=40", [["x", 40]]])
def test_a_task_that_cannot_be_called_with_its_arguments_has_failed(
    platform: Platform, submitter: Submitter, kwargs: Any
) -> None:
    job = uuid()
    push(platform, "celery", [[40, 2], kwargs, {}], {"task": ADD, "id": job})
    row = submitter.ended(job)
    assert row.state == "failed"
    assert "a mapping" in row.error
    with pytest.raises(InvalidTaskError, match="a mapping"):
        submitter.result(job).get(timeout=RESULT_WITHIN)


def test_what_can_be_no_job_is_set_aside(platform: Platform, submitter: Submitter) -> None:
    task = {"task": ADD, "id": "wrong"}
    push(platform, "celery", {"id": "wrong", "args": []})
    push(platform, "celery", {**task, "args": {"x": 1}})
    push(platform, "video", {**task, "args": [1, 2], "kwargs": [1]})
    push(platform, "celery", {**task, "args": [1, 2], "chain": [task]})
    push(platform, "celery", {**task, "args": [1, 2], "eta": "tomorrow"})
    push(platform, "celery", ["not", "a", "task"])
    push(platform, "celery", {**task, "args": [1, 2]}, priority=11)
    deep: Any = "x"
    for _ in range(60):
        deep = [deep]
    push(platform, "celery", {**task, "args": [deep, 2]})
    rows = until_set_aside(platform, 8)
    assert [row.queue for row in rows].count("video") == 1
    reasons = "\n".join(row.reason for row in rows)
    for what in ("not a task message", "the arguments of", "a chain", "'tomorrow'", "priority 11", "nested"):
        assert what in reasons, reasons
    assert submitter.row("wrong") is None
