"""A worker that registers anew, call by call, without stores."""

from __future__ import annotations

from typing import Any, cast
from unittest.mock import MagicMock, Mock

import pytest
from psycopg2 import OperationalError
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger.replies import Filled, Renewed
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store import worker_rows
from celery_capacity.workers.membership import orphans, registration
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.membership.registration import Membership
from celery_capacity.workers.process.holdings import Holding, Holdings

ONE = Request.of({"cpus": 1000, "slots": 1})


def rejoin(holdings: Holdings, refused: list[tuple[str, Token]]) -> tuple[list[Any], Mock, Mock]:
    """Register anew, and return the names of the calls in their order, the ledger, and the recorder."""
    ledger, recorder, order = Mock(), Mock(), list[Any]()
    ledger.settings.due_interval, ledger.settings.most_losses = 1.0, 3

    def answer(name: str, value: Any) -> Any:
        def say(*_: Any, **__: Any) -> Any:
            order.append(name)
            return value

        return say

    ledger.register.side_effect = answer("register", Filled(0))
    ledger.adopt.side_effect = answer("adopt", refused)
    ledger.renew.side_effect = answer("renew", Renewed(known=True, taken_back=0))

    def flush(within: float) -> None:
        order.append(("flush", within))

    membership = Membership(context_of(Mock(), ledger, Mock(epoch=2)), unwritten=lambda: {"ended"}, flush=flush)
    membership._capacity = membership._measured = Capacity.of({"cpus": 4000, "slots": 4})
    membership.rejoin(holdings, recorder, Mock())
    return order, ledger, recorder


def context_of(engine: Any, ledger: Any, confirmation: Any) -> WorkerContext:
    return WorkerContext(
        Mock(lifetime=None), engine, ledger, Mock(), confirmation, Mock(), Mock(is_behind=lambda: False, call=Mock())
    )


def held(*attempts: tuple[str, Token]) -> Holdings:
    holdings = Holdings({"cpus": 4000, "slots": 4})
    for job, token in attempts:
        holdings.add(Holding(job, token, ONE, "n"))
    return holdings


def test_rejoin_writes_ends_before_it_names_holdings() -> None:
    order, ledger, _ = rejoin(held(("job", Token(1, 1))), [])
    assert order == [("flush", 1.0), "register", "adopt", "renew"]
    # Each end that is not written by then is named, so that nobody takes it for lost.
    names, options = ledger.renew.call_args.args[3], ledger.renew.call_args.kwargs
    assert (sorted(names), options["missing_ms"]) == (["ended", "job"], 0)


def test_heartbeat_names_a_job_whose_claim_is_not_answered() -> None:
    holdings = held(("job", Token(1, 1)))
    holdings.claiming = frozenset({"claimed"})
    _, ledger, _ = rejoin(holdings, [])
    assert sorted(ledger.renew.call_args.args[3]) == ["claimed", "ended", "job"]


def test_rejoin_disowns_the_attempt_that_lost_its_lease_alone() -> None:
    holdings = held(("job", Token(1, 1)), ("job", Token(2, 2)))
    _, _, recorder = rejoin(holdings, [("job", Token(1, 1))])
    assert holdings._strays == {("job", Token(1, 1))}
    recorded = [(transition.job, transition.token) for transition in recorder.add.call_args.args[0]]
    assert recorded == [("job", Token(2, 2))]


def test_capacity_that_the_ledger_did_not_hear_of_is_published_again() -> None:
    ledger = Mock()
    membership = Membership(context_of(Mock(), ledger, Mock(epoch=2)))
    membership._capacity = Capacity.of({"cpus": 4000, "slots": 4})
    membership._published = frozenset()
    smaller = Capacity.of({"cpus": 2000, "slots": 2})
    ledger.register.side_effect = StoreUnavailable("no answer")
    with pytest.raises(StoreUnavailable):
        membership.resize(smaller, held())
    ledger.register.side_effect = [Filled(0)]
    for _ in range(2):
        membership.resize(smaller, held())
    assert [call.args[3] for call in ledger.register.call_args_list] == [smaller.shape] * 2


def test_leave_keeps_the_book_until_postgres_has_it() -> None:
    """A worker whose book alone is gone would be ready in Postgres for ever: nothing of it lapses any more."""
    engine, ledger = MagicMock(), Mock()
    ledger.leave.return_value = 0
    membership = Membership(context_of(engine, ledger, Mock(epoch=2, authority="ledger")))
    engine.connect.side_effect = DBAPIError("", {}, OperationalError("stalled"))
    with pytest.raises(StoreUnavailable):
        membership.leave(held())
    ledger.leave.assert_not_called()
    engine.connect.side_effect = None
    assert membership.leave(held())
    ledger.leave.assert_called_once()


def test_heartbeat_ends_no_processes_of_dead_workers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """That may take seconds for each of them, and the lease in the ledger waits for this heartbeat."""
    dead = Mock(incarnation="former")
    see_to = Mock()
    monkeypatch.setattr(worker_rows, "see_worker", lambda *_, **__: (Mock(), [dead]))
    monkeypatch.setattr(registration, "is_known_dead", lambda *_: True)
    monkeypatch.setattr(orphans, "see_to", see_to)
    monkeypatch.setattr(registration, "WorkerRow", Mock())
    context = context_of(MagicMock(), Mock(), Mock())
    membership = Membership(context)
    membership._measured = Capacity.of({"cpus": 4000, "slots": 4})
    for _ in range(2):
        assert membership.tell_postgres(ledger_lost=False, flush_within=0.0)
    see_to.assert_not_called()
    (call,) = cast(Mock, context.recorder.call).call_args_list
    call.args[0]()
    see_to.assert_called_once_with(dead, context.identity.pid_space)
