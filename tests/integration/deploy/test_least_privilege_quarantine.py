"""Messages that were set aside are put back and dropped with the rights of a worker, and with those of nobody else.

The users of Redis and the roles of Postgres are those of `test_least_privilege.py`. A worker sets the messages aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from celery_capacity import create_app
from celery_capacity.platform.operations.controls import drop_quarantined, requeue_quarantined
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.audit import Actor, Way
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.states import Step
from tests.fixtures.jobs.setting_aside import set_aside, until_set_aside
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers.pair import environment_of
from tests.fixtures.waiting import until
from tests.integration.deploy.test_least_privilege import (
    ADD,
    denied,
    guarded_redis,
    platform,
    role_url,
    submitter,
    url_of,
)

__all__ = ["guarded_redis", "platform", "role_url", "submitter"]

ANN = Actor("ann", Way.API)


@pytest.fixture
def acting(platform: Platform) -> Iterator[Celery]:
    """Yield an app with the rights of a worker, as a dashboard in which people act has them."""
    yield from _app(Settings.from_environ(platform.environment))


@pytest.fixture
def looking(guarded_redis: int, role_url: Any, tmp_path: Path) -> Iterator[Celery]:
    """Yield an app with the rights of a dashboard in which people only look."""
    environment = environment_of(url_of("dashboard", guarded_redis), role_url("dashboard"), tmp_path)
    yield from _app(Settings.from_environ(environment))


def _app(settings: Settings) -> Iterator[Celery]:
    app = create_app("acting", resolve=lambda _: settings)
    yield app
    app.close()
    app.platform.engine.dispose()
    app.platform.redis.close()


def refuse(platform: Platform, condition: str) -> None:
    """Have Postgres refuse each row of `jobs` that meets this condition, as data that it cannot hold."""
    statements = (
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused by the test'"
        " USING ERRCODE = '22P05'; END $$",
        f"CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON jobs FOR EACH ROW WHEN ({condition})"
        " EXECUTE FUNCTION refuse()",
    )
    with platform.engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def mend(platform: Platform) -> None:
    with platform.engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER refuse ON jobs")


def ids(platform: Platform) -> list[int]:
    with platform.engine.connect() as connection:
        return list(connection.execute(text("SELECT id FROM quarantine ORDER BY id")).scalars())


def state_of(platform: Platform, job: str) -> str | None:
    with platform.engine.connect() as connection:
        return connection.execute(text("SELECT state FROM jobs WHERE id = :id"), {"id": job}).scalar_one_or_none()


def test_worker_rights_put_each_kind_back_and_drop(platform: Platform, submitter: Celery, acting: Celery) -> None:
    platform.worker("a", cpus=2)
    refuse(platform, f"NEW.id = 'late' OR NEW.id = 'ended' AND NEW.step = {Step.ENDED.value}")
    url = platform.settings.redis_url
    with Celery("old", broker=url, backend=url, set_as_current=False) as old:
        old.send_task(ADD, [20, 22], task_id="late")
    until_set_aside(platform, 1)
    assert submitter.send_task(ADD, [1, 2], task_id="ended").get(timeout=60) == 3
    until_set_aside(platform, 2)
    queue: Any = platform.redis.hget(keys.book("a"), "queue")
    platform.redis.lpush(queue, b"garbage")
    until_set_aside(platform, 3)
    mend(platform)
    before = ids(platform)
    results = requeue_quarantined(acting, acting.platform, ANN, before)
    assert [result.to_json() for result in results] == [
        {"id": message, "result": "requeued", "detail": None} for message in before
    ]
    assert state_of(platform, "ended") == "succeeded"
    until(lambda: state_of(platform, "late") == "succeeded" or None, lambda: f"late runs: {set_aside(platform)}")
    # A worker cannot read the third one, and sets it aside once more.
    until(lambda: ids(platform) != [] or None, "it comes again")
    assert drop_quarantined(acting.platform, ANN, ids(platform)) == 1
    assert ids(platform) == []
    with platform.engine.connect() as connection:
        entries = connection.execute(text("SELECT action, outcome, made_by FROM audit ORDER BY seq")).all()
    assert [tuple(entry) for entry in entries] == [("requeue", "done", "ann"), ("drop", "done", "ann")]
    assert [entry for entry in denied(platform.redis) if "config" not in entry] == []


def test_rights_of_those_who_look_put_nothing_back(platform: Platform, looking: Celery) -> None:
    with platform.engine.begin() as connection:
        added = "INSERT INTO quarantine (raw, queue, reason) VALUES ('x', 'celery', 'not_json: x') RETURNING id"
        message = connection.exec_driver_sql(added).scalar_one()
    for act in (
        lambda: requeue_quarantined(looking, looking.platform, ANN, [message]),
        lambda: drop_quarantined(looking.platform, ANN, [message]),
    ):
        with pytest.raises((PlatformError, ProgrammingError), match="permission denied"):
            act()
    assert ids(platform) == [message]
    assert not platform.redis.exists("celery")
