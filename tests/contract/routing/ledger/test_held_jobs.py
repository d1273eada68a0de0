"""A worker that holds more jobs than a single script looks at: each pass through its list comes to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pytest

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Arrived, Ended
from celery_capacity.routing.ledger.scripts import HELD
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import order
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW
from tests.fixtures.stores.cluster import Cluster

JOBS: Final = HELD + 150
CAPACITY: Final = Request.of({"cpus": 1000 * JOBS, "slots": JOBS}).shape
ONE: Final = Request.of({"cpus": 1000}).shape


@pytest.fixture
def cluster(ledger: Ledger) -> Cluster:
    """Return a cluster with a worker that is full, with each other job running."""
    cluster = Cluster(ledger)
    cluster.register(capacity=CAPACITY)
    jobs = [f"job-{number}" for number in range(JOBS)]
    for start in range(0, JOBS, 100):
        some = jobs[start : start + 100]
        ledger.submit_many([(job, ONE, order(0, int(job[4:])), MESSAGE, 0, 0, 0) for job in some])
    for start in range(0, JOBS, 200):
        arrived = [Arrived(job, Token(1, 1), "n") for job in jobs[start : start + 200 : 2]]
        ledger.settle("w", "w-life", arrived=arrived, most_losses=MOST_LOSSES)
    assert cluster.client.hlen(keys.held("w")) == JOBS
    return cluster


class Died(Exception):
    """A process ended here."""


def dying(shapes: Sequence[str]) -> None:
    if shapes:
        raise Died


def cpus(cluster: Cluster) -> int:
    return int(cluster.book()["a.cpus"])


@pytest.mark.leaves("I6", because="the sum of all books is not repaired here")
def test_recount_is_the_sum_of_all_and_drops_strangers(cluster: Cluster) -> None:
    cluster.client.hset(keys.held("w"), mapping={f"stranger-{number}": "1.1" for number in range(300)})
    cluster.client.hincrby(keys.book("w"), "a.cpus", -7000)
    assert cluster.ledger.recount(["w"]) == [301]
    assert (cpus(cluster), cluster.client.hlen(keys.held("w"))) == (1000 * JOBS, JOBS)
    assert cluster.ledger.recount(["w"]) == [0]


@pytest.mark.leaves("I6", because="the sum of all books is not repaired here")
def test_recount_writes_nothing_that_changed_meanwhile(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job ends while the list is counted, and another one while it is counted again."""
    running = iter(["job-0", "job-2"])
    count = cluster.ledger._held_sum

    def disturbed(worker: str) -> str:
        counted = count(worker)
        if (job := next(running, None)) is not None:
            ended = [Ended(job, Token(1, 1), Outcome.SUCCEEDED)]
            cluster.ledger.settle("w", "w-life", ended=ended, most_losses=MOST_LOSSES)
        return counted

    monkeypatch.setattr(cluster.ledger, "_held_sum", disturbed)
    cluster.client.hincrby(keys.book("w"), "a.cpus", 7000)
    assert cluster.ledger.recount(["w"]) == [1]
    assert cpus(cluster) == 1000 * (JOBS - 2)


def test_book_that_went_missing_is_made_of_all(cluster: Cluster) -> None:
    cluster.client.delete(keys.book("w"))
    cluster.register(capacity=CAPACITY)
    assert cpus(cluster) == 1000 * JOBS


def test_reserved_book_is_made_of_all(cluster: Cluster) -> None:
    cluster.client.delete(keys.book("w"))
    assert cluster.ledger.reserve_book("w", "w-life", CAPACITY)
    assert cpus(cluster) == 1000 * JOBS


def test_drain_hands_all_back_that_have_not_started(cluster: Cluster) -> None:
    assert cluster.ledger.drain("w", "w-life") == JOBS // 2
    assert cpus(cluster) == 1000 * JOBS // 2
    assert cluster.client.zcard(keys.wait(ONE)) == JOBS // 2


def test_lapse_takes_all_back_and_goes_on_where_it_stopped(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.expire()
    cluster.client.hset(keys.book("w"), "lapsed", 0)
    with monkeypatch.context() as patched:
        # The process that takes them back dies behind the first page.
        patched.setattr(cluster.ledger, "held_pages", lambda worker, page: iter([["job-0", "job-1"]]))
        patched.setattr(cluster.ledger, "place_shapes", dying)
        with pytest.raises(Died):
            cluster.ledger.lapse("w", 0, MOST_LOSSES)
    lapsed = cluster.ledger.lapse("w", 0, MOST_LOSSES)
    assert (lapsed.verdict, lapsed.taken_back) == ("gone", JOBS - 2)
    assert cluster.client.zcard(keys.wait(ONE)) == JOBS
    assert not cluster.client.exists(keys.book("w"), keys.held("w"), keys.missing("w"))
    assert int(cluster.client.get(keys.ALLOCATED)) == 0


def test_recover_gives_all_that_the_worker_does_not_know(cluster: Cluster) -> None:
    recovered = cluster.ledger.hand_over_again("w", "w-life", ["job-0"])
    assert {handed.job for handed in recovered} == {f"job-{number}" for number in range(2, JOBS, 2)}


def test_heartbeat_takes_all_back_that_its_list_lacks(cluster: Cluster) -> None:
    renewed = cluster.ledger.renew("w", "w-life", VIEW, ["job-0"], MOST_LOSSES, admit=False, missing_ms=0)
    assert renewed.taken_back == (JOBS + 1) // 2 - 1
    assert cluster.client.hlen(keys.held("w")) == JOBS // 2 + 1


def test_heartbeat_that_names_a_job_again_forgets_that_it_was_missing(cluster: Cluster) -> None:
    running = [f"job-{number}" for number in range(0, JOBS, 2)]
    cluster.renew(*running[1:])
    assert cluster.client.hlen(keys.missing("w")) == 1
    cluster.renew(*running)
    assert not cluster.client.exists(keys.missing("w"))
