"""Ends of attempts while Postgres decides: an end that Postgres does not take holds back no other."""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Engine, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.schema import CHANNEL
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.job import Publisher
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.tenants import Rule
from celery_capacity.routing.store import claims, controls, fencing
from celery_capacity.workers.membership.authority_check import Confirmation
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.holdings import Holding, Holdings
from celery_capacity.workers.process.identity import Identity
from celery_capacity.workers.process.stores import make_engine
from celery_capacity.workers.settle.postgres_ends import End, PostgresEnds
from celery_capacity.workers.traces import worker
from tests.contract.routing.store.test_refused_transitions import refuse, set_aside
from tests.fixtures.stores.staged import Stage


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=8000)
    stage.sql("UPDATE authority SET authority = 'postgres'")
    return stage


@pytest.fixture
def holdings() -> Holdings:
    return Holdings({"cpus": 8000, "slots": 8})


@pytest.fixture
def late() -> list[tuple[str, Token, str]]:
    """Return the list of (job, token, outbox) of ends that were not written."""
    return []


@pytest.fixture
def identity() -> Identity:
    return Identity("a")


@pytest.fixture
def ends(
    stage: Stage, settings: Settings, holdings: Holdings, late: list[tuple[str, Token, str]], identity: Identity
) -> Iterator[PostgresEnds]:
    bounded = make_engine(str(settings.database_url))
    confirmation = Confirmation(bounded, 1.0, lambda: None)
    confirmation.ask()
    recorder: Any = Mock(call=lambda action: action())
    context = WorkerContext(settings, bounded, stage.ledger, identity, confirmation, holdings, recorder)
    yield PostgresEnds(context, lambda: None, lambda: None, lambda _: None, lambda *left: late.append(left))
    bounded.dispose()


def ended(stage: Stage, holdings: Holdings, number: int, left: str = "") -> deque[End]:
    """Return ends of jobs that this worker took and whose bodies have returned.

    `left` is the outbox of each.
    """
    jobs = [stage.insert({"cpus": 1000}) for _ in range(number)]
    with stage.engine.connect() as connection:
        taken = claims.take(connection, stage.ledger.epoch, "a", "a-life", jobs)
    for claimed in taken:
        holdings.add(Holding(claimed.job, claimed.token, Request.from_shape(claimed.shape), ""))
    return deque(End(Ended(claimed.job, claimed.token, Outcome.SUCCEEDED, "", left)) for claimed in taken)


def notified(stage: Stage, listening: Any) -> bool:
    """Return True if the workers that pull were notified since the last call."""
    with stage.engine.connect() as connection:
        connection.execute(text(f"NOTIFY {CHANNEL}, 'mark'"))
    notices: list[str] = []
    while "mark" not in notices:
        select.select([listening], [], [])
        listening.poll()
        notices += [notice.payload for notice in listening.notifies]
        listening.notifies.clear()
    return "" in notices


def test_end_wakes_all_workers_where_a_quota_may_hold_jobs_back(
    stage: Stage, holdings: Holdings, ends: PostgresEnds
) -> None:
    with stage.engine.connect() as connection:
        listening: Any = connection.connection.driver_connection
        connection.execute(text(f"LISTEN {CHANNEL}"))
        assert ends.settle(ended(stage, holdings, 1), deque())
        assert not notified(stage, listening)
        with stage.engine.connect() as writing:
            controls.set_tenant(writing, "default", Rule(quota={"slots": 1}), "ann@desk")
        notified(stage, listening)
        assert ends.settle(ended(stage, holdings, 1), deque())
        assert notified(stage, listening)
        connection.execute(text(f"UNLISTEN {CHANNEL}"))


def test_end_makes_the_span_of_the_result_once_it_is_written(
    stage: Stage, holdings: Holdings, ends: PostgresEnds, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    pending = ended(stage, holdings, 1)
    end = pending[0].ended
    traces = worker.WorkerTraces("a", holdings, stage.ledger.now_ms)
    monkeypatch.setitem(worker._workers, identity.incarnation, traces)
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    traces.around(f"{end.job}:{end.token}", print, ("render", end.job, headers))
    traces.over(end.job, end.token)
    assert exporter.get_finished_spans() == ()
    assert ends.settle(pending, deque())
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.parent and span.parent.span_id) == ("result", 0xB7AD6B7169203331)
    assert span.attributes == {
        "celery_capacity.attempt": end.token.attempt,
        "celery_capacity.worker": "a",
        "celery_capacity.outcome": "succeeded",
    }


def test_locked_row_holds_back_its_own_end_alone(
    engine: Engine, stage: Stage, holdings: Holdings, ends: PostgresEnds
) -> None:
    pending = ended(stage, holdings, 4)
    jobs = [end.ended.job for end in pending]
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": jobs[1]})
        assert ends.settle(pending, deque())
        assert [stage.row(job).state for job in jobs] == ["succeeded", "running", "succeeded", "succeeded"]
        assert [end.ended.job for end in pending] == holdings.jobs() == [jobs[1]]
        assert not ends.settle(pending, deque())
    assert ends.settle(pending, deque())
    assert stage.row(jobs[1]).state == "succeeded"
    assert not pending and not holdings.all()


@pytest.mark.parametrize("first", [False, True])
def test_bad_end_holds_back_no_other(stage: Stage, holdings: Holdings, ends: PostgresEnds, first: bool) -> None:
    pending = ended(stage, holdings, 4)
    jobs = [end.ended.job for end in pending]
    bad = jobs[0 if first else 2]
    refuse(stage, f"NEW.id = '{bad}' AND NEW.outbox IS NULL AND NEW.finished_at IS NOT NULL")
    assert ends.settle(pending, deque())
    assert [stage.row(job).state for job in jobs] == ["succeeded"] * 4
    assert len(set_aside(stage)) == 1
    assert not pending and not holdings.all()


def test_value_of_a_job_that_was_closed_without_its_worker_is_told_late(
    stage: Stage, holdings: Holdings, ends: PostgresEnds, late: list[tuple[str, Token, str]]
) -> None:
    """The attempt ended itself, its worker stood still, and another worker closed it meanwhile."""
    (end,) = pending = ended(stage, holdings, 1, left="the value")
    with stage.engine.connect() as connection, connection.begin():
        publisher = Publisher(end.ended.job, end.ended.token, "a-life")
        assert fencing.commit(connection, publisher)
        assert fencing.close(connection, end.ended.job, end.ended.token)
    assert ends.settle(pending, deque())
    assert late == [(end.ended.job, end.ended.token, "the value")]
    assert not pending and not holdings.all()
