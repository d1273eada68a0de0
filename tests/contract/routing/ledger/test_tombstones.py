"""An ended job is known as ended until Postgres has the end, and for a time after that."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import pytest
from sqlalchemy import text

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Arrived
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import State
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import reconcile, resubmit, transition_log
from celery_capacity.routing.store import backlog
from celery_capacity.workers.duties import due, sweep
from tests.fixtures.stores.books import MOST_LOSSES, open_ledger
from tests.fixtures.stores.cluster import Cluster
from tests.fixtures.stores.noted import noted
from tests.fixtures.stores.staged import Stage


def end_as(outcome: str) -> Callable[[Cluster], None]:
    def end(cluster: Cluster) -> None:
        cluster.run("job")
        assert cluster.end("job", Token(1, 1), outcome).verdict == "released"

    return end


def lose_for_good(cluster: Cluster) -> None:
    cluster.submit("job", losses=MOST_LOSSES - 1)
    cluster.claim("job", Token(1, 1))
    assert cluster.end("job", Token(1, 1), "lost").state == "lost"


def lapse_for_good(cluster: Cluster) -> None:
    cluster.submit("job", losses=MOST_LOSSES - 1)
    cluster.claim("job", Token(1, 1))
    cluster.expire()
    assert cluster.lapse() == "gone"


def hand_back_with_a_successor(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.ledger.note_successor("job", b"its successor")
    assert cluster.end("job", Token(1, 1), "handed_back").state == "scheduled"


def hand_back_a_revoked_one(cluster: Cluster) -> None:
    cluster.run("job")
    assert cluster.ledger.revoke("job")
    assert cluster.end("job", Token(1, 1), "handed_back").state == "cancelled"


def drain_a_revoked_one(cluster: Cluster) -> None:
    cluster.submit("job")
    assert cluster.ledger.revoke("job")
    cluster.ledger.drain("w", "w-life")


def cancel_what_waits(cluster: Cluster) -> None:
    assert cluster.submit("job", Request.of({"cpus": 99_000}).shape) is None
    assert cluster.ledger.cancel("job", State.CANCELLED).verdict == "ended"


def cancel_what_was_retried(cluster: Cluster) -> None:
    end_as("retried")(cluster)
    assert cluster.ledger.cancel("job", State.CANCELLED).verdict == "missing"


#: Every way in which a job ends in the ledger.
ENDS: Final = {
    **{outcome: end_as(outcome) for outcome in ("succeeded", "failed", "cancelled", "expired", "replaced", "retried")},
    "lost": lose_for_good,
    "lapsed": lapse_for_good,
    "handed back with a successor": hand_back_with_a_successor,
    "handed back and revoked": hand_back_a_revoked_one,
    "drained and revoked": drain_a_revoked_one,
    "cancelled while it waits": cancel_what_waits,
    "cancelled after a retry": cancel_what_was_retried,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_tombstone_stays_until_postgres_has_the_end(cluster: Cluster, end: Callable[[Cluster], None]) -> None:
    end(cluster)
    assert cluster.state("job") == "ended"
    assert cluster.client.pttl(keys.job("job")) == -1
    # Rows that were read before, or that somebody changed meanwhile.
    for attempt in (0, 1):
        assert cluster.submit("job", attempt=attempt) is None
    assert (cluster.state("job"), cluster.client.hlen(keys.held("w"))) == ("ended", 0)
    cluster.written()
    left = cluster.client.pttl(keys.job("job"))
    assert 0 < left <= 1000 * cluster.ledger.settings.tombstone
    assert cluster.submit("job") is None


def test_tombstone_of_a_job_that_postgres_alone_ended_expires(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.written()
    assert cluster.ledger.cancel("other", State.CANCELLED).verdict == "missing"
    assert cluster.ledger.remove_job("job", Token(1, 1), final=True)
    assert all(cluster.client.pttl(keys.job(job)) > 0 for job in ("job", "other"))


def test_release_sent_again_names_the_entry_to_forget(cluster: Cluster) -> None:
    cluster.run("job")
    first = cluster.end("job", Token(1, 1))
    again = cluster.end("job", Token(1, 1))
    assert (again.verdict, again.entry) == ("repeat", first.entry)
    cluster.written()
    assert cluster.end("job", Token(1, 1)).entry == ""


def test_submit_is_refused_after_half_a_tombstone(redis_url: str) -> None:
    with open_ledger(redis_url) as ledger:
        assert ledger.submit_limit_ms == 500 * ledger.settings.tombstone


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    return stage


def end_unwritten(stage: Stage) -> str:
    """Run a job to its end; Postgres has heard nothing of it."""
    job = stage.submit(cpus=1000, applied=False)
    cluster = Cluster(stage.ledger)
    epoch = stage.ledger.epoch
    arrived = stage.ledger.settle("a", "a-life", arrived=[Arrived(job, Token(epoch, 1), "n")], most_losses=MOST_LOSSES)
    assert arrived.claimed[0].ok
    assert cluster.end(job, Token(epoch, 1), worker="a").state == "succeeded"
    assert stage.row(job).state == "accepted"
    return job


def test_no_repair_brings_in_a_job_whose_end_is_not_written(stage: Stage) -> None:
    job = end_unwritten(stage)
    with stage.engine.connect() as connection:
        rows = backlog.stranded(connection, 0.0, 10)
    assert [row.id for row in rows] == [job]
    assert resubmit.submit_rows(stage.ledger, rows) == 0
    # Another writer may have taken the attempt back in Postgres: the end is still on its way.
    with stage.engine.connect() as connection:
        taken_back = text("UPDATE jobs SET epoch = :epoch, attempt = 1, step = 10")
        connection.execute(taken_back, {"epoch": stage.ledger.epoch})
        assert resubmit.submit_rows(stage.ledger, backlog.these(connection, [job])) == 0
    assert len(noted(stage.ledger)) == 1


@pytest.mark.leaves("I1", "I6", because="the key of an admitted job was lost")
@pytest.mark.parametrize("state", ["accepted", "scheduled"])
def test_duties_write_what_started_before_they_bring_in(stage: Stage, state: str) -> None:
    """The key of a running job was lost, and its row does not say yet that it started."""
    app: Any = SimpleNamespace()
    stores: Any = SimpleNamespace(engine=stage.engine, ledger=stage.ledger, settings=stage.settings)
    job = stage.submit(cpus=1000, applied=False)
    stage.redis.delete(keys.job(job))
    stage.sql("UPDATE jobs SET submitted_at = submitted_at - interval '1 hour'")
    if state == "accepted":
        assert sweep._stranded(app, stores) == 0
    else:
        stage.sql("UPDATE jobs SET state = 'scheduled', due_at = now()")
        assert due._due(app, stores, set()) == 0
    assert (stage.row(job).state, stage.redis.exists(keys.job(job))) == ("admitted", 0)


def test_reconcile_gives_a_tombstone_its_time_where_the_stream_was_lost(stage: Stage) -> None:
    job = end_unwritten(stage)
    stage.redis.delete(keys.STREAM)
    reconcile.reconcile(stage.engine, stage.ledger)
    assert stage.row(job).state == "succeeded"
    assert stage.redis.pttl(keys.job(job)) > 0


def test_reconcile_leaves_a_job_whose_end_is_not_written(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    job = end_unwritten(stage)
    # Its row is locked, for example, and the job is left for later.
    monkeypatch.setattr(transition_log, "apply_all", lambda *_, **__: (0, []))
    assert reconcile.reconcile(stage.engine, stage.ledger).drift == 0
    assert (stage.row(job).state, stage.redis.pttl(keys.job(job))) == ("accepted", -1)
