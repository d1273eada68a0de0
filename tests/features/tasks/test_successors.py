"""Replacing a task: the fate of its id when the replacement does not reach its last step, and when processes die.

tests/features/tasks/test_canvas.py covers replacements that succeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import chord, group
from celery.canvas import Signature
from celery.exceptions import TaskError, TaskRevokedError, WorkerLostError
from sqlalchemy import text

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.tasks import add
from tests.fixtures.waiting import until
from tests.tasks.canvas import (
    becomes,
    dying,
    failing,
    gated,
    ignoring,
    listed,
    publishes_and_dies,
    total,
)

#: Mark of tests that kill a pool process, which only a pool with its own processes allows.
prefork_only = pytest.mark.parametrize("pool", ["prefork"], indirect=True)


@pytest.fixture(scope="module", params=["prefork", "threads"])
def pool(request: pytest.FixtureRequest) -> Pool:
    pool_name: Pool = request.param
    return pool_name


@pytest.fixture(scope="module")
def platform(pool: Pool, server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield one worker `a` with 2 CPUs and as many slots."""
    with standing_platform(server_pair, tmp_path_factory.mktemp(pool), "tests.tasks.canvas") as running:
        running.worker("a", cpus=2, pool=pool)
        yield running


def replaced_by(canvas: Signature, **options: Any) -> Any:
    return becomes.apply_async((), {"canvas": canvas}, **options)


def step_of(platform: Platform, job: str, name: str, *states: str) -> str:
    """Return the id of a step in the replacement of a job, as soon as the step is in one of these states."""

    def found() -> str | None:
        with platform.engine.connect() as connection:
            query = text("SELECT id, state FROM jobs WHERE replaces = :job AND name = :name AND id <> :job")
            rows = connection.execute(query, {"job": job, "name": name})
            return next((str(row.id) for row in rows if row.state in states), None)

    return str(until(found, f"a step {name} of {job} is {states}"))


# -- the replacement does not come to its last step

#: Name -> a canvas in which a step fails before the last.
FAILS: dict[str, Callable[[], Signature]] = {
    "first of a chain": lambda: failing.s() | add.s(1) | add.s(2),
    "middle of a chain": lambda: add.s(1, 1) | failing.s() | add.s(1),
    "in a group": lambda: group(add.s(1, 1), failing.s()),
    "header of a chord": lambda: chord([add.s(1, 1), failing.s()], total.s()),
    "header inside a chain": lambda: add.s(1, 1) | group(add.s(1), failing.s()) | total.s() | add.s(1),
    "header of an inner chord": lambda: chord([chord([failing.s(), add.s(1, 1)], total.s())], total.s()),
    "in the replacement of a step": lambda: becomes.s(canvas=failing.s() | add.s(1)) | add.s(1),
}


def test_a_replaced_job_fails_with_a_step_of_its_replacement(platform: Platform, submitter: Submitter) -> None:
    sent = {name: replaced_by(make()) for name, make in FAILS.items()}
    sent["in a chain"] = (becomes.s(canvas=failing.s() | add.s(1)) | add.s(2)).apply_async()
    sent["in a chord"] = chord([becomes.s(canvas=failing.s() | add.s(1)), add.s(1, 1)], total.s()).apply_async()
    for name, result in sent.items():
        error = result.get(timeout=60, propagate=False)
        assert (name, "the step failed" in str(error)) == (name, True), error
    for name in FAILS:
        row = submitter.ended(sent[name].id)
        assert (name, row.state) == (name, "failed")
        assert row.error.startswith("its replacement ended without it: job "), row.error
        assert submitter.outcomes(row.id) == ["replaced"]
    # The step that would have followed was never published.
    assert (submitter.row(sent["in a chain"].id), submitter.row(sent["in a chord"].id)) == (None, None)


@pytest.mark.parametrize(
    ("step", "state", "error"),
    [
        (lambda: add.s(1).set(countdown=60, expires=0.1), "expired", TaskRevokedError),
        (lambda: ignoring.s(), "failed", TaskError),
    ],
    ids=["expires", "ignores itself"],
)
def test_a_replaced_job_ends_with_a_step_of_which_celery_tells_nobody(
    platform: Platform, submitter: Submitter, step: Callable[[], Signature], state: str, error: type[Exception]
) -> None:
    body = chord([becomes.s(canvas=add.s(1, 1) | step() | add.s(2)), add.s(1, 1)], total.s()).apply_async()
    job = body.parent.results[0].id
    with pytest.raises(error, match="its replacement ended"):
        submitter.value(job)
    assert submitter.ended(job).state == state
    # The chord that has the replaced job as a part hears of it too.
    assert "its replacement ended" in str(body.get(timeout=60, propagate=False))


