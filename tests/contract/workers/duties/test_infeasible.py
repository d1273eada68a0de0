"""The duty that fails jobs which no registered worker could hold, whichever store decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from celery_capacity import Infeasible
from celery_capacity.routing.policy.pauses import Scope
from celery_capacity.workers.client import controls
from celery_capacity.workers.duties import infeasible
from tests.fixtures.stores.authorities import Authority

#: Seconds after which a job fails.
AFTER = 600.0
ERROR = "no registered worker could hold it for 600 s: it asks for 8 CPUs; the largest registered worker has 4 CPUs (a)"


@pytest.fixture
def failing(authority: Authority) -> Authority:
    """Return a cluster in which infeasible jobs fail, with a worker of 4 CPUs."""
    settings = replace(authority.stores.settings, fail_infeasible_after=AFTER)
    authority.stores._made["settings"] = settings
    authority.worker("a", cpus=4000)
    return authority


def duty(cluster: Authority) -> dict[str, int]:
    run = infeasible.run_once if cluster.name == "ledger" else infeasible.without_ledger
    return run(cluster.app, cluster.stores)


def pass_time(cluster: Authority, seconds: float = AFTER) -> None:
    """Let jobs and requests have waited for so many seconds more."""
    cluster.stage.apply()
    cluster.stage.sql("UPDATE jobs SET submitted_at = submitted_at - make_interval(secs => :by)", by=seconds)
    cluster.stage.sql("UPDATE infeasible SET since = since - make_interval(secs => :by)", by=seconds)


def clocks(cluster: Authority) -> list[str]:
    with cluster.stage.engine.connect() as connection:
        return list(connection.exec_driver_sql("SELECT shape FROM infeasible ORDER BY shape").scalars())


def test_job_fails_once_it_was_infeasible_for_the_time(failing: Authority) -> None:
    wide, other = failing.submit(cpus=8000), failing.submit(cpus=5000, memory=1)
    slim = failing.submit(cpus=4000)
    assert (duty(failing), len(clocks(failing))) == ({"failed": 0}, 2)
    pass_time(failing, AFTER / 2)
    assert (duty(failing), len(clocks(failing))) == ({"failed": 0}, 2)
    pass_time(failing)
    assert (duty(failing), len(clocks(failing))) == ({"failed": 2}, 2)
    row = failing.row(wide)
    assert (row.state, row.error, row.attempt) == ("failed", ERROR, 0)
    result = failing.app.AsyncResult(wide)
    assert (result.state, type(result.result), result.result.message) == ("FAILURE", Infeasible, ERROR)
    assert failing.row(other).state == "failed"
    assert (duty(failing), len(clocks(failing))) == ({"failed": 0}, 0)
    assert clocks(failing) == []
    assert failing.starts("a") == [slim]
    failing.end(slim)


def test_job_waits_for_ever_without_the_setting(failing: Authority) -> None:
    failing.stores._made["settings"] = replace(failing.stores.settings, fail_infeasible_after=0.0)
    wide = failing.submit(cpus=8000)
    pass_time(failing)
    assert duty(failing) == {}
    assert failing.waits(wide)


def test_worker_that_registers_ends_the_clock_which_starts_anew(failing: Authority) -> None:
    wide = failing.submit(cpus=8000)
    duty(failing)
    pass_time(failing)
    failing.worker("b", cpus=8000)
    duty(failing)
    assert clocks(failing) == []
    assert failing.starts("b") == [wide]
    failing.lose("b")
    assert failing.waits(wide)
    assert (duty(failing), len(clocks(failing))) == ({"failed": 0}, 1)
    pass_time(failing)
    assert duty(failing)["failed"] == 1
    assert failing.row(wide).state == "failed"


def test_draining_worker_that_is_large_enough_keeps_jobs_from_failing(failing: Authority) -> None:
    failing.worker("b", cpus=8000)
    failing.drain("b")
    failing.stage.sql("UPDATE workers SET status = 'draining' WHERE name = 'b'")
    wide = failing.submit(cpus=8000)
    duty(failing)
    pass_time(failing)
    assert (duty(failing), len(clocks(failing))) == ({"failed": 0}, 0)
    assert failing.waits(wide)


@pytest.mark.parametrize("because", ["no worker is registered", "no worker serves its queue"])
def test_job_never_fails_where_nothing_can_be_judged(failing: Authority, because: str) -> None:
    if because == "no worker is registered":
        failing.stage.sql("UPDATE workers SET status = 'left'")
        wide = failing.submit(cpus=8000)
    else:
        wide = failing.submit(cpus=8000, queue="video")
    duty(failing)
    pass_time(failing)
    assert (duty(failing), len(clocks(failing))) == ({"failed": 0}, 0)
    assert failing.waits(wide)


def test_clock_that_nobody_watched_for_a_while_starts_anew(failing: Authority) -> None:
    wide = failing.submit(cpus=8000)
    duty(failing)
    pass_time(failing)
    failing.stage.sql("UPDATE infeasible SET seen_at = now() - interval '1 hour'")
    assert (duty(failing), len(clocks(failing))) == ({"failed": 0}, 1)
    assert failing.waits(wide)
    pass_time(failing)
    assert duty(failing)["failed"] == 1


def test_young_job_of_an_old_request_has_its_own_time(failing: Authority) -> None:
    old = failing.submit(cpus=8000)
    duty(failing)
    pass_time(failing)
    young = failing.submit(cpus=8000)
    assert duty(failing)["failed"] == 1
    assert (failing.row(old).state, failing.waits(young)) == ("failed", True)


def test_job_that_became_due_just_now_has_waited_since_then(failing: Authority) -> None:
    first, later = failing.submit(cpus=8000), failing.submit(cpus=8000, due_in=3600)
    duty(failing)
    pass_time(failing)
    failing.make_due(later)
    failing.duty()
    assert duty(failing)["failed"] == 1
    assert (failing.row(first).state, failing.row(later).state in ("waiting", "scheduled")) == ("failed", True)


def test_one_pass_fails_a_bounded_number_of_jobs(failing: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infeasible, "MAX_JOBS", 2)
    jobs = [failing.submit(cpus=8000) for _ in range(5)]
    duty(failing)
    pass_time(failing)
    assert [duty(failing)["failed"] for _ in range(4)] == [2, 2, 1, 0]
    assert {failing.row(job).state for job in jobs} == {"failed"}


def test_failed_job_never_starts_though_a_large_worker_registers(failing: Authority) -> None:
    wide = failing.submit(cpus=8000)
    duty(failing)
    pass_time(failing)
    duty(failing)
    failing.worker("b", cpus=8000)
    failing.bring_in(wide)
    assert failing.starts("b") == []
    assert failing.row(wide).state == "failed"


def test_revoked_job_is_cancelled_and_does_not_fail(failing: Authority) -> None:
    wide = failing.submit(cpus=8000)
    duty(failing)
    pass_time(failing)
    failing.revoke(wide)
    assert duty(failing)["failed"] == 0
    assert failing.row(wide).state == "cancelled"


def test_job_that_is_paused_fails_after_the_same_time(failing: Authority) -> None:
    controls.pause(failing.stores, Scope.of())
    wide = failing.submit(cpus=8000)
    assert (duty(failing), len(clocks(failing))) == ({"failed": 0}, 1)
    pass_time(failing)
    assert duty(failing)["failed"] == 1
    assert failing.row(wide).state == "failed"
    controls.resume(failing.stores, Scope.of())
