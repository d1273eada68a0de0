"""The clock of a server is set: a time that was measured by it before is no measure any more."""

from __future__ import annotations

from sqlalchemy import Engine

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import rebuild, transition_log
from tests.fixtures.stores.books import MOST_LOSSES
from tests.fixtures.stores.cluster import Cluster
from tests.fixtures.stores.noted import noted
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until

HOUR_MS = 3_600_000
#: Milliseconds from the end of a lease until its worker is LOST.
GRACE_MS = 15_000


def test_duty_runner_is_elected_though_the_clock_was_set_back(cluster: Cluster) -> None:
    """The end of a lease is a time: it comes an hour later."""
    assert cluster.ledger.elect("a", 0, 0.9).fence == 1
    assert cluster.ledger.elect("b", 0, 0.9).fence == 0
    assert cluster.client.hincrby(keys.RUNNER, "until", HOUR_MS)
    assert cluster.ledger.elect("b", 0, 0.9).fence == 2
    assert cluster.ledger.elect("a", 1, 0.9).fence == 0


def test_submission_is_taken_at_the_second_try_after_a_clock_step(cluster: Cluster) -> None:
    """The deadline of a submit is a time by the clock offset that each connection measured when it was made."""
    cluster.ledger._clock_offset_ms -= HOUR_MS
    assert cluster.submit("first") is None
    assert cluster.state("first") is None
    assert cluster.submit("first") == "w"


def test_a_clock_that_is_set_forward_takes_no_job_from_a_worker_that_lives(cluster: Cluster) -> None:
    """All leases run out at once, long ago, and each worker renews its own within the renew interval."""
    cluster.run("job")
    set_forward(cluster, HOUR_MS)
    assert looked_at(cluster) == "closed"
    assert looked_at(cluster) == "waits"
    assert cluster.lapse(grace_ms=GRACE_MS) == "waits"
    assert cluster.renew("job")
    assert cluster.book()["status"] == "ready"
    assert cluster.end("job", Token(1, 1)).verdict == "released"


def test_silent_worker_is_lost_a_grace_after_somebody_saw_it(cluster: Cluster) -> None:
    cluster.run("job")
    set_forward(cluster, HOUR_MS)
    assert looked_at(cluster) == "closed"
    cluster.client.hincrby(keys.book("w"), "lapsed", -GRACE_MS)
    assert looked_at(cluster) == "due"
    assert cluster.state("job") == "running"
    assert cluster.lapse(grace_ms=GRACE_MS) == "gone"
    assert cluster.state("job") == "waiting"


def test_a_worker_that_renewed_has_the_whole_grace_again(cluster: Cluster) -> None:
    set_forward(cluster, HOUR_MS)
    looked_at(cluster)
    cluster.client.hincrby(keys.book("w"), "lapsed", -GRACE_MS)
    assert cluster.renew()
    set_forward(cluster, HOUR_MS)
    assert looked_at(cluster) == "closed"
    cluster.register()
    set_forward(cluster, HOUR_MS)
    assert looked_at(cluster) == "closed"


def set_forward(cluster: Cluster, by_ms: int) -> None:
    """Change the lease of `w` as a server clock that is set forward would."""
    end = int(cluster.book()["lease"]) - by_ms - HOUR_MS
    cluster.client.hset(keys.book("w"), "lease", end)
    cluster.client.zadd(keys.LEASES, {"w": end})


def looked_at(cluster: Cluster) -> str:
    """Return the verdict of the duty, before it takes anything back."""
    return cluster.ledger.lapse("w", GRACE_MS, MOST_LOSSES, most=0).verdict


def test_cold_ledger_is_opened_though_the_clock_of_postgres_was_set_back(engine: Engine, settings: Settings) -> None:
    """Nobody decides for a while after a change, but nobody waits for an hour that is still to come."""
    stage = Stage(engine, settings)
    stage.sql("UPDATE authority SET changed_at = now() + interval '1 hour'")
    stage.redis.flushdb()
    assert rebuild.open_if_cold(stage.engine, stage.ledger) is None
    assert until(lambda: rebuild.open_if_cold(stage.engine, stage.ledger), "it is opened") is not None
    stage.close()


# The ledger's clock is set back.


def test_a_lease_of_before_ends_within_the_ttl_from_now(cluster: Cluster) -> None:
    cluster.run("job")
    ttl_ms, far = cluster.ledger.ttl_ms, cluster.ledger.measure() + 5 * HOUR_MS
    cluster.client.hset(keys.book("w"), "lease", far)
    cluster.client.zadd(keys.LEASES, {"w": far})
    assert cluster.ledger.lapsed_workers() == ["w"]
    assert looked_at(cluster) == "alive"
    end = int(cluster.book()["lease"])
    assert end <= cluster.ledger.measure() + ttl_ms
    assert cluster.client.zscore(keys.LEASES, "w") == end
    assert cluster.ledger.lapsed_workers() == []
    assert cluster.renew("job")


def test_entries_of_before_are_read_at_once(cluster: Cluster) -> None:
    """Names of entries never go back: until the clock has caught up they tell no age."""
    far = cluster.ledger.measure() + HOUR_MS
    cluster.client.xadd(keys.STREAM, {"job": "ahead", "epoch": "1", "attempt": "1"}, id=f"{far}-0")
    cluster.submit("job")
    transitions = noted(cluster.ledger, transition_log._newest(cluster.ledger, 60_000))
    assert [transition.job for transition in transitions] == ["ahead", "job"]
    cluster.client.delete(keys.STREAM)
    cluster.submit("other")
    assert noted(cluster.ledger, transition_log._newest(cluster.ledger, 60_000)) == []
