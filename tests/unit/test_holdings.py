"""The worker's own count."""

from __future__ import annotations

from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request
from celery_capacity.workers.process.holdings import Holding, Holdings

ONE = Request.of({"cpus": 1000})
TWO = Request.of({"cpus": 2000})


def holding(job: str, request: Request = ONE, token: str = "1.1") -> Holding:
    return Holding(job, token, request, "nonce")


def holdings(cpus: int, slots: int = 9) -> Holdings:
    return Holdings({"cpus": cpus, "slots": slots})


def test_jobs_are_taken_in_their_order_while_they_fit_beside_what_runs() -> None:
    own = holdings(3000)
    own.add(holding("running"))
    assert own.admits({"a": ONE, "b": TWO, "c": ONE}) == {"a", "c"}


def test_a_body_that_is_over_makes_room_before_its_release_is_answered() -> None:
    own = holdings(1000)
    own.add(holding("over"))
    assert own.admits({"next": ONE}) == set()
    assert own.end("over", "1.1")
    assert own.admits({"next": ONE}) == {"next"}
    assert own.jobs() == ["over"], "the heartbeat names it until the release was answered"
    assert [one.job for one in own.running()] == []


def test_only_the_first_end_of_an_attempt_counts() -> None:
    own = holdings(1000)
    own.add(holding("job"))
    assert own.end("job", "1.1")
    assert not own.end("job", "1.1")
    assert not own.end("job", "1.2")
    assert not own.end("stranger", "1.1")


def test_an_attempt_that_lost_its_lease_still_counts_beside_a_newer_one_of_the_same_job() -> None:
    own = holdings(2000)
    own.add(holding("job"))
    own.add(holding("job", token="2.2"))
    assert own.admits({"next": ONE}) == set()
    assert own.jobs() == ["job"]
    assert own.end("job", "2.2")
    removed = own.remove("job", "2.2")
    assert removed is not None
    assert removed.token == "2.2"
    assert [one.token for one in own.running()] == ["1.1"]


def test_a_capacity_that_shrank_below_what_runs_admits_nothing() -> None:
    own = holdings(4000)
    own.add(holding("job", TWO))
    own.capacity = {"cpus": 1000, "slots": 9}
    assert own.admits({"free": Request.of({"cpus": 0})}) == set()


def test_lost_lease_of_one_attempt_costs_no_other_of_its_job() -> None:
    own = holdings(3000)
    own.capacity = {"cpus": 3000}
    for token in ("1.1", "1.2"):
        own.add(holding("job", token=token))
    own.disown({("job", "1.1"), ("job", "9.9")})
    assert own.left_of(Capacity.of({"cpus": 3000})).get("cpus") == 2000
