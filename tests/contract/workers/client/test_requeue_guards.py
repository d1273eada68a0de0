"""A message that was set aside touches nothing but its own queue, or the job that it is about."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery

from celery_capacity.routing.insert import single
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model import envelope as envelopes
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.store import quarantine
from celery_capacity.routing.store.archive import archive_finished
from celery_capacity.routing.store.quarantine import SetAside
from celery_capacity.workers.broker import transport
from celery_capacity.workers.client.requeue import Became
from celery_capacity.workers.execute.enroll import Intake
from celery_capacity.workers.membership.served_queues import ServedQueues
from tests.contract.routing.store.test_refused_transitions import fail, refuse, started
from tests.contract.workers.client.test_requeue import again, app, kept, mend, outbox_aside, put
from tests.fixtures.stores.staged import MESSAGE, Stage

__all__ = ["app"]


@pytest.fixture
def take(stage: Stage, app: Celery, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that takes a message as the intake does from the queue `celery`, and sets it aside."""

    def set_aside(raw: bytes, queue: str, reason: Refusal, detail: str) -> None:
        with stage.engine.connect() as connection:
            quarantine.write(connection, [SetAside.of(raw, queue, reason, detail)])

    def take(routing_key: str, **members: str) -> int:
        delivery = {"exchange": "media", "routing_key": routing_key}
        plain = {"body": "no json", "content-type": "application/json", "content-encoding": "utf-8", "headers": {}}
        envelope = {**plain, "properties": {"delivery_tag": "x", "delivery_info": delivery}, **members}
        message = transport.Message(envelopes.read(json.dumps(envelope).encode()), channel=transport._NoChannel())
        monkeypatch.setattr(message, "ack", lambda *_: None)
        intake = Intake(app, ServedQueues(app, app.platform.settings, lambda: None), lambda _: None)
        intake._enroll("celery", message)
        return kept(stage)[-1]

    monkeypatch.setattr(transport.receiving, "set_aside", set_aside)
    return take


def archive(stage: Stage, job: str) -> None:
    stage.sql("UPDATE jobs SET outbox = NULL")
    with stage.engine.connect() as connection:
        assert archive_finished(connection, 0.0, 10) == 1
    # The tombstone has gone by then.
    stage.redis.delete(keys.job(job))
    stage._number -= 1


def test_message_of_a_sender_becomes_no_transition(stage: Stage, app: Celery, take: Any) -> None:
    (job,) = started(stage, 1)
    before = stage.row(job)
    end = {"epoch": "1", "attempt": "9", "state": "succeeded", "step": str(int(Step.ENDED))}
    (result,) = again(app, take(keys.STREAM, job=job, **end))
    assert (result.became, stage.row(job)) == (Became.REQUEUED, before)
    assert stage.redis.llen("celery") == 1
    stage.redis.delete("celery")


def test_row_with_a_forged_queue_becomes_no_transition(stage: Stage, app: Celery) -> None:
    """An older release kept the routing key as the queue."""
    (job,) = started(stage, 1)
    before = stage.row(job)
    forged = {"job": job, "epoch": "1", "attempt": "9", "state": "succeeded", "step": str(int(Step.ENDED))}
    with stage.engine.connect() as connection:
        raw = json.dumps(forged).encode()
        quarantine.write(connection, [SetAside.of(raw, keys.STREAM, Refusal.UNDECODABLE, "unwritable: no body")])
    (result,) = again(app, *kept(stage))
    assert (result.became, stage.row(job)) == (Became.NO_QUEUE, before)


def test_message_goes_back_to_the_queue_that_was_read(stage: Stage, app: Celery, take: Any) -> None:
    assert again(app, take("media.video"))[0].became is Became.REQUEUED
    assert (stage.redis.llen("celery"), stage.redis.exists("media.video")) == (1, 0)
    stage.redis.delete("celery")


