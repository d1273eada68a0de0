"""A process that opens an epoch changes nothing once another process has begun the next.

The other process takes the first one for dead. It does not matter at which step the first one was stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing import format_versions
from celery_capacity.routing.config import timeouts
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database import authority
from celery_capacity.routing.database.authority import hold_epoch, read_authority
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.request import Request, alternatives_term
from celery_capacity.routing.recovery import rebuild, revocation
from celery_capacity.routing.store import claims
from tests.fixtures.stores.books import job_field
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import PATIENCE

#: Waiting jobs of the old books: several steps of a wipe and of a backlog.
JOBS: Final = 12


@pytest.fixture
def stage(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(rebuild, "WIPE_CHUNK", 5)
    monkeypatch.setattr(rebuild, "BACKLOG_CHUNK", 5)
    # No worker of these tests speaks.
    monkeypatch.setattr(timeouts, "REPORT", 0.0)
    stage.worker("a", cpus=2000)
    running = stage.submit(cpus=2000)
    stage.start(running)
    stage.worker("gone", cpus=2000)
    left = stage.submit(cpus=2000)
    stage.start(left)
    for _ in range(JOBS):
        stage.submit(cpus=9000)
    stage.sql("UPDATE workers SET status = 'lost' WHERE name = :name", name=stage.row(left).worker)
    return stage


class Stopping(Ledger):
    """The ledger of an opener that stops at the Nth call of a script, and goes on when it is told to."""

    def __init__(self, settings: Settings, script: str, nth: int = 1) -> None:
        super().__init__(settings)
        self._at, self._nth = script, nth
        self.stopped, self.go_on = threading.Event(), threading.Event()

    def _calls(self, calls: Sequence[tuple[str, Sequence[Any]]]) -> list[list[str]]:
        if calls[0][0] == self._at:
            self._nth -= 1
            if self._nth == 0:
                self.stop()
        return super()._calls(calls)

    def stop(self) -> None:
        self.stopped.set()
        assert self.go_on.wait(PATIENCE)


def pass_for_dead(stage: Stage) -> None:
    """Let the opener say nothing for longer than its term."""
    stage.sql("UPDATE authority SET opening_at = opening_at - interval '1 hour' WHERE opening_at IS NOT NULL")


def contents(stage: Stage) -> dict[bytes, object]:
    """Return all that Redis has, except counters and keys that expire by themselves."""
    client: Any = stage.redis
    lasting = {key for key in client.scan_iter() if client.pttl(key) < 0 and key != keys.COUNTERS.encode()}
    return {key: client.dump(key) for key in sorted(lasting)}


def rows(stage: Stage) -> list[Any]:
    with stage.engine.connect() as connection:
        return list(connection.execute(text("SELECT id, state, epoch, attempt, step, losses FROM jobs ORDER BY seq")))


def check_overtaken(stage: Stage, opener: Stopping) -> None:
    """Have another process open the next epoch beside a stopped opener, which then goes on and changes nothing."""
    other = Ledger(stage.settings)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(rebuild.open_if_cold, stage.engine, opener)
        try:
            assert opener.stopped.wait(PATIENCE), "it did not come to this step"
            assert rebuild.open_if_cold(stage.engine, other) is None, "as long as it says that it goes on"
            pass_for_dead(stage)
            opened = rebuild.open_if_cold(stage.engine, other)
            assert opened is not None and opened.epoch == 3
            stage.ledger.epoch = opened.epoch
            stage.apply()
            before = contents(stage), rows(stage)
        finally:
            opener.go_on.set()
        assert first.result(PATIENCE) is None
    assert (contents(stage), rows(stage)) == before
    assert stage.ledger.opened() == (3, stage.ledger.run_id)
    assert not stage.ledger.is_unfinished()
    assert rebuild.open_if_cold(stage.engine, other) is None, "nothing is left to do"
    other.client.close()
    opener.client.close()


@pytest.mark.parametrize(
    ("script", "nth"),
    [
        ("close_epoch", 1),
        ("close_epoch", 2),
        ("close_epoch", 4),
        ("open_epoch", 1),
        ("reserve_book", 1),
        ("adopt", 1),
        ("submit_many", 1),
        ("submit_many", 2),
        ("finish_epoch", 1),
    ],
)
def test_overtaken_opener_changes_no_book_from_any_step(stage: Stage, script: str, nth: int) -> None:
    stage.redis.hset(keys.EPOCH, "run_id", "another life")
    check_overtaken(stage, Stopping(stage.settings, script, nth))


def test_overtaken_opener_changes_no_row(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The opener had read what a lost worker holds; meanwhile that worker lives after all."""
    opener = Stopping(stage.settings, "")
    real: Callable[..., Any] = hold_epoch

    def hold(*args: Any) -> bool:
        if not opener.stopped.is_set():
            opener.stop()
        held: bool = real(*args)
        return held

    monkeypatch.setattr(rebuild, "hold_epoch", hold)
    stage.redis.hset(keys.EPOCH, "run_id", "another life")
    check_overtaken(stage, opener)


