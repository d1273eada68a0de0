"""Chords that are counted in Postgres."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery, states
from celery.app.task import Context
from sqlalchemy import text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.store import chord_counts
from celery_capacity.workers.app.install import create_app
from tests.fixtures.stores.staged import Stage


@pytest.fixture
def app(stage: Stage, settings: Settings) -> Iterator[Celery]:
    app = create_app("chords", resolve=lambda _: settings)
    yield app
    app.platform.sending.close()
    app.close()
    app.platform.engine.dispose()


def test_chord_fails_where_its_body_cannot_be_published(stage: Stage, app: Celery) -> None:
    body = app.signature("body", options={"task_id": "body-1", "cpus": -1})
    with stage.engine.connect() as connection:
        chord_counts.note(connection, "group-1", size=1)
    part = Context(id="part-1", task="part", group="group-1", group_index=0, chord=body)
    app.backend.on_chord_part_return(part, states.SUCCESS, 7)
    result = app.AsyncResult("body-1")
    assert result.state == states.FAILURE
    assert "cpus" in str(result.result)
    with stage.engine.connect() as connection:
        assert not chord_counts.is_noted(connection, "group-1")
        assert connection.execute(text("SELECT count(*) FROM chord_parts")).scalar() == 0
