"""The audit: each action has its outcome once, is found by its number, and is forgotten after its time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from celery_capacity.platform.operations import jobs
from celery_capacity.routing.database import audit
from celery_capacity.routing.database.audit import Actor, Outcome, Way
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.model.states import State
from celery_capacity.workers.client.cancel import Became, Cancellation
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.retention import audit as duty
from tests.fixtures.stores.staged import Stage

NO_APP: Any = None
ANN = Actor("ann@host", Way.CLI)


@pytest.fixture
def stores(stage: Stage) -> Stores:
    stores = Stores(lambda _: stage.settings)
    stores._made.update(settings=stage.settings, engine=stage.engine, ledger=stage.ledger)
    return stores


def test_action_has_its_first_outcome_and_its_first_targets(stage: Stage) -> None:
    ids = [f"job-{number}\0" for number in range(audit.MAX_TARGETS + 1)]
    with stage.engine.connect() as connection:
        seq = audit.begin(connection, ANN, "cancel", ids, {"reason": "x" * 9999, "empty": None})
        begun = audit.entry(connection, seq)
        audit.end(connection, seq, Outcome.PARTLY, {"cancelled": 7})
        audit.end(connection, seq, Outcome.DONE, {"cancelled": 8})
        ended = audit.entry(connection, seq)
        assert audit.newest(connection, 5) == [ended]
        assert audit.newest(connection, 5, seq) == []
        assert audit.entry(connection, seq + 1) is None
    assert begun is not None
    assert ended is not None
    assert (begun.outcome, begun.number, len(begun.targets)) == (None, len(ids), audit.MAX_TARGETS)
    assert (ended.outcome, ended.details["cancelled"], len(ended.details["reason"])) == ("partly", 7, audit.MAX_TEXT)
    assert (ended.by, ended.via, set(ended.details)) == ("ann@host", "cli", {"reason", "cancelled"})


def test_actions_are_forgotten_after_their_time(stage: Stage, stores: Stores) -> None:
    with stage.engine.connect() as connection:
        for target in ("old", "new"):
            audit.begin(connection, ANN, "cordon", [target], {})
    stage.sql("UPDATE audit SET made_at = made_at - interval '91 days' WHERE targets = ARRAY['old']")
    assert duty.run_once(NO_APP, stores) == {"forgotten": 1}
    with stage.engine.connect() as connection:
        assert [entry.targets for entry in audit.newest(connection, 5)] == [("new",)]


def test_actions_are_forgotten_in_chunks(stage: Stage, stores: Stores) -> None:
    with stage.engine.connect() as connection:
        for _ in range(5):
            audit.begin(connection, ANN, "cordon", ["old"], {})
        stage.sql("UPDATE audit SET made_at = made_at - interval '91 days'")
        assert audit.forget(connection, stage.settings.keep_audit, 2) == 2
    assert duty.run_once(NO_APP, stores) == {"forgotten": 3}


def cancelled_until(most: int) -> Any:
    """Return a cancellation of three jobs, during which a store goes away after so many."""

    def cancel(*_: Any, **__: Any) -> Iterator[Cancellation]:
        for number in range(3):
            if number == most:
                raise StoreUnavailable("Redis does not answer")
            yield Cancellation(f"job-{number}", Became.CANCELLED, State.CANCELLED, None)

    return cancel


@pytest.mark.parametrize(("most", "outcome"), [(0, "partly"), (2, "partly"), (3, "done")])
def test_outcome_is_as_far_as_an_action_came(
    most: int, outcome: str, stage: Stage, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_capacity.workers.client.cancel.cancel", cancelled_until(most))
    with suppress(StoreUnavailable):
        list(jobs.cancel(NO_APP, stores, ANN, ["job-0", "job-1", "job-2"]))
    with stage.engine.connect() as connection:
        (entry,) = audit.newest(connection, 5)
    assert (entry.outcome, entry.details.get("cancelled", 0)) == (outcome, most)
    assert ("error" in entry.details) == (most < 3)


def test_reader_that_leaves_early_leaves_an_action_done_in_part(
    stage: Stage, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_capacity.workers.client.cancel.cancel", cancelled_until(3))
    results: Any = jobs.cancel(NO_APP, stores, ANN, ["job-0", "job-1", "job-2"])
    next(results)
    results.close()
    with stage.engine.connect() as connection:
        (entry,) = audit.newest(connection, 5)
    assert (entry.outcome, entry.details["cancelled"]) == ("partly", 1)


@pytest.mark.parametrize(("keep", "seconds"), [(0.0, 3600.0), (7_776_000.0, 3600.0), (100.0, 10.0), (0.001, 1.0)])
def test_pause_follows_the_time_that_actions_are_kept(keep: float, seconds: float, stage: Stage) -> None:
    assert duty.pause(dataclasses.replace(stage.settings, keep_audit=keep)) == seconds
