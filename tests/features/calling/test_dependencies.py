"""`after=` with a worker: waiting jobs hold nothing, start when others succeed, and end when they cannot start.

A start follows at once when all awaited jobs have succeeded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from celery.exceptions import TaskRevokedError

from celery_capacity.platform.console.render import reasons
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.model.reasons import Reason
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
FAIL = "tests.fixtures.tasks.fail"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("after"), "tests.tasks.ends") as running:
        yield running


@pytest.fixture(scope="module")
def hasty(platform: Platform) -> None:
    """Start a worker whose duties do not come round: a job starts there only because another one ended."""
    platform.worker("a", cpus=2, PLATFORM_DUE_INTERVAL="600", PLATFORM_SWEEP_INTERVAL="600")


@pytest.fixture(scope="module")
def usual(platform: Platform) -> None:
    for process in platform.processes:
        process.stop()
    platform.worker("b", cpus=2)


@pytest.mark.usefixtures("hasty")
def test_a_job_starts_at_once_when_the_last_that_it_needs_has_succeeded(
    platform: Platform, submitter: Submitter
) -> None:
    first, second = (submitter.send(HOLD, gate) for gate in ("one", "two"))
    wide = submitter.send(ADD, 1, 2, after=[first, second], cpus=2)
    last = submitter.send(ADD, 3, 4, after=submitter.result(wide))
    for gate in ("one", "two"):
        tasks.started(platform.redis, gate)
    assert submitter.allocated_cpus() == "2"
    with platform.engine.connect() as connection:
        why = explain(platform.redis, connection, wide)
    assert why is not None and (why.why, set(why.needs)) == (Reason.NEEDS_JOBS, {first, second})
    (reason,) = reasons(why)
    assert first in reason and second in reason
    tasks.let_go(platform.redis, "one")
    assert submitter.ended(first).state == "succeeded"
    until(lambda: submitter.row(wide).needs == 1, "the first is counted off")
    assert submitter.row(wide).state == "scheduled"
    tasks.let_go(platform.redis, "two")
    assert (submitter.value(wide), submitter.value(last)) == (3, 7)
    ends = submitter.ended(second).finished_at
    assert ends <= submitter.ended(wide).started_at <= submitter.ended(last).started_at


@pytest.mark.usefixtures("usual")
def test_failure_ends_all_dependents_with_the_result_of_a_revoke(submitter: Submitter) -> None:
    before = submitter.jobs()
    with pytest.raises(InvalidRequest, match="'nobody'"):
        submitter.send(ADD, 1, 2, after=["nobody"])
    assert submitter.jobs() == before
    first = submitter.send(FAIL, "no")
    second = submitter.send(ADD, 1, 2, after=first)
    third = submitter.send(ADD, 1, 2, after=[second])
    row = submitter.ended(third)
    assert (row.state, row.error) == ("cancelled", f"job {second}, which it needs, ended as cancelled")
    assert submitter.row(second).error == f"job {first}, which it needs, ended as failed"
    for job in (second, third):
        with pytest.raises(TaskRevokedError, match="which it needs"):
            submitter.value(job)
        assert submitter.result(job).state == "REVOKED"


@pytest.mark.usefixtures("usual")
def test_a_retry_is_no_end(submitter: Submitter) -> None:
    first = submitter.send("tests.tasks.ends.again", 2)
    second = submitter.send(ADD, 1, 2, after=first)
    assert submitter.value(second) == 3
    assert submitter.outcomes(first) == ["retried", "retried", "succeeded"]
    assert submitter.ended(second).started_at >= submitter.ended(first).finished_at


@pytest.mark.usefixtures("usual")
def test_a_chain_waits_as_a_whole_and_a_group_can_be_waited_for(submitter: Submitter) -> None:
    add = submitter.app.signature(ADD)
    parts = submitter.app.GroupResult("parts", [submitter.result(submitter.send(ADD, n, n)) for n in range(3)])
    chain = (add.clone((1, 1)).set(after=parts.results) | add.clone((1,))).apply_async()
    assert chain.get(timeout=60) == 3
    started = submitter.ended(chain.parent.id).started_at
    assert started >= max(submitter.ended(part.id).finished_at for part in parts.results)


@pytest.mark.usefixtures("usual")
def test_what_many_were_submitted_as_can_be_waited_for(submitter: Submitter) -> None:
    many = submitter.app.submit_many(ADD, [(n, n) for n in range(5)])
    last = submitter.ended(submitter.send(ADD, 1, 1, after=many))
    assert last.started_at >= max(submitter.ended(job).finished_at for job in many.ids())
    most = submitter.app.submit_many(ADD, ((n, n) for n in range(2)))
    with pytest.raises(InvalidRequest, match="more than 10000"):
        submitter.send(ADD, 1, 1, after=replace(most, length=10**9))
