"""The right to speak for a job: leases that were lost, doubled calls, successors, and lists that lack a job."""

from __future__ import annotations

from typing import Any

import pytest

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Adopted, Arrived, Ended, LedgerClosed
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES
from tests.fixtures.stores.cluster import CAPACITY, ONE, Cluster

# An attempt that lost its lease.


def test_an_attempt_that_was_taken_back_cannot_end_the_next_one(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.expire()
    assert cluster.lapse() == "gone"
    cluster.register()
    assert cluster.client.hget(keys.held("w"), "job") == b"1.2"
    assert cluster.end("job", Token(1, 1)).verdict == "stale"
    assert not cluster.claim("job", Token(1, 1)).ok
    assert cluster.claim("job", Token(1, 2)).ok


def test_end_of_a_job_without_a_key_is_told_from_a_stale_one(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.client.delete(keys.job("job"))
    assert cluster.end("job", Token(1, 1)).verdict == "unknown"
    assert cluster.ledger.adopt("w", "w-life", [Adopted("job", Token(1, 1), ONE, 1, 5, 6, "n", 0)]) == []
    assert cluster.end("job", Token(1, 1)).verdict == "released"
    assert (cluster.book()["a.cpus"], cluster.client.get(keys.ALLOCATED)) == ("0", b"0")


def test_a_former_life_cannot_claim_or_end_anything(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.submit("next")
    former = [Ended("job", Token(1, 1), Outcome.SUCCEEDED)]
    settled = cluster.ledger.settle(
        "w", "former-life", ended=former, arrived=[Arrived("next", Token(1, 1), "n")], most_losses=MOST_LOSSES
    )
    assert (settled.released[0].verdict, settled.claimed[0].ok) == ("stale", False)


def test_an_attempt_that_went_back_cannot_be_adopted_again(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.end("job", Token(1, 1), "handed_back", admit=False)
    assert cluster.state("job") == "waiting"
    again = Adopted("job", Token(1, 1), ONE, 1, 5, 6, "n", 0)
    assert cluster.ledger.adopt("w", "w-life", [again]) == [("job", Token(1, 1))]
    assert (cluster.state("job"), cluster.book()["a.cpus"]) == ("waiting", "0")


def test_worker_recovers_jobs_of_a_lost_reply(cluster: Cluster) -> None:
    cluster.run("known")
    cluster.run("whole", Request.of({"cpus": 3000}).shape)
    cluster.submit("next", ONE)
    ended = [Ended("whole", Token(1, 1), Outcome.SUCCEEDED)]
    settled = cluster.ledger.settle("w", "w-life", ended=ended, most_losses=MOST_LOSSES, nonce="asked")
    assert [handed.job for handed in settled.handed_over] == ["next"]
    # The answer was lost.
    assert cluster.ledger.hand_over_again("w", "w-life", ["known"]) == settled.handed_over
    assert cluster.ledger.hand_over_again("w", "w-life", ["known", "next"]) == []
    assert cluster.ledger.hand_over_again("w", "former-life", []) == []


def test_worker_learns_when_its_jobs_were_submitted(cluster: Cluster) -> None:
    whole = Request.of({"cpus": 4000}).shape
    cluster.ledger.submit("first", whole, 1, MESSAGE, submitted_ms=1_000)
    cluster.ledger.submit("next", whole, 2, MESSAGE, submitted_ms=2_000)
    assert cluster.claim("first", Token(1, 1)).submitted_ms == 1_000
    ended = [Ended("first", Token(1, 1), Outcome.SUCCEEDED)]
    (handed,) = cluster.ledger.settle("w", "w-life", ended=ended, most_losses=MOST_LOSSES, nonce="n").handed_over
    assert (handed.job, handed.submitted_ms) == ("next", 2_000)


def test_claim_sent_again_is_granted_and_a_doubled_message_is_not(cluster: Cluster) -> None:
    cluster.submit("job")
    first = cluster.claim("job", Token(1, 1), nonce="a")
    again = cluster.claim("job", Token(1, 1), nonce="a")
    assert first.ok
    assert (again.ok, again.started_ms) == (True, first.started_ms)
    assert not cluster.claim("job", Token(1, 1), nonce="b").ok


# Successors.


def test_successor_is_not_noted_on_the_attempt_that_runs_it(cluster: Cluster) -> None:
    """The word of the successor came late: Postgres, and with it the ledger, had gone on.

    If it were noted, a loss of that attempt would look like a job that goes on. The job would then run again although
    it may not.
    """
    cluster.run("job")
    cluster.end("job", Token(1, 1), "retried")
    cluster.written()
    assert cluster.submit("job", attempt=1) == "w"
    cluster.claim("job", Token(1, 2))
    assert not cluster.ledger.note_successor("job", MESSAGE)
    assert cluster.end("job", Token(1, 2), "lost").state == "waiting"


def test_an_end_waits_for_a_book_that_went_missing(cluster: Cluster) -> None:
    """A refused end would be lost, and its job taken back from the worker that says nothing of it any more."""
    cluster.run("job")
    cluster.client.delete(keys.book("w"))
    with pytest.raises(LedgerClosed):
        cluster.end("job", Token(1, 1))
    assert cluster.client.hget(keys.COUNTERS, "stale.release") is None
    cluster.register()
    assert cluster.end("job", Token(1, 1)).verdict == "released"
    assert cluster.book()["a.cpus"] == "0"


@pytest.mark.leaves("I6", because="the sum of all books is not repaired here", sometimes=True)
@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("lost", [keys.job("job"), keys.held("w")])
def test_a_job_that_was_lost_with_the_book_is_counted_when_it_is_adopted(
    cluster: Cluster, lost: str, reserved: bool
) -> None:
    cluster.run("job")
    cluster.run("other")
    cluster.client.delete(keys.book("w"), lost)
    if reserved:
        assert cluster.ledger.reserve_book("w", "w-life", CAPACITY)
    cluster.register()
    held = [Adopted(job, Token(1, 1), ONE, 1, 5, 6, "n", 0) for job in ("job", "other")]
    assert cluster.ledger.adopt("w", "w-life", held) == []
    assert cluster.book()["a.cpus"] == "2000"
    assert [cluster.end(job, Token(1, 1)).verdict for job in ("job", "other")] == ["released"] * 2
    assert cluster.book()["a.cpus"] == "0"


# Lists of the jobs that a worker holds.


def test_running_job_is_taken_back_when_no_heartbeat_names_it(cluster: Cluster) -> None:
    interval = round(1000 * cluster.ledger.settings.renew_interval)
    cluster.run("job")
    for _ in range(5):
        assert cluster.renew()
    assert cluster.state("job") == "running"
    cluster.missed(interval)
    cluster.renew("job")
    cluster.renew()
    assert cluster.state("job") == "running", "it was named meanwhile"
    cluster.missed(interval)
    cluster.renew()
    assert cluster.noted("job")[0] == ("waiting", "lost")
    assert cluster.client.hget(keys.held("w"), "job") == b"1.2"


def test_no_job_is_judged_by_a_list_that_may_lack_one(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.renew()
    cluster.missed(round(1000 * cluster.ledger.settings.renew_interval))
    assert cluster.renew(missing_ms=-1)
    assert cluster.state("job") == "running"
    cluster.renew()
    assert cluster.noted("job")[0] == ("waiting", "lost")


def test_a_list_that_is_whole_takes_back_at_once(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.renew(missing_ms=0)
    assert cluster.noted("job")[0] == ("waiting", "lost")
    assert cluster.client.exists(keys.missing("w")) == 0


def test_a_clock_that_was_set_back_takes_nothing_back_sooner(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.renew()
    cluster.missed(-3_600_000)
    cluster.renew()
    assert cluster.state("job") == "running"
    cluster.missed(round(1000 * cluster.ledger.settings.renew_interval))
    cluster.renew()
    assert cluster.noted("job")[0] == ("waiting", "lost")


def test_an_attempt_that_a_list_lacked_says_nothing_of_the_next_attempt(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.renew()
    cluster.end("job", Token(1, 1), "retried")
    cluster.written()
    assert cluster.submit("job", attempt=1) == "w"
    # The list was made just before this claim.
    assert cluster.claim("job", Token(1, 2)).ok
    cluster.renew()
    assert cluster.state("job") == "running"
    assert cluster.book()["a.cpus"] == "1000"


def test_a_job_that_ended_leaves_nothing_in_the_list_of_missing_ones(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.renew()
    cluster.end("job", Token(1, 1))
    cluster.renew()
    assert cluster.client.exists(keys.missing("w")) == 0


# -- results that are kept in the ledger's own Redis


@pytest.mark.parametrize(
    ("outcome", "stored"),
    [
        *(("succeeded", True), ("failed", True), ("retried", True), ("requeued", True)),
        *(("handed_back", False), ("lost", False)),
    ],
)
def test_a_release_stores_the_result_of_what_is_over(cluster: Cluster, outcome: str, stored: bool) -> None:
    cluster.register()
    token = cluster.run("j")
    listener = cluster.client.pubsub()
    listener.subscribe("celery-task-meta-j")
    assert listener.get_message(timeout=60)["type"] == "subscribe"
    ended = Ended("j", token, Outcome(outcome), "", "", (("celery-task-meta-j", 60, b"text"),))
    for _ in range(2):
        cluster.ledger.settle("w", "w-life", ended=[ended], most_losses=MOST_LOSSES, admit=False)
    assert (cluster.client.get("celery-task-meta-j") == b"text") is stored
    if stored:
        assert 0 < cluster.client.ttl("celery-task-meta-j") <= 60
        assert [message["data"] for message in iter(lambda: listener.get_message(timeout=0.1), None)] == [b"text"]
    listener.close()


@pytest.mark.parametrize("seconds", [-5, 10**18, "soon"])
def test_result_that_redis_does_not_take_leaks_no_allocation(cluster: Cluster, seconds: Any) -> None:
    token = cluster.run("j")
    ended = Ended("j", token, Outcome.SUCCEEDED, "", "", (("celery-task-meta-j", seconds, b"text"),))
    verdicts = [
        cluster.ledger.settle("w", "w-life", ended=[ended], most_losses=MOST_LOSSES).released[0].verdict
        for _ in range(2)
    ]
    assert verdicts == ["released", "repeat"]
    assert (cluster.book()["a.cpus"], cluster.client.get(keys.ALLOCATED)) == ("0", b"0")
    assert cluster.client.hget(keys.COUNTERS, "refused.result") == b"1"


def test_a_stale_release_stores_nothing(cluster: Cluster) -> None:
    cluster.register()
    token = cluster.run("j")
    cluster.expire()
    assert cluster.lapse() == "gone"
    cluster.register()
    ended = Ended("j", token, Outcome.SUCCEEDED, "", '{"left": 1}', (("celery-task-meta-j", 0, "text"),))
    settled = cluster.ledger.settle("w", "w-life", ended=[ended], most_losses=MOST_LOSSES, admit=False)
    assert settled.released[0].verdict == "stale"
    assert cluster.client.get("celery-task-meta-j") is None
    assert all(b"outbox" not in fields for _, fields in cluster.client.xrange(keys.STREAM))


def test_an_outbox_stands_in_the_stream_with_the_end(cluster: Cluster) -> None:
    cluster.register()
    token = cluster.run("j")
    ended = Ended("j", token, Outcome.FAILED, "why", '{"left": 1}')
    cluster.ledger.settle("w", "w-life", ended=[ended], most_losses=MOST_LOSSES, admit=False)
    entries = [fields for _, fields in cluster.client.xrange(keys.STREAM) if fields[b"state"] == b"failed"]
    assert [fields[b"outbox"] for fields in entries] == [b'{"left": 1}']
