"""Rules of attempts that come again: successors, last chances, doubled calls. Over the ledger and over Postgres."""

from __future__ import annotations

import pytest

from celery_capacity.routing.model.job import Existing
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import SHAPES
from celery_capacity.routing.store.claims import PAGE
from tests.fixtures.stores.authorities import Authority

#: CPUs that no worker of these tests has.
TOO_MANY = 99_000

# -- successors


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "expired", "retried", "lost"])
def test_attempt_leaves_the_id_to_its_successor(authority: Authority, outcome: str) -> None:
    """Even the last attempt that may be lost does so, because its successor is another publish."""
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000, losses=2 if outcome == "lost" else 0)
    assert authority.starts("a") == [job]
    assert authority.republish(job) is Existing.SUCCESSOR
    assert authority.end(job, outcome) == "released"
    assert (authority.row(job).state, authority.row(job).retries) == ("scheduled", 1)
    authority.duty()
    assert authority.starts("a") == [job]
    assert authority.row(job).attempt == 2


def test_cancelled_attempt_has_no_successor(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    authority.republish(job)
    authority.end(job, "cancelled")
    authority.duty()
    assert authority.starts("a") == []
    assert authority.row(job).state == "cancelled"


def test_successor_of_a_lost_worker_runs_and_its_attempt_cannot_end_it(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    first = Token(authority.row(job).epoch, 1)
    authority.republish(job)
    authority.lose("a")
    authority.worker("b", cpus=1000)
    authority.duty()
    assert authority.starts("b") == [job]
    authority.wake("a")
    assert authority.end(job, worker="a", token=first) == "stale"
    assert (authority.row(job).state, authority.row(job).worker) == ("running", "b")


def test_attempt_that_went_back_publishes_nothing(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    first = Token(authority.row(job).epoch, 1)
    authority.end(job, "handed_back")
    authority.starts("a")
    assert authority.republish(job, first) is Existing.STALE
    assert authority.row(job).successor is None


# -- last chances


def test_loss_that_leaves_one_attempt_lets_it_run_alone(authority: Authority) -> None:
    authority.worker("a", cpus=4000)
    job = authority.submit(cpus=1000, losses=1)
    assert authority.starts("a") == [job]
    authority.end(job, "lost")
    assert authority.starts("a") == [job]
    assert authority.allocated("a") == {"cpus": 1000, "slots": 1, "alone": 1}
    authority.submit(cpus=1000)
    assert authority.starts("a") == []


def test_last_attempt_that_is_handed_back_stays_the_last(authority: Authority) -> None:
    authority.worker("a", cpus=4000)
    job = authority.submit(cpus=1000, losses=2)
    authority.starts("a")
    authority.end(job, "handed_back")
    assert authority.starts("a") == [job]
    assert authority.allocated("a")["alone"] == 1
    authority.end(job, "lost")
    assert authority.row(job).state == "lost"


def test_last_attempt_that_fits_nowhere_holds_up_no_other(authority: Authority) -> None:
    authority.worker("a", cpus=4000)
    last, other = authority.submit(cpus=TOO_MANY, losses=2), authority.submit(cpus=1000)
    assert authority.starts("a") == [other]
    assert authority.waits(last)


def test_job_that_may_start_once_is_lost_by_a_loss_and_by_nothing_else(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000, rerun=False)
    authority.starts("a")
    authority.end(job, "handed_back")
    assert authority.starts("a") == [job]
    authority.end(job, "lost")
    assert authority.row(job).state == "lost"
    assert authority.starts("a") == []


# -- ends


@pytest.mark.parametrize(
    "error", ["NUL \x00 inside", '"quoted" \\u0041 %s', "half a character \ud800", "ünïcödé", "x" * 8000]
)
def test_any_error_text_of_a_task_reaches_the_row(authority: Authority, error: str) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    assert authority.end(job, "failed", error=error) == "released"
    row = authority.row(job)
    assert row.state == "failed"
    assert row.error[:3] == error[:3]
    assert authority.allocated("a") == {}


# -- who starts


def test_job_that_is_brought_in_twice_starts_once(authority: Authority) -> None:
    authority.worker("a", cpus=4000)
    job = authority.submit(cpus=1000)
    authority.bring_in(job)
    assert authority.starts("a") == [job]
    authority.bring_in(job)
    assert authority.starts("a") == []
    assert authority.allocated("a") == {"cpus": 1000, "slots": 1}


def test_worker_that_shrank_starts_nothing_before_its_jobs_fit(authority: Authority) -> None:
    authority.worker("a", cpus=3000)
    running = [authority.submit(cpus=1000) for _ in range(3)]
    assert authority.starts("a") == running
    authority.worker("a", cpus=2000)
    later = authority.submit(cpus=1000)
    assert authority.starts("a") == []
    authority.end(running[0])
    assert authority.starts("a") == [], "it is full now"
    authority.end(running[1])
    assert authority.starts("a") == [later]


@pytest.mark.parametrize("shapes", ["one", "many"])
@pytest.mark.parametrize("queue", ["celery", "mail"])
def test_job_that_fits_is_found_behind_pages_of_others(authority: Authority, shapes: str, queue: str) -> None:
    """Each store looks at a page at a time: the ledger at shapes, Postgres at jobs."""
    for number in range(PAGE + 10 if shapes == "one" else 2 * SHAPES + 10):
        cpus = TOO_MANY if queue == "celery" else 1000
        authority.submit(cpus=cpus + (number if shapes == "many" else 0), queue=queue, priority=9)
    job = authority.submit(cpus=500)
    authority.worker("a", cpus=1000)
    assert authority.starts("a") == [job]