def test_a_replaced_job_is_cancelled_with_a_step_that_is_revoked(platform: Platform, submitter: Submitter) -> None:
    job = replaced_by(add.s(1, 1) | add.s(1).set(countdown=60) | add.s(2)).id
    submitter.app.control.revoke(step_of(platform, job, add.name, "scheduled"))
    with pytest.raises(TaskRevokedError, match=r"its replacement ended without it: job .* is cancelled: revoked"):
        submitter.value(job)
    assert submitter.ended(job).state == "cancelled"


@prefork_only
def test_a_replaced_job_is_lost_with_a_step_that_is_lost(platform: Platform, submitter: Submitter) -> None:
    job = replaced_by(dying.s() | add.s(1)).id
    with pytest.raises(WorkerLostError):
        submitter.value(job)
    row = submitter.ended(job)
    assert (row.state, row.losses) == ("lost", 0)
    assert submitter.outcomes(job) == ["replaced"]


# -- meanwhile


def test_a_replaced_job_holds_nothing_and_may_be_revoked(platform: Platform, submitter: Submitter) -> None:
    kept = replaced_by(gated.s(1, gate="kept").set(cpus=0.5) | listed.s(), cpus=2).id
    tasks.started(platform.redis, "kept")
    assert submitter.until(kept, "replaced").finished_at is None
    assert submitter.allocated_cpus() == "0.5"
    revoked = replaced_by(gated.s(1, gate="revoked").set(cpus=0.5) | listed.s()).id
    step, _ = tasks.started(platform.redis, "revoked")
    submitter.until(revoked, "replaced")
    submitter.result(revoked).revoke()
    assert submitter.ended(revoked).state == "cancelled"
    with pytest.raises(TaskRevokedError):
        submitter.value(revoked)
    tasks.let_go(platform.redis, "revoked")
    tasks.let_go(platform.redis, "kept")
    # The step that runs already is not to blame: it ends as usual, and the rest of its canvas is dropped.
    assert submitter.ended(step).state == "succeeded"
    assert submitter.value(kept) == [[1]]
    assert submitter.ended(revoked).attempt == 1


# -- processes that die


@prefork_only
def test_an_attempt_that_dies_after_it_was_replaced_is_replaced_again(platform: Platform, submitter: Submitter) -> None:
    """Both replacements run, with inner steps of their own. The job goes on with the first one to finish, once."""
    inner = gated.s(1, gate="twice").set(cpus=0.5)
    job = becomes.apply_async((), {"canvas": inner | listed.s(), "dies": True}, cpus=0.5).id
    first, _ = tasks.started(platform.redis, "twice")
    second, _ = tasks.started(platform.redis, "twice")
    assert first != second
    submitter.until(job, "replaced")
    tasks.let_go(platform.redis, "twice", 2)
    assert submitter.value(job) == [[1]]
    assert {submitter.ended(step).state for step in (job, first, second)} == {"succeeded"}
    assert submitter.outcomes(job) == ["lost", "replaced", "succeeded"]


@prefork_only
def test_an_attempt_that_dies_after_its_only_replacement_goes_on_with_it(
    platform: Platform, submitter: Submitter
) -> None:
    job = becomes.apply_async((), {"canvas": add.s(1, 1), "dies": True}).id
    assert submitter.value(job) == 2
    submitter.ended(job)
    assert submitter.outcomes(job) == ["lost", "succeeded"]


@prefork_only
@pytest.mark.parametrize("steps", [1, 2])
def test_what_carries_the_id_on_says_whether_it_may_run_again(
    platform: Platform, submitter: Submitter, steps: int
) -> None:
    """The last step must not start twice, though the task that it stands for might."""
    job = replaced_by(add.s(1, 1) | dying.s() if steps == 2 else dying.s()).id
    with pytest.raises(WorkerLostError):
        submitter.value(job)
    row = submitter.ended(job)
    assert (row.state, row.name, row.rerun) == ("lost", dying.name, False)
    assert submitter.outcomes(job) == ["replaced", "lost"]


@prefork_only
def test_a_step_that_a_parent_publishes_again_runs_once(platform: Platform, submitter: Submitter) -> None:
    result = (publishes_and_dies.s(1) | add.s(10) | add.s(100)).apply_async()
    assert result.get(timeout=60) == 111
    middle, first = result.parent, result.parent.parent
    for job, outcomes in ((first, ["lost", "succeeded"]), (middle, ["succeeded"]), (result, ["succeeded"])):
        assert submitter.ended(job.id).state == "succeeded"
        assert submitter.outcomes(job.id) == outcomes
