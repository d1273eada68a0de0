"""The reason why a job waits: the policy's reason over the current books, and the details from the stores."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import redis

from celery_capacity.platform.console import render
from celery_capacity.routing.inspect.explain import Explanation, explain
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.reasons import EXPLAINED, Reason
from tests.fixtures.stores.staged import Stage


def _why(stage: Stage, job: str) -> Explanation:
    with stage.engine.connect() as connection:
        explanation = explain(stage.redis, connection, job)
    assert explanation is not None
    return explanation


def _words(found: Explanation) -> str:
    return " ".join(render.reasons(found))


def test_without_a_worker_nothing_starts(stage: Stage) -> None:
    explanation = _why(stage, stage.submit(cpus=1000))
    assert explanation.why is Reason.NO_WORKER
    assert "No live worker admits jobs" in _words(explanation)


def test_a_resource_that_no_worker_publishes_is_named(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    explanation = _why(stage, stage.submit(cpus=1000, licence=1))
    assert (explanation.why, explanation.resource) == (Reason.UNKNOWN_RESOURCE, "licence")
    words = "No worker publishes licence, and it needs 1 licence. A worker publishes it through PLATFORM_RESOURCES."
    assert words in _words(explanation)


def test_gpus_that_no_worker_publishes_have_a_setting_of_their_own(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    explanation = _why(stage, stage.submit(cpus=1000, gpus=2))
    words = "No worker publishes gpus, and it needs 2 gpus. A worker publishes them through PLATFORM_GPUS."
    assert words in _words(explanation)


def test_a_job_too_large_for_every_worker_names_the_closest(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=8000)
    explanation = _why(stage, stage.submit(cpus=9000))
    assert (explanation.why, explanation.resource, explanation.asked, explanation.free) == (
        Reason.TOO_LARGE,
        "cpus",
        9000,
        8000,
    )
    assert explanation.large_enough == 0
    assert "it needs 9 CPUs, and b, which comes closest, has 8 CPUs when empty" in _words(explanation)
    assert explanation.to_json()["asked"] == 9


def test_a_full_worker_and_the_jobs_before_it_are_counted(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=3000)
    stage.submit(cpus=2000)
    stage.submit(cpus=4000)
    urgent = stage.submit(cpus=2000, priority=5)
    last = stage.submit(cpus=2000)
    explanation = _why(stage, last)
    assert (explanation.why, explanation.asked, explanation.free, explanation.worker) == (
        Reason.NO_ROOM,
        2000,
        1000,
        "a",
    )
    assert (explanation.place, explanation.before, explanation.large_enough, explanation.live_workers) == (3, 3, 1, 1)
    assert "number 3 of the jobs with this request; 3 waiting jobs come before it" in _words(explanation)
    assert (_why(stage, urgent).place, _why(stage, urgent).before) == (1, 0)


def test_explain_tells_of_a_job_that_must_run_alone_and_those_behind_it(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    beside = stage.submit(cpus=1000)
    stage.start(beside)
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job, "lost")
    stage.start(job)
    stage.end(job, "lost")
    explanation = _why(stage, job)
    assert (explanation.why, explanation.worker, explanation.place, explanation.resource) == (
        Reason.ALONE,
        "a",
        1,
        None,
    )
    assert explanation.request.to_people() == {"cpus": 1, "slots": 1}
    assert "runs alone on a worker, and none that it fits is empty. a takes nothing else" in _words(explanation)
    small = stage.submit(cpus=500)
    explanation = _why(stage, small)
    assert (explanation.why, explanation.resource, explanation.worker) == (Reason.NO_ROOM, "alone", "a")
    assert "a is left to a job that must run alone" in _words(explanation)
    stage.end(beside)
    assert _why(stage, job).why is Reason.RUNS


def test_a_default_request_is_told(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.sql("UPDATE jobs SET declared = false")
    assert "No worker has declared this task" in _words(_why(stage, job))


def test_an_accepted_job_is_on_its_way(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    explanation = _why(stage, stage.insert({"cpus": 1000}))
    assert (explanation.state, explanation.why) == ("accepted", Reason.ON_ITS_WAY)


def test_an_accepted_job_with_a_cold_ledger_waits_for_its_books(stage: Stage) -> None:
    job = stage.insert({"cpus": 1000})
    stage.redis.flushdb()
    explanation = _why(stage, job)
    assert explanation.why is Reason.LEDGER_CLOSED
    assert "The ledger is cold" in _words(explanation)


def test_a_scheduled_job_says_when(stage: Stage) -> None:
    due = datetime.now(UTC) + timedelta(hours=1)
    explanation = _why(stage, stage.insert({"cpus": 1000}, due_at=due))
    assert (explanation.why, explanation.due_at) == (Reason.SCHEDULED, due)
    assert render.moment(due) in _words(explanation)


def test_without_redis_that_is_the_reason(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    with stage.engine.connect() as connection:
        explanation = explain(redis.Redis(port=1), connection, job)
    assert explanation is not None
    assert explanation.why is Reason.LEDGER_UNREACHABLE


def test_when_postgres_admits_the_ledger_is_not_asked(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.sql("UPDATE authority SET authority = 'postgres'")
    assert _why(stage, job).why is Reason.LEDGER_STANDS_BACK


def test_jobs_that_run_or_ended_wait_for_nothing(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=1000)
    assert (_why(stage, job).why, _why(stage, job).worker) == (Reason.RUNS, "a")
    stage.end(job)
    assert (_why(stage, job).why, _why(stage, job).waits) == (Reason.ENDED, False)


def test_a_job_that_has_room_is_about_to_start(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.worker("a", cpus=4000)
    # The books look like this between the release and the fill of another process.
    stage.sql("UPDATE jobs SET state = 'waiting'")
    assert _why(stage, job).why is Reason.ABOUT_TO_START


def test_an_unknown_job_has_no_explanation(stage: Stage) -> None:
    with stage.engine.connect() as connection:
        assert explain(stage.redis, connection, "none") is None


def test_every_reason_has_words(stage: Stage) -> None:
    actual = _why(stage, stage.submit(cpus=1000))
    for why in EXPLAINED:
        explanation = Explanation(
            actual.job,
            actual.state,
            why,
            actual.request,
            declared=True,
            resource="cpus",
            asked=1000,
            free=0,
            worker="a",
        )
        assert re.search(r"(\.|celery -A platform worker( -Q \w+)?)$", render.reasons(explanation)[0])
    assert stage.redis.exists(keys.EPOCH)
