"""A message that was set aside goes back where it came from, or stays in the quarantine with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from celery import Celery
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store import quarantine
from celery_capacity.routing.store.quarantine import MAX_BYTES, SetAside
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.client.requeue import Became, Requeued, requeue
from tests.contract.routing.store.test_refused_transitions import fail, refuse, started
from tests.fixtures.stores.staged import MESSAGE, MOST_LOSSES, Stage


@pytest.fixture
def app(stage: Stage) -> Iterator[Celery]:
    stage.worker("a", cpus=40_000)
    app = create_app("requeue", resolve=lambda _: stage.settings)
    yield app
    app.close()
    app.platform.engine.dispose()
    app.platform.redis.close()


def kept(stage: Stage) -> list[int]:
    """Return the ids of the messages in the quarantine, oldest first."""
    with stage.engine.connect() as connection:
        return [message["id"] for message in reversed(quarantine.newest(connection, 100, 2**62))]


def put(stage: Stage, raw: bytes, queue: str) -> int:
    reason = Refusal.NO_TRANSITION if queue == keys.STREAM else Refusal.NO_MESSAGE
    with stage.engine.connect() as connection:
        quarantine.write(connection, [SetAside.of(raw, queue, reason, "a test put it here")])
    return kept(stage)[-1]


def outbox_aside(stage: Stage, job: str, left: str) -> bytes:
    """Return an outbox of the attempt of a job, as it is set aside."""
    row = stage.row(job)
    return json.dumps({"job": job, "token": f"{row.epoch}.{row.attempt}", "outbox": left}).encode()


def again(app: Celery, *messages: int) -> list[Requeued]:
    return list(requeue(app, app.platform, messages))


def mend(stage: Stage) -> None:
    stage.sql("DROP TRIGGER refuse ON jobs")


# -- messages


def test_message_is_back_in_its_queue_as_it_came(stage: Stage, app: Celery) -> None:
    messages = [put(stage, raw, "celery") for raw in (b"\xff garbage", b"[]")]
    assert [result.became for result in again(app, *messages, messages[0])] == [Became.REQUEUED] * 2
    assert stage.redis.lrange("celery", 0, -1) == [b"[]", b"\xff garbage"]
    assert kept(stage) == []
    assert again(app, messages[0])[0].became is Became.UNKNOWN
    stage.redis.delete("celery")


@pytest.mark.parametrize(
    ("raw", "queue", "became"),
    [
        (b"x" * MAX_BYTES, "celery", Became.CUT),
        (b'{"headers": {}, "body": ""}', "celery", Became.PARTS),
        (b"garbage", "nobodys", Became.NO_QUEUE),
        (b"garbage", "", Became.NO_QUEUE),
        (b"garbage", "worker.a.other-life", Became.WORKER_GONE),
        (b"garbage", "worker.b.life", Became.WORKER_GONE),
        (b"garbage", "worker. .life", Became.NO_QUEUE),
        (b"garbage", keys.STREAM, Became.UNREADABLE),
        (b"[]", keys.STREAM, Became.UNREADABLE),
        (b'{"job": "job-x", "attempt": "many"}', keys.STREAM, Became.UNREADABLE),
        (b'{"job": "job-x", "token": "1.1", "outbox": "[]"}', keys.STREAM, Became.UNREADABLE),
        (b'{"job": "job-x", "token": "1.1"}', keys.STREAM, Became.UNREADABLE),
        (b'{"job": "job-x", "attempt": "1"}', keys.STREAM, Became.OVERTAKEN),
    ],
)
def test_message_stays_with_a_reason(raw: bytes, queue: str, became: Became, stage: Stage, app: Celery) -> None:
    message = put(stage, raw, queue)
    (result,) = again(app, message)
    assert (result.became, bool(result.detail), result.done) == (became, True, False), result
    assert kept(stage) == [message]
    assert not stage.redis.exists("celery", queue)


def test_message_of_a_served_queue_goes_back(stage: Stage, app: Celery) -> None:
    stage.worker("b", cpus=1000, queues=["video"])
    assert again(app, put(stage, b"garbage", "video"))[0].done
    assert stage.redis.lpop("video") == b"garbage"


def test_message_is_kept_while_the_broker_is_away(stage: Stage, app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [put(stage, b"garbage", "celery") for _ in range(2)]
    with monkeypatch.context() as away:
        away.setattr(app, "connection_for_write", partial(app.connection_for_write, "redis://127.0.0.1:1/0"))
        with pytest.raises(StoreUnavailable, match="the broker does not take the message"):
            again(app, *messages)
    assert kept(stage) == messages
    assert [result.done for result in again(app, *messages)] == [True, True]
    stage.redis.delete("celery")


def test_message_is_rather_twice_than_lost(stage: Stage, app: Celery) -> None:
    """Postgres refuses to let the message go, after the queue has it."""
    message = put(stage, b"garbage", "celery")
    stage.sql(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'kept' "
        "USING ERRCODE = '57P01'; END $$"
    )
    stage.sql(
        "CREATE CONSTRAINT TRIGGER keep AFTER DELETE ON quarantine DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
        "EXECUTE FUNCTION keep()"
    )
    with pytest.raises((StoreUnavailable, DBAPIError)):
        again(app, message)
    assert (stage.redis.lpop("celery"), kept(stage)) == (b"garbage", [message])
    stage.sql("DROP TRIGGER keep ON quarantine")


# -- transitions


def test_end_is_written_once_postgres_takes_it(stage: Stage, app: Celery) -> None:
    (job,) = started(stage, 1)
    refuse(stage, f"NEW.id = '{job}' AND NEW.step = {Step.ENDED.value}")
    fail(stage, job, "it broke", Outbox([], [{"result": "kept"}]).to_text())
    stage.apply()
    (message,) = kept(stage)
    assert "set aside" in stage.row(job).error
    mend(stage)
    assert again(app, message) == [Requeued(message, Became.REQUEUED)]
    row = stage.row(job)
    assert (row.state, row.error, json.loads(row.outbox)["results"]) == ("failed", "it broke", [{"result": "kept"}])
    assert kept(stage) == []


def test_publish_is_stored_once_postgres_takes_it(stage: Stage, app: Celery) -> None:
    (job,) = started(stage, 1)
    refuse(stage, "NEW.id = 'child'")
    child = NewJob("child", "task", Request.of({"cpus": 1000}).shape, MESSAGE)
    fail(stage, job, "it broke", Outbox([child], []).to_text())
    stage.apply()
    (message,) = kept(stage)
    (refused,) = again(app, message)
    assert (refused.became, "refused by the test" in refused.detail) == (Became.REFUSED, True)
    assert kept(stage) == [message]
    mend(stage)
    assert again(app, message)[0].done
    # The child starts at once, without a sweep.
    stage.apply()
    assert (stage.row("child").state, stage.row(job).state) == ("admitted", "failed")
    stage.start("child")
    stage.end("child")


def test_retry_of_an_ended_job_changes_nothing(stage: Stage, app: Celery) -> None:
    (job,) = started(stage, 1)
    refuse(stage, f"NEW.id = '{job}' AND NEW.successor IS NOT NULL")
    retry = NewJob(job, "task", Request.of({"cpus": 1000}).shape, MESSAGE, retries=1)
    ended = [Ended(job, Token(1, 1), Outcome.RETRIED, "", Outbox([retry]).to_text())]
    stage.ledger.settle("a", "a-life", ended=ended, most_losses=MOST_LOSSES)
    stage.apply()
    before = stage.row(job)
    mend(stage)
    (message,) = kept(stage)
    assert again(app, message)[0].became is Became.OVERTAKEN
    assert (stage.row(job), kept(stage)) == (before, [message])


def test_transition_of_an_older_attempt_changes_nothing(stage: Stage, app: Celery) -> None:
    (job,) = started(stage, 1)
    stage.end(job)
    before = stage.row(job)
    old: dict[str, Any] = {"job": job, "epoch": "1", "attempt": "0", "state": "failed", "step": Step.ENDED.value}
    message = put(stage, json.dumps({**old, "worker": "a", "incarnation": "a-life"}).encode(), keys.STREAM)
    assert again(app, message)[0].became is Became.OVERTAKEN
    assert stage.row(job) == before


def test_outbox_is_delivered_once_it_can_be_read(stage: Stage, app: Celery) -> None:
    (job,) = started(stage, 1)
    stage.end(job)
    left = Outbox([], [{"result": "kept"}]).to_text()
    raw = outbox_aside(stage, job, left)
    first, second = put(stage, raw, keys.STREAM), put(stage, raw, keys.STREAM)
    assert again(app, first)[0].done
    assert stage.row(job).outbox == left
    # Another outbox is on its way there.
    assert again(app, second)[0].became is Became.OVERTAKEN


def test_outbox_of_an_older_attempt_is_not_delivered(stage: Stage, app: Celery) -> None:
    (job,) = started(stage, 1)
    stage.end(job)
    message = put(stage, outbox_aside(stage, job, Outbox([], [{"result": "old"}]).to_text()), keys.STREAM)
    stage.sql("UPDATE jobs SET attempt = attempt + 1, outbox = NULL")
    assert again(app, message)[0].became is Became.OVERTAKEN
    assert stage.row(job).outbox is None
    stage.sql("UPDATE jobs SET attempt = attempt - 1")