def test_end_of_an_archived_job_ends_no_new_job_of_its_id(stage: Stage, app: Celery) -> None:
    (job,) = started(stage, 1)
    refuse(stage, f"NEW.id = '{job}' AND NEW.step = {Step.ENDED.value}")
    fail(stage, job, "it broke")
    stage.apply()
    (message,) = kept(stage)
    mend(stage)
    archive(stage, job)
    assert stage.insert({"cpus": 1000}) == job
    before = stage.row(job)
    (result,) = again(app, message)
    assert (result.became, stage.row(job), kept(stage)) == (Became.OTHER_JOB, before, [message])


def test_outbox_of_an_archived_job_is_not_delivered_for_a_new_one(stage: Stage, app: Celery) -> None:
    (job,) = started(stage, 1)
    stage.end(job)
    left = Outbox([], [{"result": "of the old job"}]).to_text()
    message = put(stage, outbox_aside(stage, job, left), keys.STREAM)
    archive(stage, job)
    assert stage.submit(cpus=1000) == job
    stage.start(job)
    stage.end(job)
    stage.sql("UPDATE jobs SET outbox = NULL")
    (result,) = again(app, message)
    assert (result.became, stage.row(job).outbox) == (Became.OTHER_JOB, None)


# -- faults of one message, and of a store


def test_publish_is_stored_where_the_session_lacks_the_prepared_insert(stage: Stage, app: Celery) -> None:
    """A pooler gives the connection another session than the one that prepared the insert."""
    (job,) = started(stage, 1)
    refuse(stage, "NEW.id = 'child'")
    child = NewJob("child", "task", Request.of({"cpus": 1000}).shape, MESSAGE)
    fail(stage, job, "it broke", Outbox([child], []).to_text())
    stage.apply()
    (message,) = kept(stage)
    mend(stage)
    with app.platform.engine.connect() as connection:
        connection.connection.info[single.BY_ANYBODY.name] = True
    assert again(app, message)[0].done
    stage.apply()
    assert stage.row("child").state == "admitted"
    stage.start("child")
    stage.end("child")


def test_reason_of_an_unreadable_message_has_none_of_its_bytes(stage: Stage, app: Celery) -> None:
    (result,) = again(app, put(stage, b'{"password": "hidden"} \xff', keys.STREAM))
    assert (result.became, "hidden" in result.detail) == (Became.UNREADABLE, False)


def test_job_of_a_wrong_type_stops_no_message_behind_it(stage: Stage, app: Celery) -> None:
    raw = json.dumps({"job": {"a": 1}, "token": "1.1", "outbox": Outbox([], []).to_text()}).encode()
    results = again(app, put(stage, raw, keys.STREAM), put(stage, b"garbage", "celery"))
    assert [result.became for result in results] == [Became.UNREADABLE, Became.REQUEUED]
    stage.redis.delete("celery")


def test_locked_row_stops_no_message_behind_it(stage: Stage, app: Celery) -> None:
    (job,) = started(stage, 1)
    stage.end(job)
    left = outbox_aside(stage, job, Outbox([], [{"result": "kept"}]).to_text())
    messages = put(stage, left, keys.STREAM), put(stage, b"garbage", "celery")
    with stage.engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", (job,))
        results = again(app, *messages)
        connection.exec_driver_sql("ROLLBACK")
    assert [result.became for result in results] == [Became.LOCKED, Became.REQUEUED]
    stage.redis.delete("celery")


def test_requeued_messages_are_told_where_a_store_fails_later(
    stage: Stage, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [put(stage, b"garbage", "celery") for _ in range(3)]
    reach = app.connection_for_write
    urls = iter([None, "redis://127.0.0.1:1/0"])
    monkeypatch.setattr(app, "connection_for_write", lambda: reach(next(urls)))
    results = again(app, *messages)
    assert [result.became for result in results] == [Became.REQUEUED, Became.STORE_AWAY, Became.STORE_AWAY]
    assert kept(stage) == messages[1:]
    stage.redis.delete("celery")
