"""The reason why a job waits: the policy's reason over the current books, and the details from the stores."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import redis

from celery_capacity.platform.console import render, terminal
from celery_capacity.platform.console.wording import details
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.inspect.explanation import Explanation
from celery_capacity.routing.inspect.overview import from_ledger
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.model.reasons import EXPLAINED, Reason
from celery_capacity.routing.policy.missing import Unblocking
from celery_capacity.routing.policy.pauses import Scope
from celery_capacity.routing.recovery import controls
from celery_capacity.routing.store import controls as stored
from celery_capacity.workers.process.stores import transactions
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


def test_job_that_outlives_each_worker_says_how_long_they_live(stage: Stage) -> None:
    hour = 3_600_000
    stage.worker("a", cpus=4000, left_ms=hour // 2)
    stage.worker("b", cpus=4000, left_ms=hour // 4)
    explanation = _why(stage, stage.submit(cpus=1000, run_time=RunTime(hour, hour)))
    assert (explanation.why, explanation.worker) == (Reason.NO_TIME, "a")
    assert "No worker that it fits lives long enough: it may run for 1 h 4 min, and a, which" in _words(explanation)
    stage.worker("c", cpus=500)
    stage.worker("d", cpus=1000, left_ms=2 * hour)
    assert _why(stage, "job-1").worker == "d"


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
    assert "number 3 of the jobs with this request; 3 jobs would start before it" in _words(explanation)
    assert (_why(stage, urgent).place, _why(stage, urgent).before) == (1, 0)


def test_explain_counts_no_job_before_it_that_could_never_start(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000)
    for _ in range(3):
        stage.submit(cpus=9000)
    stage.submit(cpus=2000, licence=1)
    stage.submit(cpus=3000)
    explanation = _why(stage, stage.submit(cpus=2000))
    assert (explanation.before, explanation.position) == (5, 1)
    assert "1 job would start before it." in _words(explanation)


def test_explain_lists_what_each_worker_lacks_the_closest_first(stage: Stage) -> None:
    for name, cpus, memory in (("a", 4000, 2**30), ("b", 16_000, 2**33), ("c", 16_000, 2**33)):
        stage.worker(name, cpus=cpus, memory=memory)
    for worker, cpus in (("b", 10_000), ("c", 14_000)):
        assert stage.row(stage.submit(cpus=cpus, memory=2**31)).worker == worker
    assert stage.row(stage.submit(cpus=3000)).worker == "a"
    explanation = _why(stage, stage.submit(cpus=8000, memory=2**31))
    assert [line.worker for line in explanation.missing] == ["b", "c", "a"]
    assert details(explanation)[:3] == [
        "On b: 6 of 16 CPUs free, memory enough.",
        "On c: 2 of 16 CPUs free, memory enough.",
        "On a: 1 of 4 CPUs free, 1 GiB of 1 GiB memory free.",
    ]
    assert explanation.to_json()["missing"][0] == {
        "worker": "b",
        "admits": True,
        "alone": False,
        "resources": [
            {"resource": "cpus", "asked": 8, "free": 6, "total": 16},
            {"resource": "memory", "asked": 2**31, "free": 2**33 - 2**31, "total": 2**33},
            {"resource": "slots", "asked": 1, "free": 99, "total": 100},
        ],
    }


def test_explain_shows_the_closest_workers_and_counts_the_others(stage: Stage) -> None:
    for number in range(8):
        stage.worker(f"w{number}", cpus=4000)
    for _ in range(8):
        stage.submit(cpus=3000)
    explanation = _why(stage, stage.submit(cpus=4000))
    assert (len(explanation.missing), explanation.more_missing) == (5, 3)
    assert "3 more workers lack room too." in details(explanation)


def test_explain_names_the_running_jobs_whose_ends_make_room(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=8000)
    first, two, three, four = (stage.submit(cpus=cpus) for cpus in (4000, 2000, 2000, 4000))
    assert [stage.row(job).worker for job in (first, two, three, four)] == ["a", "b", "b", "b"]
    explanation = _why(stage, stage.submit(cpus=4000))
    assert explanation.unblocked_by == Unblocking("a", (first,))
    assert details(explanation)[-1] == f"The end of job {first} on a would make room for it."
    explanation = _why(stage, stage.submit(cpus=6000))
    assert explanation.unblocked_by == Unblocking("b", (two, four))
    assert details(explanation)[-1] == f"The ends of the jobs {two} and {four} on b would make room for it."
    assert explanation.to_json()["unblocked_by"] == {"worker": "b", "jobs": (two, four)}


def test_explain_names_a_draining_worker_that_is_large_enough(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=16_000)
    stage.ledger.drain("b", "b-life")
    explanation = _why(stage, stage.submit(cpus=9000))
    assert (explanation.why, explanation.worker) == (Reason.NO_WORKER, "b")
    assert "The workers that are large enough admit no jobs now, such as b." in _words(explanation)
    assert details(explanation) == ["On a: 4 of 4 CPUs free.", "On b: it admits no jobs now."]


def test_silent_worker_counts_as_registered_until_it_is_lost(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=16_000)
    stage.ledger.expire_lease("b", "b-life")
    stage.ledger.lapse("b", 10**6, 3, most=0)
    job = stage.submit(cpus=9000)
    assert (_why(stage, job).why, _why(stage, job).worker) == (Reason.NO_WORKER, "b")
    assert from_ledger(stage.redis).backlog[0].blocked is None
    stage.ledger.lapse("b", 0, 3)
    assert _why(stage, job).why is Reason.TOO_LARGE
    assert from_ledger(stage.redis).backlog[0].blocked is Reason.TOO_LARGE


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
    assert "has to run alone on a worker, and none that it fits is empty. a takes nothing else" in _words(explanation)
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
    assert terminal.moment(due) in _words(explanation)


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


HOUR = 3_600_000


def test_paused_jobs_are_not_among_those_that_start_before(stage: Stage) -> None:
    stage.worker("a", cpus=4000, queues=("celery", "mail"))
    in_mail: Any = {"queue:mail": 1}
    stage.submit(cpus=4000)
    stage.submit(cpus=1000, **in_mail)
    stage.submit(cpus=1000)
    job = stage.submit(cpus=2000)
    assert (_why(stage, job).before, _why(stage, job).position) == (2, 2)
    with transactions(stage.engine).begin() as connection:
        stored.pause(connection, Scope.of(queue="mail"), "ann@desk", None)
    controls.level(stage.engine, stage.ledger)
    assert (_why(stage, job).before, _why(stage, job).position) == (2, 1)


def test_worker_that_ends_too_early_makes_no_room_for_a_job(stage: Stage) -> None:
    stage.worker("a", cpus=4000, left_ms=HOUR // 2)
    stage.worker("b", cpus=4000)
    first, second = stage.submit(cpus=4000), stage.submit(cpus=4000)
    assert [stage.row(job).worker for job in (first, second)] == ["a", "b"]
    explanation = _why(stage, stage.submit(cpus=4000, run_time=RunTime(HOUR, HOUR)))
    assert (explanation.why, explanation.worker) == (Reason.NO_ROOM, "b")
    assert [line.worker for line in explanation.missing] == ["b"]
    assert explanation.unblocked_by == Unblocking("b", (second,))


def test_cordon_is_the_reason_where_the_other_workers_end_too_early(stage: Stage) -> None:
    stage.worker("a", cpus=4000, left_ms=HOUR // 2)
    stage.worker("b", cpus=4000)
    with transactions(stage.engine).begin() as connection:
        stored.cordon(connection, ["b"], "ann@desk", None)
    controls.level(stage.engine, stage.ledger)
    explanation = _why(stage, stage.submit(cpus=1000, run_time=RunTime(HOUR, HOUR)))
    assert (explanation.why, explanation.worker) == (Reason.CORDONED, "b")


def test_place_counts_jobs_of_the_request_with_any_run_time(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000)
    for minutes in (1, 2):
        stage.submit(cpus=2000, run_time=RunTime(minutes * 60_000, minutes * 60_000))
    explanation = _why(stage, stage.submit(cpus=2000, run_time=RunTime(HOUR, HOUR)))
    assert (explanation.place, explanation.before) == (3, 2)
