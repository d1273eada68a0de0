"""Jobs that no registered worker could hold: the sender is warned, `cluster` and `job` say so, and they may fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest
from celery import Signature, chord, signature
from celery.exceptions import ChordError

from celery_capacity import Infeasible, InvalidRequest, job
from celery_capacity.platform.console.render import reasons
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.workers.dispatch import feasibility_check
from tests.fixtures.jobs.ear import Ear
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
FAIL = "tests.fixtures.tasks.fail"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("infeasible"), "tests.tasks.work") as running:
        running.worker("a", cpus=2, arguments=("-E",), PLATFORM_FAIL_INFEASIBLE_AFTER="3")
        yield running


def test_sender_is_warned_once_with_the_largest_worker(submitter: Submitter, caplog: pytest.LogCaptureFixture) -> None:
    check = submitter.app.platform.breaker._feasibility
    with caplog.at_level(logging.WARNING, feasibility_check.__name__):
        for _ in range(3):
            submitter.send(ADD, 1, 2, cpus=64)
        check.finish()
    texts = [record.getMessage() for record in caplog.records if record.name == feasibility_check.__name__]
    assert len(texts) == 1
    assert f"A job of {ADD} (64 CPUs" in texts[0]
    assert "asks for 64 CPUs; the largest registered worker has 2 CPUs (a). It waits until" in texts[0]


def test_sender_is_not_warned_of_a_job_that_waits_for_room(
    submitter: Submitter, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, feasibility_check.__name__):
        jobs = [submitter.send(ADD, 1, number, cpus=2) for number in range(5)]
        submitter.app.platform.breaker._feasibility.finish()
        assert [submitter.value(number) for number in jobs] == [1, 2, 3, 4, 5]
    assert [record for record in caplog.records if record.name == feasibility_check.__name__] == []


def test_infeasible_job_says_why_and_fails_with_its_error(submitter: Submitter) -> None:
    wide = submitter.send(ADD, 1, 2, cpus=48)
    why = job(wide, submitter.app).explain()
    assert asyncio.run(job(wide, submitter.app).aio.explain()).why is why.why
    assert (why.why.value, why.resource, why.asked, why.free, why.worker) == ("too-large", "cpus", 48_000, 2000, "a")
    assert "It is too large for every worker" in reasons(why)[0]
    with pytest.raises(Infeasible, match=r"it asks for 48 CPUs; the largest registered worker has 2 CPUs \(a\)"):
        submitter.value(wide)
    row = submitter.ended(wide)
    assert (row.state, row.attempt) == ("failed", 0)
    assert row.error.startswith("no registered worker could hold it for 3 s")
    assert submitter.attempts(wide) == []


def test_infeasible_job_calls_its_error_callback_once(submitter: Submitter) -> None:
    wide = submitter.send(ADD, 1, 2, cpus=48, link_error=signature(FAIL, app=submitter.app))
    assert submitter.ended(wide).state == "failed"

    def callbacks() -> list[str]:
        with submitter.platform.engine.connect() as connection:
            query = "SELECT id FROM jobs WHERE parent_id = %(id)s"
            return list(connection.exec_driver_sql(query, {"id": wide}).scalars())

    until(callbacks, "the error callback is published")
    (callback,) = callbacks()
    # Celery gives an error callback the id of the failed task, and this one fails with its argument.
    assert wide in submitter.ended(callback).error


def test_infeasible_job_is_told_as_failed_by_one_event(submitter: Submitter) -> None:
    ear = Ear(submitter.app)
    try:
        wide = submitter.send(ADD, 1, 2, cpus=48)
        *_, event = ear.until(wide, "task-failed")
        assert "no registered worker could hold it" in event["exception"]
        assert submitter.ended(wide).state == "failed"
        assert [entry["type"] for entry in ear.of(wide)].count("task-failed") == 1
    finally:
        ear.close()


def test_explain_raises_for_an_unknown_job(submitter: Submitter) -> None:
    with pytest.raises(InvalidRequest, match="there is no job nobody"):
        job("nobody", submitter.app).explain()


def test_chord_with_an_infeasible_part_fails(submitter: Submitter) -> None:
    def part(**options: float) -> Signature:
        made: Signature = signature(ADD, args=(1, 2), app=submitter.app).set(**options)
        return made

    sent = chord([part(), part(cpus=48)])(signature(ADD, args=(1, 2), immutable=True, app=submitter.app))
    with pytest.raises(ChordError, match="no registered worker could hold it"):
        submitter.value(sent.id)


def test_job_that_needs_an_infeasible_job_is_cancelled(submitter: Submitter) -> None:
    wide = submitter.send(ADD, 1, 2, cpus=48)
    after = submitter.send(ADD, 1, 2, after=[wide])
    assert submitter.ended(after).state == "cancelled"
    assert submitter.row(wide).state == "failed"
