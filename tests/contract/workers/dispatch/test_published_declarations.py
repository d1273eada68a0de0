"""Declarations that a sender reads in the ledger, and in Postgres where the ledger lacks the task."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import event

from celery_capacity.routing.errors import InvalidRequest, NotAccepted, StoreUnavailable
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.store import worker_rows
from celery_capacity.workers.dispatch.published_declarations import PublishedDeclarations
from tests.fixtures.stores.staged import Stage

ALL: dict[str, dict[str, Any]] = {"film": {"cpus": 4, "gpus": 1}, "mail": {"cpus": 1}}


@pytest.fixture
def published(stage: Stage) -> PublishedDeclarations:
    with stage.engine.connect() as connection:
        worker_rows.declare(connection, ALL, {})
    return PublishedDeclarations(lambda question: question(stage.ledger), lambda: stage.engine)


def test_task_whose_worker_is_not_back_is_read_in_postgres(stage: Stage, published: PublishedDeclarations) -> None:
    """Redis lost its data, and the worker of `mail` was the first to publish again."""
    assert published.of("film") is not None
    published.forget()
    stage.redis.hset(keys.DECLARATIONS, "mail", '{"cpus": 1}')
    film = published.of("film")
    assert film is not None
    assert film.request.get("gpus") == 1


@pytest.mark.parametrize("row", [{"cpus": 1, "memory": "lots"}, {"cpus": -1}, {"of a later release": {"a": 1}}])
def test_row_that_cannot_be_read_concerns_its_own_task_alone(
    row: dict[str, Any], stage: Stage, published: PublishedDeclarations
) -> None:
    with stage.engine.connect() as connection:
        worker_rows.declare(connection, {"gone": row}, {})
    assert published.of("film") is not None


@pytest.mark.parametrize("options", [{"limits_ms": [1, 2, 3]}, {"place": ",?arch:near:aarch64"}, {"limits_ms": 3}])
def test_options_that_cannot_be_read_concern_their_own_task_alone(
    options: dict[str, Any], stage: Stage, published: PublishedDeclarations
) -> None:
    with stage.engine.connect() as connection:
        worker_rows.declare(connection, {"gone": {"cpus": 1}}, {"gone": options})
    assert published.of("film") is not None


def test_failed_first_reading_refuses_and_is_repeated(stage: Stage, published: PublishedDeclarations) -> None:
    """Redis is away, and Postgres answers the second question. A job by the default would ask for 1 CPU, no GPU."""
    engines = iter([StoreUnavailable("for a moment"), stage.engine])

    def engine() -> Any:
        answer = next(engines)
        if isinstance(answer, Exception):
            raise answer
        return answer

    without_redis = PublishedDeclarations(lambda _: None, engine)
    with pytest.raises(NotAccepted, match="film"):
        without_redis.of("film")
    assert without_redis.of("film") is not None


def test_older_declaration_stays_while_no_store_answers(stage: Stage, published: PublishedDeclarations) -> None:
    engines = iter([stage.engine])

    def engine() -> Any:
        if (answer := next(engines, None)) is None:
            raise StoreUnavailable("away")
        return answer

    without_redis = PublishedDeclarations(lambda _: None, engine)
    before = without_redis.of("film")
    without_redis.forget()
    assert before is not None
    assert without_redis.of("film") == before
    with pytest.raises(NotAccepted, match="unknown"):
        without_redis.of("unknown")


def test_unreadable_declaration_refuses_its_own_task(stage: Stage, published: PublishedDeclarations) -> None:
    with stage.engine.connect() as connection:
        worker_rows.declare(connection, {"gone": {"cpus": -1}}, {})
    stage.redis.hset(keys.DECLARATIONS, "broken", "{")
    for task in ("gone", "broken"):
        with pytest.raises(InvalidRequest, match=task) as refused:
            published.of(task)
        assert "start a worker" in refused.value.advice
    assert published.of("film") is not None


def test_second_thread_waits_for_the_first_reading(stage: Stage, published: PublishedDeclarations) -> None:
    asking, go_on = threading.Event(), threading.Event()

    def ask(question: Any) -> Any:
        asking.set()
        assert go_on.wait(5)
        return question(stage.ledger)

    shared = PublishedDeclarations(ask, lambda: stage.engine)
    first = threading.Thread(target=shared.of, args=("film",))
    first.start()
    assert asking.wait(5)
    threading.Timer(0.2, go_on.set).start()
    second = shared.of("film")
    first.join()
    assert second is not None


def test_submissions_ask_once_in_a_while(stage: Stage, published: PublishedDeclarations) -> None:
    asked: list[str] = []
    event.listen(stage.engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    for _ in range(100):
        published.of("film")
        published.of("unknown")
    assert len(asked) == 2, asked


def test_worker_without_options_removes_older_ones(stage: Stage, published: PublishedDeclarations) -> None:
    with stage.engine.connect() as connection:
        worker_rows.declare(connection, ALL, {"film": {"tenant": "physics"}})
        worker_rows.declare(connection, ALL, {})
    film = published.of("film")
    assert film is not None
    assert film.tenant is None
