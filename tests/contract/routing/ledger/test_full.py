"""A Redis that has reached its `maxmemory`: no job comes in, and every job that is there goes on to its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Adopted, Ended, Filled, LedgerFull
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import transition_log
from tests.fixtures.processes.installed import old_redis
from tests.fixtures.servers.redises import redis_server
from tests.fixtures.stores.books import MOST_LOSSES, VIEW, open_ledger
from tests.fixtures.stores.cluster import CAPACITY, ONE, Cluster
from tests.fixtures.stores.noted import noted

WHOLE = Request.of({"cpus": 4000}).shape


@pytest.fixture(params=["embedded", pytest.param("Redis 6.2", marks=pytest.mark.installed)])
def own_redis_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a server that may be full."""
    if request.param == "embedded":
        yield request.getfixturevalue("redis_url")
        return
    with redis_server(tmp_path, program=old_redis()) as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture
def ledger(own_redis_url: str) -> Iterator[Ledger]:
    with open_ledger(own_redis_url) as ledger:
        yield ledger
        ledger.client.config_set("maxmemory", 0)


def fill_up(ledger: Ledger) -> None:
    """Have the server refuse commands that may take up memory, from here on."""
    ledger.client.config_set("maxmemory", 1)


def test_a_full_ledger_refuses_a_submit_and_changes_nothing(cluster: Cluster) -> None:
    fill_up(cluster.ledger)
    with pytest.raises(LedgerFull):
        cluster.submit("job")
    assert (cluster.state("job"), cluster.book()["a.cpus"]) == (None, "0")


def test_waiting_job_of_a_full_ledger_runs_and_ends(cluster: Cluster) -> None:
    cluster.run("whole", WHOLE)
    assert cluster.submit("next", WHOLE) is None
    assert cluster.submit("last", WHOLE) is None
    fill_up(cluster.ledger)
    assert cluster.renew("whole")
    assert cluster.end("whole", Token(1, 1)).state == "succeeded"
    assert cluster.claim("next", Token(1, 1)).ok
    # It goes back, and is admitted again.
    assert cluster.end("next", Token(1, 1), "handed_back").state == "waiting"
    assert cluster.claim("next", Token(1, 2)).ok
    handed_over = cluster.ledger.settle(
        "w", "w-life", ended=[Ended("next", Token(1, 2), Outcome.FAILED)], most_losses=MOST_LOSSES, nonce="n"
    ).handed_over
    assert [handed.job for handed in handed_over] == ["last"]
    assert [handed.job for handed in cluster.ledger.hand_over_again("w", "w-life", [])] == ["last"]
    assert cluster.end("last", Token(1, 1)).verdict == "released"
    assert cluster.ledger.ack_transitions(transition_log.written(noted(cluster.ledger))) > 0
    assert cluster.client.xlen(keys.STREAM) == 0
    assert (cluster.book()["a.cpus"], cluster.client.get(keys.ALLOCATED)) == ("0", b"0")


def test_a_full_ledger_takes_back_delivers_again_and_looks_on(cluster: Cluster) -> None:
    cluster.submit("job")
    cluster.client.zadd(keys.UNCLAIMED, {"job": 1}, xx=True)
    fill_up(cluster.ledger)
    assert cluster.ledger.redeliver() == 1
    assert cluster.claim("job", Token(1, 1)).ok
    cluster.ledger.expire_lease("w", "w-life")
    assert cluster.lapse() == "gone"
    assert cluster.state("job") == "waiting"
    # The first worker was lost with its book, and another one comes.
    cluster.register("other")
    assert cluster.claim("job", Token(1, 2), "other").ok
    assert cluster.ledger.drain("other", "other-life") == 0
    assert cluster.end("job", Token(1, 2), worker="other").state == "succeeded"
    assert cluster.ledger.leave("other", "other-life") == 0


def test_a_full_ledger_is_opened_anew(cluster: Cluster) -> None:
    fill_up(cluster.ledger)
    cluster.client.flushdb()
    cluster.ledger.open_epoch(2)
    assert cluster.ledger.reserve_book("w", "w-life", CAPACITY)
    assert cluster.ledger.adopt("w", "w-life", [Adopted("job", Token(1, 1), ONE, 1, 5, 6, "n", 0)]) == []
    cluster.ledger.finish_epoch(2)
    assert cluster.register().admitted == 0
    assert cluster.end("job", Token(1, 1)).state == "succeeded"


def test_worker_publishes_its_tasks_to_a_full_ledger(ledger: Ledger) -> None:
    fill_up(ledger)
    registered = ledger.register("new", "life", "queue.new", CAPACITY, VIEW, tasks=["tasks.render"])
    assert registered == Filled(0)
    (catalogue,) = ledger.client.scan_iter(keys.tasks("*"))
    assert ledger.client.smembers(catalogue) == {b"", b"tasks.render"}


def test_the_runner_is_elected_by_a_full_ledger_too(ledger: Ledger) -> None:
    fill_up(ledger)
    assert ledger.elect("one", 0, 60.0).fence == 1
    assert ledger.elect("other", 0, 60.0, ["suspicion"]).fence == 0
    assert ledger.elect("one", 1, 60.0).asked == ("suspicion",)