def test_stopped_opener_does_not_keep_the_next_epoch_out(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends a transaction in which nothing is said for the opener's term."""
    opener = Stopping(stage.settings, "")
    real: Callable[..., Any] = claims.give_back

    def give_back(*args: Any) -> Any:
        if not opener.stopped.is_set():
            opener.stop()
        return real(*args)

    monkeypatch.setattr(authority, "OPENING_INTERVALS", 0.05)
    monkeypatch.setattr(claims, "give_back", give_back)
    stage.redis.hset(keys.EPOCH, "run_id", "another life")
    other = Ledger(stage.settings)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(rebuild.open_if_cold, stage.engine, opener)
        try:
            assert opener.stopped.wait(PATIENCE)
            # The statement waits for the row until the server has ended that transaction.
            stage.sql("UPDATE authority SET opening_at = opening_at - interval '1 hour'")
            opened = rebuild.open_if_cold(stage.engine, other)
            assert opened is not None and opened.epoch == 3
        finally:
            opener.go_on.set()
        with pytest.raises(DBAPIError, match=r"idle-in-transaction|terminat|closed"):
            first.result(PATIENCE)
    other.client.close()
    opener.client.close()


def test_two_openers_at_once_open_one_epoch(stage: Stage) -> None:
    stage.redis.flushdb()
    ledgers = [Ledger(stage.settings) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        opened = [
            opening
            for opening in threads.map(lambda ledger: rebuild.open_if_cold(stage.engine, ledger), ledgers)
            if opening
        ]
    assert [opening.epoch for opening in opened] == [2]
    with stage.engine.connect() as connection:
        assert read_authority(connection).epoch == 2


def test_opener_whose_last_word_lies_in_the_future_is_overtaken(stage: Stage) -> None:
    """Postgres's clock was set back by an hour since."""
    stage.redis.flushdb()
    stage.sql("UPDATE authority SET opening_at = clock_timestamp() + interval '1 hour'")
    opened = rebuild.open_if_cold(stage.engine, stage.ledger)
    assert opened is not None and opened.epoch == 2


def test_opener_says_that_it_goes_on_while_it_tells_of_revoked_jobs(stage: Stage) -> None:
    stage.sql("UPDATE jobs SET revoked_at = now() WHERE state = 'waiting'")
    beats: list[int] = []
    with stage.engine.connect() as connection:
        revocation.tell_all(connection, stage.ledger, lambda: beats.append(1))
    assert len(beats) >= JOBS


def test_opener_replaces_books_of_an_older_format_and_applies_their_stream(stage: Stage) -> None:
    job = stage.submit(cpus=9000, applied=False)
    entry = job_field(stage.redis, job, "entry")
    # In format 1 a job was a hash.
    stage.redis.delete(keys.job(job))
    stage.redis.hset(keys.job(job), mapping={"state": "waiting", "epoch": 2, "attempt": 0, "entry": str(entry)})
    stage.redis.hset(keys.EPOCH, "format", 1)
    ledger = Ledger(stage.settings)
    ledger.epoch = stage.ledger.epoch
    with pytest.raises(LedgerClosed):
        ledger.revoke(job)
    opened = rebuild.open_if_cold(stage.engine, ledger)
    assert opened is not None
    stage.ledger.epoch = opened.epoch
    stage.apply()
    assert (stage.row(job).state, job_field(stage.redis, job, "state")) == ("waiting", b"waiting")
    assert stage.redis.hget(keys.EPOCH, "format") == str(format_versions.LEDGER).encode()
    assert stage.redis.xlen(keys.STREAM) == 0
    ledger.client.close()


def test_new_books_have_the_alternative_that_a_job_holds(stage: Stage) -> None:
    gpu, wide = Request.of({"cpus": 1000, "gpus": 1}), Request.of({"cpus": 3000})
    term = alternatives_term([gpu, wide])
    stage.worker("b", cpus=3000)
    held, waits = (stage.submit(place=term, cpus=1000, gpus=1) for _ in range(2))
    stage.start(held)
    stage.redis.flushdb()
    opened = rebuild.open_if_cold(stage.engine, stage.ledger)
    assert opened is not None
    stage.ledger.epoch = opened.epoch
    shapes = [job_field(stage.redis, job, "shape") for job in (held, waits)]
    assert shapes == [f"{wide.shape},task,|2{term[1:]}".encode(), f"{gpu.shape},task{term}".encode()]
    book = snapshot.read_books(stage.redis, ["b"])["b"]
    assert {name: amount for name, amount in book.allocated.items() if amount} == dict(wide.amounts)
    stage.worker("b", cpus=3000)
    stage.end(held)
    assert stage.row(held).state == "succeeded"
    # The room there goes to the job of the lost worker, which comes first.
    stage.worker("c", cpus=3000)
    stage.apply()
    row = stage.row(waits)
    assert (row.state, row.shape) == ("admitted", f"{wide.shape},|2{term[1:]}")
