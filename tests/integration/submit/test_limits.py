"""Excessive input is refused with an error of its own, and leaves nothing. A full backlog refuses until it has room."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from celery import Celery
from sqlalchemy import Engine, text

from celery_capacity import BacklogFull, MessageTooDeep, MessageTooLarge, PlatformError, create_app
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.broker import beat_messages
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.submit.encode import RawMessage
from tests.fixtures.stores.staged import Stage

ADD = "tests.fixtures.tasks.add"
LIMIT = 3


@pytest.fixture
def app(stage: Stage, settings: Settings) -> Iterator[Celery]:
    """Yield an app whose backlog may have three jobs."""
    app = create_app("limited", resolve=lambda _: replace(settings, max_backlog=LIMIT))
    yield app
    app.close()
    app.platform.engine.dispose()
    app.platform.redis.close()


def _rows(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM jobs")).scalar_one())


def _fill(app: Celery) -> None:
    for _ in range(LIMIT):
        app.send_task(ADD, [1, 2])


def _nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "options",
    [
        {"args": [_nested(51)]},
        {"args": [_nested(900)]},
        {"args": [_nested(20_000)]},
        {"kwargs": {"a": _nested(51)}},
        {"headers": {"mine": _nested(51)}},
        {"headers": {"mine": _nested(20_000)}},
        {"args": [_nested(51)], "compression": "gzip"},
    ],
    ids=["args", "900", "20,000", "kwargs", "headers", "20,000 headers", "compressed"],
)
def test_a_message_that_is_nested_too_deep(app: Celery, engine: Engine, options: dict[str, Any]) -> None:
    with pytest.raises(MessageTooDeep, match="nested"):
        app.send_task(ADD, **options)
    assert _rows(engine) == 0


def test_fifty_levels_are_accepted(app: Celery, engine: Engine) -> None:
    app.send_task(ADD, [_nested(50)], {"a": _nested(50)}, headers={"mine": _nested(50)})
    assert _rows(engine) == 1


def raw(body: bytes) -> RawMessage:
    return RawMessage(body, "application/json", "utf-8", {"task": ADD, "id": "x"}, "celery", {})


def test_a_deep_message_of_an_old_producer_is_refused_by_its_text(app: Celery, engine: Engine) -> None:
    deep = f"[[{'[' * 51}0{']' * 51}], {{}}, {{}}]".encode()
    with pytest.raises(MessageTooDeep):
        app.amqp.job_sender.accept_raw(raw(deep))
    assert _rows(engine) == 0


def test_a_message_that_is_too_large(app: Celery, engine: Engine) -> None:
    with pytest.raises(MessageTooLarge, match="1048576 are allowed"):
        app.send_task(ADD, ["x" * 1_100_000, ""])
    assert _rows(engine) == 0


def test_a_full_backlog_refuses_before_anything_is_written(app: Celery, stage: Stage, engine: Engine) -> None:
    _fill(app)
    with pytest.raises(BacklogFull, match="3 jobs or more wait already") as raised:
        app.send_task(ADD, [1, 2])
    assert raised.value.status == 429
    assert _rows(engine) == LIMIT
    assert len(stage.redis.keys(keys.KEYS["job"] + "*")) == LIMIT


def test_jobs_that_do_not_wait_do_not_fill_the_backlog(app: Celery, stage: Stage, engine: Engine) -> None:
    stage.worker("a", cpus=1000 * (2 * LIMIT))
    for _ in range(2 * LIMIT):
        app.send_task(ADD, [1, 2])
    _fill(app)
    with pytest.raises(BacklogFull):
        app.send_task(ADD, [1, 2])


def distrust_count(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time come at which a count is trusted no longer: in a second, or later where counting took long."""
    limit = app.amqp.job_sender._backlog
    until = limit._until
    monkeypatch.setattr(limit, "_clock", lambda: until)


def test_room_in_the_backlog_is_seen_with_the_next_count(
    app: Celery, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(app)
    with pytest.raises(BacklogFull):
        app.send_task(ADD, [1, 2])
    stage.worker("a", cpus=4000)
    distrust_count(app, monkeypatch)
    app.send_task(ADD, [1, 2])
    assert stage.redis.hget(keys.COUNTERS, Refusal.BACKLOG) == b"1"


def test_refusals_are_told_by_reason_with_the_next_submission(
    app: Celery, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task(name="of_the_test")
    def add(first: Any, second: Any = 0) -> None:
        """Do nothing: the job stays in the backlog."""

    def counted() -> dict[str, int]:
        counters: Any = stage.redis.hgetall(keys.COUNTERS)
        numbers = {name.decode(): int(number) for name, number in counters.items()}
        return {name: number for name, number in numbers.items() if name.startswith("refused.")}

    # These calls have a template from here on.
    for _ in range(2):
        add.delay(1, 2)
    app.platform.sending.flush()
    with monkeypatch.context() as silent:
        silent.setattr(app.amqp.job_sender._backlog, "check", lambda _: None)
        calls: list[Callable[[], Any]] = [
            lambda: add.apply_async((1, 2), priority=77),
            lambda: add.apply_async((1, 2), countdown="soon"),
            lambda: app.send_task(ADD, [_nested(51)]),
            lambda: add.delay(_nested(51)),
            lambda: add.delay("x" * 1_100_000),
            lambda: app.submit_many(add, [(1,)], cpus=-1),
        ]
        for call in calls:
            with pytest.raises(PlatformError):
                call()
    assert counted() == {}
    add.delay(1, 2)
    app.platform.sending.flush()
    expected = {"refused.invalid": 3, "refused.too_deep": 2, "refused.too_large": 1}
    assert counted() == expected
    with pytest.raises(BacklogFull):
        add.delay(1, 2)
    assert counted() == expected
    distrust_count(app, monkeypatch)
    with pytest.raises(BacklogFull):
        add.delay(1, 2)
    assert counted() == {**expected, "refused.backlog": 1}


def test_a_running_attempt_is_never_refused(app: Celery, engine: Engine) -> None:
    _fill(app)
    with engine.connect() as connection:
        job = connection.execute(text("SELECT min(id) FROM jobs")).scalar_one()
    with attempts.held(Attempt(Tag(job, Token(1, 1)), "life")):
        app.send_task(ADD, [1, 2])
    assert _rows(engine) == LIMIT + 1


@pytest.mark.parametrize("how", ["cold", "away"])
def test_without_a_ledger_postgres_is_counted(
    app: Celery, stage: Stage, redis_client: redis.Redis, engine: Engine, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(app)
    if how == "cold":
        redis_client.flushdb()
    else:
        monkeypatch.setattr(app.platform.sending, "ask", lambda question: None)
    # The second for which the last count served is over.
    monkeypatch.setattr(app.amqp.job_sender._backlog, "_until", 0.0)
    with pytest.raises(BacklogFull):
        app.send_task(ADD, [1, 2])
    assert _rows(engine) == LIMIT


def test_ticks_pass_a_full_backlog(app: Celery, engine: Engine) -> None:
    _fill(app)
    app.send_task(beat_messages.HEARTBEAT)
    assert _rows(engine) == LIMIT


def test_the_message_of_an_old_producer_waits_for_room(app: Celery, engine: Engine) -> None:
    _fill(app)
    body = json.dumps([[1, 2], {}, {}]).encode()
    with pytest.raises(BacklogFull):
        app.amqp.job_sender.accept_raw(raw(body))
    assert _rows(engine) == LIMIT
