"""A worker's own queue holds another message than the ledger pushed: it is refused, and the right one runs.

Anybody who can write to Redis can push there.
"""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_capacity.routing.ledger import keys
from tests.fixtures.jobs.setting_aside import counter, epoch_of, queue_of, set_aside, until_set_aside
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.processes.stopping import stop_deaf
from tests.fixtures.waiting import until
from tests.tasks.work import read as events_of

ADD = "tests.fixtures.tasks.add"
WORK = "tests.tasks.work.work"


@pytest.fixture
def platform(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Platform]:
    with standing_platform(request.getfixturevalue("server_pair"), tmp_path, "tests.tasks.work") as running:
        yield running


@pytest.fixture
def stopped(platform: Platform) -> Iterator[Any]:
    """Yield the worker `a`, stopped while it does not wait at its queue. It goes on at the end, whatever happens."""
    worker = platform.worker("a", 4)
    stop_deaf(platform, worker)
    yield worker
    os.killpg(worker.pid, signal.SIGCONT)


def _other_arguments(message: dict[str, Any]) -> None:
    message["body"] = base64.b64encode(b'[["forged", "forged"], {}, {}]').decode()


def _other_task(message: dict[str, Any]) -> None:
    message["headers"]["task"] = "tests.fixtures.tasks.fail"


def _other_request(message: dict[str, Any]) -> None:
    message["headers"]["capacity_request"] = {"shape": "cpus=900000,slots=1", "declared": True}


def _later(message: dict[str, Any]) -> None:
    message["headers"]["eta"] = "2999-01-01T00:00:00+00:00"


@pytest.mark.parametrize("forge", [_other_arguments, _other_task, _other_request, _later])
def test_message_that_differs_from_its_row_is_refused_and_the_own_one_runs(
    platform: Platform, stopped: Any, submitter: Submitter, forge: Any
) -> None:
    job = submitter.send(ADD, 40, 2, cpus=4)
    queue = queue_of(submitter)
    message: Any = platform.redis.lpop(queue)
    forged = json.loads(message)
    forge(forged)
    platform.redis.lpush(queue, json.dumps(forged, separators=(",", ":")))
    os.killpg(stopped.pid, signal.SIGCONT)
    assert submitter.value(job) == 42
    row = submitter.ended(job)
    assert (row.state, row.attempt, row.losses) == ("succeeded", 1, 0)
    (kept,) = until_set_aside(platform, 1)
    assert f"the message is not that of attempt {row.epoch}.1" in kept.reason
    assert json.loads(kept.raw) == forged
    assert kept.reason.startswith("foreign: ")
    assert counter(platform, "refused.forged") == 1
    until(lambda: counter(platform, "set_aside.foreign") == 1, "the worker told the ledger")


def test_what_is_put_behind_the_tag_does_not_count(platform: Platform, stopped: Any, submitter: Submitter) -> None:
    job = submitter.send(ADD, 40, 2, cpus=4)
    queue = queue_of(submitter)
    message: Any = platform.redis.lpop(queue)
    # Where JSON has two equal names, the last one counts.
    evil = base64.b64encode(b'[["forged", "forged"], {}, {}]').decode()
    tail = f'}},"body":"{evil}","x":{{"y":"z"}}}}'
    platform.redis.lpush(queue, message.decode().removesuffix("}}") + tail)
    os.killpg(stopped.pid, signal.SIGCONT)
    assert submitter.value(job) == 42
    assert counter(platform, "refused.forged") == 1


def test_the_message_of_another_attempt_is_refused(platform: Platform, stopped: Any, submitter: Submitter) -> None:
    job = submitter.send(ADD, 40, 2, cpus=4)
    queue = queue_of(submitter)
    pushed: Any = platform.redis.lrange(queue, 0, -1)
    (message,) = pushed
    epoch = epoch_of(platform)
    for token in (f"{epoch}.2", f"{epoch + 1}.1", "0.1"):
        platform.redis.rpush(queue, message.replace(f'"{job}:{epoch}.1"'.encode(), f'"{job}:{token}"'.encode()))
    os.killpg(stopped.pid, signal.SIGCONT)
    assert submitter.value(job) == 42
    assert submitter.ended(job).attempt == 1
    assert submitter.outcomes(job) == ["succeeded"]
    until(lambda: counter(platform, "stale.claim") == 3, "three are refused")


def test_the_same_message_five_times_is_one_start(
    platform: Platform, stopped: Any, submitter: Submitter, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    job = submitter.send(WORK, str(trace), "1", 0.3, 1000)
    queue = queue_of(submitter)
    pushed: Any = platform.redis.lrange(queue, 0, -1)
    (message,) = pushed
    platform.redis.rpush(queue, *[message] * 4)
    os.killpg(stopped.pid, signal.SIGCONT)
    assert submitter.ended(job).state == "succeeded"
    until(lambda: counter(platform, "stale.claim") == 4, "four are refused")
    assert submitter.value(submitter.send(ADD, 1, 1)) == 2
    assert [(event.what, event.attempt) for event in events_of(trace)] == [("start", 1), ("end", 1)]
    assert submitter.outcomes(job) == ["succeeded"]
    assert set_aside(platform) == []


def test_copy_of_a_message_whose_job_was_forgotten_is_no_news(
    platform: Platform, stopped: Any, submitter: Submitter
) -> None:
    job = submitter.send(ADD, 40, 2)
    queue = queue_of(submitter)
    pushed: Any = platform.redis.lrange(queue, 0, -1)
    (message,) = pushed
    os.killpg(stopped.pid, signal.SIGCONT)
    assert submitter.ended(job).state == "succeeded"
    # The job's tombstone has run out.
    until(lambda: platform.redis.pttl(keys.job(job)) > 0, "Postgres has the end")
    platform.redis.delete(keys.job(job))
    foreign = message.replace(job.encode(), b"nobody")
    platform.redis.rpush(queue, message, foreign)
    # The message of an unknown job is kept. Messages are read in the order in which they came.
    (kept,) = until_set_aside(platform, 1)
    assert (kept.raw, kept.reason) == (foreign, "foreign: there is no job nobody")
    stopped.wait_for(f"job {job}: a doubled message of an attempt that ended long ago is dropped")
