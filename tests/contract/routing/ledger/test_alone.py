"""The last attempt of a job runs alone: where it goes, which jobs wait for it, and when a worker is no longer kept."""

from __future__ import annotations

from typing import Final

import pytest

from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.replies import Adopted
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import State
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy import placement
from celery_capacity.routing.policy.feasibility import survey
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import Admission, Book, Refusal, Waiting, order
from celery_capacity.routing.policy.reservation import Reservation
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, job_field
from tests.fixtures.stores.cluster import CAPACITY, ONE, Cluster

#: Allocation of a job that asks for ONE and runs alone.
ALONE: Final = "alone=1,cpus=1000,memory=10,slots=1"
#: Losses after which one more ends a job.
LAST: Final = MOST_LOSSES - 1


def kept(cluster: Cluster, worker: str = "w") -> str:
    return cluster.book(worker).get("kept", "")


def test_job_runs_alone_after_the_loss_that_leaves_it_one_attempt(cluster: Cluster) -> None:
    cluster.run("beside")
    cluster.submit("job", losses=LAST - 1)
    assert cluster.claim("job", Token(1, 1)).losses == LAST - 1
    assert cluster.end("job", Token(1, 1), "lost").state == "waiting"
    assert job_field(cluster.client, "job", "shape") == ALONE.encode()
    # The job lost that attempt here: this worker is kept for it.
    assert kept(cluster) == ALONE
    assert cluster.submit("small") is None
    cluster.end("beside", Token(1, 1))
    assert (cluster.state("job"), cluster.state("small"), kept(cluster)) == ("admitted", "waiting", "")
    assert cluster.claim("job", Token(1, 2)).ok
    assert cluster.end("job", Token(1, 2), "lost").state == "lost"
    assert cluster.state("small") == "admitted"


def test_a_hand_back_and_a_new_epoch_leave_it_alone(cluster: Cluster) -> None:
    cluster.submit("job", losses=LAST)
    cluster.claim("job", Token(1, 1))
    assert cluster.end("job", Token(1, 1), "handed_back").state == "waiting"
    assert cluster.book()["a.alone"] == "1"
    cluster.client.flushdb()
    cluster.ledger.open_epoch(2)
    cluster.ledger.finish_epoch(2)
    cluster.register()
    # As a row of Postgres says it: with the request that the job asks for.
    assert cluster.ledger.adopt("w", "w-life", [Adopted("job", Token(1, 2), ONE, 1, 5, 6, "n", LAST)]) == []
    assert (cluster.book()["a.alone"], cluster.submit("next")) == ("1", None)


