"""No worker ends because of a message in a queue, whatever it holds.

An unreadable message is set aside where people see it. A message that only pretends to be a job's is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import text

from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.routing.store import quarantine
from celery_capacity.workers.submit.encode import RawMessage
from tests.fixtures import tasks
from tests.fixtures.jobs import garbage
from tests.fixtures.jobs.setting_aside import (
    counter,
    epoch_of,
    job_states,
    number_set_aside,
    queue_of,
    set_aside,
    until_set_aside,
)
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
WORK = "tests.tasks.work.work"


@pytest.fixture
def platform(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Platform]:
    with standing_platform(request.getfixturevalue("server_pair"), tmp_path, "tests.tasks.work") as running:
        yield running


# -- the corpus


@pytest.mark.long
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_takes_no_harm_from_malformed_messages_in_its_queues(
    platform: Platform, submitter: Submitter, pool: Pool
) -> None:
    worker = platform.worker("a", 4, pool)
    own_queue = queue_of(submitter)
    in_default = garbage.malformed("old")
    in_private = garbage.malformed("own", epoch_of(platform))
    good, before = [], 0
    for number, pair in enumerate(zip(in_default, in_private, strict=True)):
        for queue, raw in zip(("celery", own_queue), pair, strict=True):
            platform.redis.lpush(queue, raw)
        if number % 20 == 0:
            good.append(submitter.send(ADD, number, 1))
            before += 1
    assert {submitter.ended(job).state for job in good} == {"succeeded"}

    def taken() -> int:
        # A readable message in the default queue becomes a job.
        return number_set_aside(platform) + job_states(platform).total() - len(good)

    pushed = len(in_default) + len(in_private)
    until(lambda: taken() >= pushed, lambda: f"all {pushed} are taken: {taken()}")
    assert taken() == pushed
    # A message of a task that nobody knows waits for a worker that does.
    until(lambda: job_states(platform).keys() <= {*FINAL, State.WAITING}, lambda: job_states(platform))
    with platform.engine.connect() as connection:
        waiting = connection.execute(text("SELECT name FROM jobs WHERE state = 'waiting'")).scalars().all()
    assert set(waiting).isdisjoint(submitter.app.tasks)
    assert worker.alive
    # A new incarnation of the worker would have another queue.
    assert submitter.view("a")["queue"] == own_queue
    assert submitter.value(submitter.send(ADD, 40, 2, cpus=4)) == 42
    rows = set_aside(platform)
    assert {row.worker for row in rows} == {"a"}
    assert max(len(row.raw) for row in rows) <= quarantine.MAX_BYTES
    # No message of a private queue became a job, and none was held up.
    with platform.engine.connect() as connection:
        assert not connection.execute(text("SELECT count(*) FROM jobs WHERE id LIKE 'own-%'")).scalar_one()
    for queue in ("celery", own_queue, "unacked", "unacked_index"):
        assert not platform.redis.exists(queue), queue


def test_what_was_set_aside_is_seen_in_the_cluster(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 2, "threads")
    empty = json.loads(platform.celery("cluster", "--json").stdout)["quarantine"]
    assert empty == {"messages": 0, "reasons": []}
    platform.redis.lpush("celery", b"garbage", b"[]", b"[]")
    until_set_aside(platform, 3)
    seen = json.loads(platform.celery("cluster", "--json").stdout)["quarantine"]
    assert seen["messages"] == 3
    assert {(reason["reason"], reason["detail"], reason["messages"]) for reason in seen["reasons"]} == {
        ("no_message", "JSON, but no message: an array", 2),
        ("not_json", "not JSON: Expecting value: line 1 column 1 (char 0)", 1),
    }
    assert {reason["queue"] for reason in seen["reasons"]} == {"celery"}
    output = platform.celery("cluster").stdout
    assert "3 messages were set aside" in output
    assert "no_message" in output
    until(lambda: counter(platform, "set_aside.no_message") == 2, "the worker told the ledger")
    assert counter(platform, "set_aside.not_json") == 1
    assert [row.raw for row in set_aside(platform)] == [b"garbage", b"[]", b"[]"]


def test_only_the_newest_are_kept_and_all_are_counted(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "MAX_KEPT", 5)
    with platform.engine.begin() as connection:
        for number in range(4):
            message = quarantine.SetAside.of(b"%d" % number, "q\0", Refusal.NO_MESSAGE, "bad \ud800", "w")
            quarantine.write(connection, [message] * 3)
        summary = quarantine.read(connection)
    assert summary.messages == 12
    assert sum(reason.messages for reason in summary.reasons) == 5
    assert [row.raw for row in set_aside(platform)] == [b"2", b"2", b"3", b"3", b"3"]


def test_a_remote_command_that_cannot_be_read_ends_nobody(platform: Platform, submitter: Submitter) -> None:
    worker = platform.worker("a", 2, "prefork")
    database = platform.redis.connection_pool.connection_kwargs["db"]
    topic = f"/{database}.celery.pidbox"
    ticks = f"/{database}.platform.ticks"
    # kombu subscribes to remote control by pattern, the platform to the ticks by name.
    until(lambda: platform.redis.pubsub_numpat() >= 1, "the worker hears remote control")
    until(lambda: dict(platform.redis.pubsub_numsub(ticks))[ticks.encode()] >= 1, "the worker hears ticks")
    wrong = garbage.envelope("x", "x:1.1", b"\xff")
    for raw in (b"garbage", b"[]", b"7", b"{}", b'{"properties": {}}', json.dumps(wrong).encode()):
        platform.redis.publish(topic, raw)
    for raw in (b"garbage", b"[]", b"7", b"{}", json.dumps(wrong).encode()):
        platform.redis.publish(ticks, raw)
    assert submitter.app.control.ping(timeout=60.0, limit=1)
    assert submitter.value(submitter.send(ADD, 1, 2)) == 3
    assert worker.alive


# -- Postgres is away


def test_what_is_set_aside_while_postgres_is_away_is_kept(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 2, "threads")
    with platform.engine.begin() as connection:
        connection.execute(text("LOCK TABLE quarantine IN ACCESS EXCLUSIVE MODE"))
        platform.redis.lpush("celery", *[b"garbage"] * 7)
        # The main loop and the intake do not wait for Postgres.
        until(lambda: not platform.redis.exists("celery"), "they are taken")
        assert submitter.value(submitter.send(ADD, 1, 2)) == 3
    until_set_aside(platform, 7)


# -- jobs that cannot run


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_job_with_a_bomb_as_body_fails_by_queue_and_by_reply(
    platform: Platform, submitter: Submitter, pool: Pool
) -> None:
    worker = platform.worker("a", 1, pool)
    running = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    bomb = "0" * garbage.BOMB
    # The job waits, and is handed over with the release.
    in_reply = submitter.send(ADD, bomb, "", compression="gzip")
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(in_reply).state == "failed"
    by_queue = submitter.send(ADD, bomb, "", compression="bzip2")
    assert submitter.ended(by_queue).state == "failed"
    for job in (in_reply, by_queue):
        assert "holds more than the" in submitter.row(job).error
    assert submitter.ended(running).state == "succeeded"
    # A compressed message that is no bomb arrives unchanged.
    assert submitter.value(submitter.send(ADD, "x" * 10_000, "y", compression="gzip")) == "x" * 10_000 + "y"
    assert worker.alive


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_job_whose_message_makes_no_task_fails_and_waiters_hear_of_it(
    platform: Platform, submitter: Submitter, pool: Pool
) -> None:
    worker = platform.worker("a", 4, pool)
    arguments = b'[[1, 2], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
    wrong: dict[str, tuple[bytes, str, str, dict[str, Any]]] = {
        "pickle": (b"cos\nsystem\n", "application/x-python-serialize", "binary", {}),
        "html": (b"<p>", "text/html", "utf-8", {}),
        "bytes": (b"\xff\xfe", "application/json", "utf-8", {}),
        "null": (b"null", "application/json", "utf-8", {}),
        "number": (b"7", "application/json", "utf-8", {}),
        "short": (b"[]", "application/json", "utf-8", {}),
        "packed": (b"not compressed", "application/json", "utf-8", {"compression": "gzip"}),
        "unheard": (arguments, "application/json", "utf-8", {"compression": "unheard-of"}),
    }
    for name, (body, content_type, encoding, headers) in wrong.items():
        envelope = garbage.envelope(name, "tag")
        headers = envelope["headers"] | headers
        # A program speaks to the sender itself here, and accepts content that workers do not.
        submitter.app.conf.accept_content = ["json", "pickle", "text/html"]
        sender = submitter.app.amqp.job_sender
        sender.accept_raw(RawMessage(body, content_type, encoding, headers, "celery", envelope["properties"]))
    for name in wrong:
        row = submitter.ended(name)
        assert (name, row.state, row.attempt, row.losses) == (name, "failed", 1, 0), row.error
        assert row.error
        with pytest.raises(Exception, match=r"."):
            submitter.value(name)
    assert submitter.value(submitter.send(ADD, 1, 2, cpus=4)) == 3
    assert worker.alive
    # The messages are kept in the rows of their jobs.
    assert set_aside(platform) == []


# -- old producers


def test_a_compressed_message_of_an_old_producer_becomes_a_job(platform: Platform, submitter: Submitter) -> None:
    url = platform.settings.redis_url
    platform.worker("a", 2, "threads")
    with Celery("old", broker=url, backend=url, set_as_current=False) as old:
        sent = [old.send_task(ADD, ["x" * 5000, "y"], compression=method) for method in ("gzip", "bzip2")]
        assert [result.get(timeout=60) for result in sent] == ["x" * 5000 + "y"] * 2
    until(lambda: job_states(platform) == {"succeeded": 2}, lambda: job_states(platform))


@pytest.mark.parametrize(
    "headers",
    [
        {"task": "n" * 10_000},
        {"task": "a\nb"},
        {"id": "a\nb"},
        {"id": "x" * 300},
        {"retries": 10**12},
        {"retries": "many"},
        {"replaced_task_nesting": -(10**12)},
        {"eta": "soon"},
        {"capacity_request": {"declared": True}},
        {"capacity_request": {"shape": "cpus=none", "declared": True}},
    ],
)
def test_a_hostile_message_of_an_old_producer_is_set_aside_once(
    platform: Platform, submitter: Submitter, headers: dict[str, Any]
) -> None:
    platform.worker("a", 2, "threads")
    wrong = garbage.envelope("wrong", "tag-of-the-wrong-one")
    wrong["headers"] |= headers
    right = garbage.envelope("right", "tag-of-the-right-one")
    platform.redis.lpush("celery", json.dumps(wrong), json.dumps(right))
    assert submitter.ended("right").state == "succeeded"
    (row,) = until_set_aside(platform, 1)
    assert (json.loads(row.raw), row.queue) == (wrong, "celery")
    assert job_states(platform) == {"succeeded": 1}
    until(lambda: not platform.redis.exists("celery", "unacked"), "both are acknowledged")


def test_messages_of_old_producers_wait_for_postgres_without_a_storm(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 2, "threads")
    with platform.engine.begin() as connection:
        connection.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        before = int(platform.redis.info("commandstats")["cmdstat_lpush"]["calls"])
        for number in range(3):
            message = garbage.envelope(f"old-{number}", f"tag-{number}")
            platform.redis.lpush("celery", json.dumps(message))
        worker = platform.processes[0]
        worker.wait_for("a message is left in the queue celery")
        worker.wait_for("a message is left in the queue celery")
        # Each try waits for Postgres and then for a second.
        pushed = int(platform.redis.info("commandstats")["cmdstat_lpush"]["calls"]) - before
        assert pushed < 3 + 10
    assert {submitter.ended(f"old-{number}").state for number in range(3)} == {"succeeded"}
