"""Ends of jobs whose keys the ledger lost: each is said until it is settled, whatever fails.

A worker that leaves says its ends, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.ledger.replies import Released, ReleaseVerdict, Settled
from celery_capacity.routing.model.reasons import Tally
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome, State
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.holdings import Holding, Holdings
from celery_capacity.workers.results.store_calls import StoreCalls
from celery_capacity.workers.settle.settle_thread import LedgerThread

ONE = Request.of({"cpus": 1000, "slots": 1})


class Ledger:
    """A ledger that knows the job once it was adopted, and misses as many adoptions as `forgets` says."""

    def __init__(self) -> None:
        self.epoch, self.settings = 1, type("Settings", (), {"most_losses": 3})
        self.known, self.forgets = False, 0
        self.tally = Tally()
        self.errors: list[Exception] = []
        self.verdicts: list[str] = []

    def now_ms(self) -> int:
        return 0

    def settle(self, *_: Any, ended: Any = (), **__: Any) -> Settled:
        verdict = ReleaseVerdict.RELEASED if self.known else ReleaseVerdict.UNKNOWN
        self.verdicts += [verdict for _ in ended]
        state = State.SUCCEEDED if self.known else None
        return Settled([Released(end, verdict, state, "1-1") for end in ended], [], [])

    def follow(self, worker: str, settled: Settled) -> None:
        assert not settled.shapes

    def adopt(self, *_: Any) -> list[tuple[str, str]]:
        if self.errors:
            raise self.errors.pop(0)
        self.forgets, self.known = self.forgets - 1, self.forgets <= 0
        return []


class Bench:
    """A settle thread that holds one job.

    `claims`: the answers of Postgres, one after the other, then True.
    """

    def __init__(self) -> None:
        self.ledger, self.claims, self.recorded = Ledger(), list[bool | None](), list[Any]()
        self.holdings = Holdings({"cpus": 4000, "slots": 4})
        self.holdings.add(Holding("job", Token(1, 1), ONE, ""))
        self.calls = StoreCalls()
        recorder = Mock(is_behind=lambda: False, call=self.calls.call, claim=self._claim)
        confirmation: Any = Mock(epoch=1, authority="ledger", may_admit=True)
        identity: Any = type("Identity", (), {"name": "w", "incarnation": "life", "pid": 7})()
        parts: Any = (self.ledger, identity, confirmation, self.holdings, recorder)
        context = WorkerContext(Mock(), Mock(), *parts)
        self.thread = LedgerThread(context, Mock(decides=False), self.recorded.extend, Mock(), Mock(), Mock())
        self.thread.start()
        self.calls.start()

    def _claim(self, _: Any) -> bool | None:
        return self.claims.pop(0) if self.claims else True


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.thread.stop(10.0)
    bench.calls.stop(10.0)


def test_end_is_repeated_once_the_job_is_restored(bench: Bench) -> None:
    bench.thread.end("job", Token(1, 1), Outcome.SUCCEEDED)
    assert bench.thread.stop(10.0)
    assert bench.ledger.verdicts == ["unknown", "released"]
    assert (len(bench.recorded), bench.holdings.jobs()) == (1, [])


def test_worker_that_leaves_waits_until_postgres_answers(bench: Bench) -> None:
    bench.claims = [None] * 3
    bench.thread.end("job", Token(1, 1), Outcome.SUCCEEDED)
    assert bench.thread.stop(10.0)
    assert bench.ledger.verdicts == ["unknown"] * 4 + ["released"]
    assert (len(bench.recorded), bench.holdings.jobs()) == (1, [])


def test_worker_that_leaves_waits_no_longer_than_it_may(bench: Bench) -> None:
    bench.claims = [None] * 1000
    bench.thread.end("job", Token(1, 1), Outcome.SUCCEEDED)
    assert not bench.thread.stop(0.5)
    bench.claims = []
    assert bench.thread.stop(10.0)


def test_end_is_kept_whatever_fails(bench: Bench) -> None:
    bench.ledger.errors = [PlatformError("another database"), RuntimeError("what nobody thought of")]
    bench.thread.end("job", Token(1, 1), Outcome.SUCCEEDED)
    assert bench.thread.stop(10.0)
    assert bench.ledger.verdicts == ["unknown"] * 3 + ["released"]


def test_key_may_be_lost_once_more(bench: Bench) -> None:
    bench.ledger.forgets = 2
    bench.thread.end("job", Token(1, 1), Outcome.SUCCEEDED)
    assert bench.thread.stop(10.0)
    assert bench.ledger.verdicts == ["unknown"] * 3 + ["released"]


def test_end_of_an_attempt_that_the_row_does_not_have_is_refused(bench: Bench) -> None:
    bench.claims = [False]
    bench.thread.end("job", Token(1, 1), Outcome.SUCCEEDED)
    assert bench.thread.stop(10.0)
    assert (bench.ledger.verdicts, bench.recorded, bench.holdings.jobs()) == (["unknown"] * 2, [], [])