def test_of_two_workers_one_is_kept_and_the_first_that_is_empty_takes_it(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.register("x")
    assert cluster.submit("other", Request.of({"cpus": 4000}).shape) == "x"
    assert cluster.submit("last", losses=LAST) is None
    cluster.renew("one")
    assert (kept(cluster), kept(cluster, "x")) == (ALONE, "")
    cluster.renew("other", worker="x")
    assert kept(cluster, "x") == ""
    cluster.claim("other", Token(1, 1), "x")
    cluster.end("other", Token(1, 1), worker="x")
    assert job_field(cluster.client, "last", "worker") == b"x"
    # The worker that was kept takes others again.
    assert (kept(cluster), cluster.submit("next")) == ("", "w")


def test_a_worker_is_kept_no_more_for_a_job_that_is_revoked(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("last", losses=LAST)
    cluster.renew("one")
    cluster.submit("next")
    assert (kept(cluster), cluster.state("next")) == (ALONE, "waiting")
    assert cluster.ledger.cancel("last", State.CANCELLED).verdict == "ended"
    assert (kept(cluster), cluster.state("next")) == ("", "admitted")
    assert cluster.client.hlen(keys.KEYS["kept"]) == 0


@pytest.mark.parametrize("how", ["is revoked", "goes elsewhere"])
def test_worker_that_is_kept_no_more_is_filled_over_several_passes(cluster: Cluster, how: str) -> None:
    cluster.register(capacity=Request.of({"cpus": 10**6, "memory": 10**6, "slots": 1000}).shape)
    cluster.run("one")
    cluster.submit("last", losses=LAST)
    cluster.renew("one")
    assert kept(cluster) == ALONE
    # More jobs than a pass admits. They stand behind more shapes, allowed but too large, than a pass looks at.
    for n in range(2 * placement.SHAPES):
        cluster.submit(f"wide-{n}", Request.of({"cpus": 10**7 + n}).shape)
    small = [f"small-{n}" for n in range(2 * placement.MAX_ADMITTED + 1)]
    assert [cluster.submit(job) for job in small] == [None] * len(small)
    if how == "is revoked":
        cluster.ledger.cancel("last", State.CANCELLED)
    else:
        cluster.register("x")
        assert job_field(cluster.client, "last", "worker") == b"x"
    assert (kept(cluster), {cluster.state(job) for job in small}) == ("", {"admitted"})


def test_each_worker_that_is_kept_no_more_is_filled(cluster: Cluster) -> None:
    busy = Request.of({"cpus": 3000}).shape
    cluster.register("x")
    for worker in "wx":
        cluster.run(f"busy-{worker}", busy, worker)
    for worker, memory in zip("wx", (1, 2), strict=True):
        cluster.submit(f"last-{worker}", Request.of({"cpus": 1000, "memory": memory}).shape, losses=LAST)
        cluster.renew(f"busy-{worker}", worker=worker)
        assert kept(cluster, worker) != ""
    assert [cluster.submit(f"next-{worker}") for worker in "wx"] == [None, None]
    # Another worker turns out to run the jobs for which they are kept.
    cluster.register("y", Request.of({"slots": 2}).shape)
    held = [Adopted(f"last-{worker}", Token(1, 1), Request.of({}).shape, 1, 5, 6, "n", 0) for worker in "wx"]
    assert cluster.ledger.adopt("y", "y-life", held) == []
    for worker in "wx":
        cluster.renew(f"busy-{worker}", worker=worker)
    assert [cluster.state(f"next-{worker}") for worker in "wx"] == ["admitted", "admitted"]


@pytest.mark.parametrize("how", ["is revoked", "is removed", "goes elsewhere", "goes to a released worker"])
def test_worker_whose_filling_was_cut_off_is_filled_by_its_heartbeat(
    cluster: Cluster, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.run("one")
    if how == "goes to a released worker":
        cluster.register("x")
        cluster.run("all", Request.of({"cpus": 4000}).shape, "x")
    cluster.submit("last", losses=LAST)
    cluster.renew("one")
    cluster.submit("next")
    assert (kept(cluster), cluster.state("next")) == (ALONE, "waiting")
    cluster.written()
    with monkeypatch.context() as dying:
        # The caller dies between the script that ends the keeping and the one that fills.
        dying.setattr(cluster.ledger, "fill", lambda *_: 0)
        if how == "is revoked":
            assert cluster.ledger.cancel("last", State.CANCELLED).verdict == "ended"
        elif how == "is removed":
            assert cluster.ledger.remove_job("last", Token(1, 0), final=True)
        elif how == "goes elsewhere":
            cluster.register("x")
            assert [placed.worker for placed in cluster.ledger.place_shape(ALONE)] == ["x"]
        else:
            cluster.end("all", Token(1, 1), worker="x")
    assert (kept(cluster), cluster.state("next")) == ("", "waiting")
    cluster.ledger.renew("w", "w-life", {}, ["one"], MOST_LOSSES, admit=False)
    assert cluster.state("next") == "waiting"
    cluster.renew("one")
    assert cluster.state("next") == "admitted"


def test_a_worker_that_shrinks_below_the_job_is_kept_no_more(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("last", Request.of({"cpus": 3000}).shape, losses=LAST)
    cluster.renew("one")
    cluster.submit("next")
    assert kept(cluster) != ""
    cluster.register(capacity=Request.of({"cpus": 2500, "memory": 100, "slots": 8}).shape)
    assert (kept(cluster), cluster.state("next"), cluster.state("last")) == ("", "admitted", "waiting")


@pytest.mark.parametrize("how", ["dies", "drains", "is lost"])
def test_when_the_worker_that_is_kept_cannot_take_the_job_another_is_kept(cluster: Cluster, how: str) -> None:
    cluster.run("one")
    cluster.register("x")
    assert cluster.submit("other", Request.of({"cpus": 4000}).shape) == "x"
    cluster.submit("last", losses=LAST)
    cluster.renew("one")
    assert kept(cluster) == ALONE
    if how == "drains":
        cluster.ledger.drain("w", "w-life")
    else:
        cluster.expire()
    if how == "is lost":
        cluster.lapse()
    cluster.renew("other", worker="x")
    assert kept(cluster, "x") == ALONE
    assert how == "is lost" or kept(cluster) == ""


def test_a_job_that_would_fit_no_empty_worker_keeps_none(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("last", Request.of({"cpus": 9000}).shape, losses=LAST)
    cluster.renew("one")
    assert (kept(cluster), cluster.submit("next")) == ("", "w")


def test_jobs_earlier_in_order_are_taken_before_a_worker_is_kept(cluster: Cluster) -> None:
    cluster.run("one", Request.of({"cpus": 4000}).shape)
    for job, losses in (("before", 0), ("last", LAST), ("after", 0)):
        assert cluster.submit(job, losses=losses) is None
    cluster.register(capacity=Request.of({"cpus": 6000, "memory": 100, "slots": 8}).shape)
    assert [cluster.state(job) for job in ("before", "last", "after")] == ["admitted", "waiting", "waiting"]
    assert kept(cluster) == ALONE


def test_a_job_that_one_loss_ends_never_runs_alone() -> None:
    request = Request.from_shape(ONE)
    assert placement.held_by(request, 5, 1) == request
    assert placement.held_by(request, 0, 2).shape == placement.held_by(request, 1, 3).shape == ONE
    assert placement.held_by(request, 1, 2).shape == placement.held_by(request, 7, 3).shape == ALONE
    assert placement.asked_shape(ALONE) == ONE


def test_a_job_whose_first_loss_ends_it_is_lost_by_it_and_by_nothing_else(cluster: Cluster) -> None:
    cluster.ledger.submit("once", ONE, order(0, 1), b'{"body":"","properties":{"a":1}}', rerun=False)
    assert not cluster.claim("once", Token(1, 1)).rerun
    assert cluster.end("once", Token(1, 1), "handed_back").state == "waiting"
    assert cluster.ledger.drain("w", "w-life") == 1
    cluster.register("x")
    assert cluster.claim("once", Token(1, 3), "x").ok
    cluster.expire("x")
    assert cluster.lapse("x") == "gone"
    assert cluster.noted("once")[-1] == ("lost", "lost")


# The policy itself.


def book(name: str, slots: int = 0, **more: object) -> Book:
    return Book(name, CAPACITIES, {"slots": slots, "cpus": slots * 1000}, **more)  # type: ignore[arg-type]


CAPACITIES: Final = dict(Request.from_shape(CAPACITY).amounts)
JOB: Final = Request.from_shape(ALONE)


def test_the_reason_says_that_it_waits_to_be_alone_and_where() -> None:
    assert survey(JOB, [book("a", 1), book("b")]) == Admission("b")
    assert survey(JOB, [book("a", 1), book("b", 2)]) == Refusal(Reason.ALONE)
    assert survey(JOB, [book("a", 1, kept=ALONE), book("b", 2)]) == Refusal(Reason.ALONE, worker="a")
    # For other jobs the reason says whose turn it is.
    refusal = survey(Request.from_shape(ONE), [book("a", 1, kept=ALONE)])
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.resource, refusal.worker) == (Reason.NO_ROOM, "alone", "a")


def test_a_pass_keeps_the_worker_when_the_turn_has_come() -> None:
    small, last = Request.from_shape(ONE), JOB
    backlog = [Waiting("1", small, 1), Waiting("2", last, 2), Waiting("3", small, 3)]
    admitted, shape = fill_or_keep(book("a", 1), backlog, 32)
    assert ([waiting.job for waiting in admitted], shape) == (["1"], ALONE)
    # Another worker is kept for this shape already.
    admitted, shape = fill_or_keep(book("a", 1), backlog, 32, {ALONE})
    assert ([waiting.job for waiting in admitted], shape) == (["1", "3"], "")


def test_worker_is_kept_for_an_earlier_job_once_its_reserved_one_started(cluster: Cluster) -> None:
    token = cluster.run("one")
    cluster.run("two")
    middle = Request.of({"cpus": 3000}).shape
    cluster.submit("middle", middle)
    head = int(job_field(cluster.client, "middle", "order") or 0)
    allocated = snapshot.read_books(cluster.client, ["w"])["w"].allocated
    assert cluster.ledger.reserve(Reservation("w", middle, head, 0, {}), allocated, ["w"])
    cluster.ledger.submit("last", ONE, order(5, 9), MESSAGE, losses=LAST)
    cluster.submit("later", Request.of({}).shape)
    cluster.end("one", token)
    assert [cluster.state(job) for job in ("middle", "last", "later")] == ["admitted", "waiting", "waiting"]
    assert kept(cluster) == ALONE
