"""Ended jobs go into the archive, once and whole; jobs that have not ended, or that somebody needs, never do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.insert import single
from celery_capacity.routing.inspect import explain, verify
from celery_capacity.routing.model import outbox
from celery_capacity.routing.model.job import NewJob, Publisher
from celery_capacity.routing.model.outbox import UNTOLD, Outbox
from celery_capacity.routing.model.states import FINAL, State, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery.reconcile import reconcile
from celery_capacity.routing.store import archive, job_transitions, queries
from celery_capacity.routing.store.job_transitions import Transition
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.retention import archive as duty
from tests.fixtures.jobs.work import Work
from tests.fixtures.stores.staged import MESSAGE, Stage

#: Seconds for which jobs are kept in most of these tests.
KEEP: Final = 100.0


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    return stage


def move(stage: Stage, most: int = archive.CHUNK) -> int:
    """Move the jobs that have ended, however short ago."""
    with stage.engine.connect() as connection:
        return archive.archive_finished(connection, 0, most)


def ids(stage: Stage, table: str) -> list[str]:
    with stage.engine.connect() as connection:
        return list(connection.execute(text(f"SELECT id FROM {table} ORDER BY id")).scalars())


def done(stage: Stage, outcome: str = "succeeded") -> str:
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job, outcome)
    return job


# -- what moves


@dataclass(frozen=True)
class Kind:
    """A row of any kind.

    `age`: seconds since its end, or since its acceptance where it has none. `attempts`: True for each that has ended.
    """

    state: State
    step: Step
    outbox: bool
    age: int
    attempts: tuple[bool, ...]

    @property
    def is_over(self) -> bool:
        """Return True if the row may move: the rule in other words than those of the statement."""
        goes_on = (State.ACCEPTED, State.SCHEDULED, State.WAITING, State.ADMITTED, State.RUNNING, State.REPLACED)
        needed = self.outbox or self.step is Step.COMMITTED or not all(self.attempts)
        return self.state not in goes_on and self.age >= KEEP and not needed


KINDS: Final = st.builds(
    Kind,
    st.sampled_from(State),
    st.sampled_from(Step),
    st.booleans(),
    st.sampled_from([0, 50, 99, 150, 10_000]),
    st.lists(st.booleans(), max_size=3).map(tuple),
)

_ROW: Final = text("""
INSERT INTO jobs (id, name, state, step, request, shape, queue, message, outbox, submitted_at, finished_at)
VALUES (:id, 'task', :state, :step, '{"slots": 1}', 'slots=1', 'celery', 'x', :outbox,
  now() - make_interval(secs => :age), CASE WHEN :final THEN now() - make_interval(secs => :age) END)
""")
_TRY: Final = text("""
INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, ended_at)
VALUES (:id, 1, :attempt, 'a', 'a-life', CASE WHEN :ended THEN now() END)
""")


@pytest.mark.leaves("I4", because="attempts are made that no worker made; it hangs on the last example", sometimes=True)
@given(kinds=st.lists(KINDS, min_size=1, max_size=12))
@hypothesis_settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exactly_what_is_over_moves_with_its_attempts(engine: Engine, kinds: list[Kind]) -> None:
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE jobs, attempts, jobs_archive, attempts_archive"))
        for number, kind in enumerate(kinds):
            row = {"id": f"j{number}", "state": kind.state.value, "step": kind.step.value, "age": kind.age}
            box = UNTOLD if kind.outbox else None
            connection.execute(_ROW, {**row, "outbox": box, "final": kind.state in FINAL})
            for attempt, ended in enumerate(kind.attempts, 1):
                connection.execute(_TRY, {"id": f"j{number}", "attempt": attempt, "ended": ended})
    over = {f"j{number}": len(kind.attempts) for number, kind in enumerate(kinds) if kind.is_over}
    rest = {f"j{number}": len(kind.attempts) for number, kind in enumerate(kinds) if not kind.is_over}
    with engine.begin() as connection:
        assert archive.archive_finished(connection, KEEP, archive.CHUNK) == len(over)
        assert archive.archive_finished(connection, KEEP, archive.CHUNK) == 0
        live = "SELECT id, (SELECT count(*) FROM attempts WHERE job_id = id) FROM jobs"
        gone = "SELECT id, (SELECT count(*) FROM attempts_archive WHERE job_seq = seq) FROM jobs_archive"
        assert {row[0]: row[1] for row in connection.execute(text(live))} == rest
        assert {row[0]: row[1] for row in connection.execute(text(gone))} == over
        assert connection.execute(text("SELECT count(*) FROM attempts")).scalar_one() == sum(rest.values())
        assert connection.execute(text("SELECT count(*) FROM attempts_archive")).scalar_one() == sum(over.values())


def test_the_archive_has_all_of_a_job_but_its_message(stage: Stage) -> None:
    job = done(stage, "failed")
    with stage.engine.connect() as connection:
        before, why = queries.find(connection, job), explain.explain(stage.redis, connection, job)
        assert move(stage) == 1
        after, why_now = queries.find(connection, job), explain.explain(stage.redis, connection, job)
        columns = connection.execute(text("SELECT * FROM jobs_archive")).keys()
    assert before is not None
    assert after is not None
    assert after.to_json() == before.to_json()
    assert (len(after.attempts), after.job["message_bytes"]) == (1, len(MESSAGE))
    assert why_now == why
    assert not {"message", "successor", "outbox"} & set(columns)


def test_the_oldest_go_first_and_no_more_than_asked_for(stage: Stage) -> None:
    jobs = [done(stage) for _ in range(5)]
    for age, job in zip((30, 10, 50, 20, 40), jobs, strict=True):
        stage.sql("UPDATE jobs SET finished_at = now() - make_interval(secs => :age) WHERE id = :job", age=age, job=job)
    assert move(stage, most=2) == 2
    assert ids(stage, "jobs_archive") == sorted([jobs[2], jobs[4]])


def test_job_with_an_undelivered_outbox_is_not_archived(stage: Stage) -> None:
    job = stage.submit(cpus=9000)
    assert stage.ledger.cancel(job, State.CANCELLED).verdict == "ended"
    stage.apply()
    assert stage.row(job).outbox == UNTOLD
    assert move(stage) == 0
    stage.sql("UPDATE jobs SET outbox = NULL WHERE id = :job", job=job)
    assert move(stage) == 1


# -- at once, and while work goes on


def test_several_at_once_move_each_job_once(stage: Stage) -> None:
    stage.sql(
        "INSERT INTO jobs (id, name, state, step, request, shape, queue, message, finished_at) "
        "SELECT 'j' || n, 'task', 'succeeded', 9, '{}', 'slots=1', 'celery', '', now() FROM generate_series(1, 3000) n"
    )
    stage.sql(
        "INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, ended_at) "
        "SELECT 'j' || n, 1, 1, 'a', 'a-life', now() FROM generate_series(1, 3000) n"
    )

    def all_of_them() -> int:
        moved = 0
        while some := move(stage, most=70):
            moved += some
        return moved

    with ThreadPoolExecutor(4) as threads:
        moved = [run.result() for run in [threads.submit(all_of_them) for _ in range(4)]]
    assert sum(moved) + sum(iter(lambda: move(stage), 0)) == 3000
    with stage.engine.connect() as connection:
        for table in ("jobs_archive", "attempts_archive"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 3000
        for table in ("jobs", "attempts"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 0


def test_work_goes_on_beside_it_and_nothing_is_lost_or_taken_for_drift(engine: Engine, settings: Settings) -> None:
    """Every job that ends moves at once, while others are submitted, run, fail, go back and are lost."""
    stage = Stage(engine, settings)
    for worker in ("a", "b", "c"):
        stage.worker(worker, cpus=4000, slots=3)
    enough = threading.Event()
    work = [Work(stage.engine, settings, number) for number in range(2)]
    moved, kinds = 0, []
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(driver, enough) for driver in work]
        try:
            while (moved <= 50 or sum(driver.done for driver in work) < 600) and not any(run.done() for run in running):
                moved += move(stage, most=40)
                kinds.append(reconcile(stage.engine, stage.ledger).to_json()["kinds"])
        finally:
            enough.set()
        for run in running:
            run.result()
    stage.apply()
    assert [kind for kind in kinds if kind] == []
    live, gone = ids(stage, "jobs"), ids(stage, "jobs_archive")
    assert sorted(live + gone) == sorted(f"{driver.prefix}{n}" for driver in work for n in range(1, driver.done + 1))
    with stage.engine.connect() as connection:
        orphans = "SELECT count(*) FROM attempts WHERE job_id NOT IN (SELECT id FROM jobs)"
        assert connection.execute(text(orphans)).scalar_one() == 0
        states = connection.execute(text("SELECT DISTINCT state FROM jobs_archive")).scalars().all()
    assert set(states) <= {state.value for state in FINAL}
    assert verify.check(stage.engine, stage.redis, patience=0.2).lines() == []
    stage.close()


# -- who comes later


def publish(stage: Stage, job: str, by: Publisher | None = None) -> int | None:
    with stage.engine.connect() as connection:
        return single.insert_job(connection, NewJob(job, "task", "cpus=1000,slots=1", MESSAGE), by).seq


def test_a_publish_under_the_id_of_an_archived_job_is_a_new_job(stage: Stage) -> None:
    job = done(stage)
    assert publish(stage, job) is None
    assert move(stage) == 1
    assert publish(stage, job) is not None
    assert (stage.row(job).state, stage.row(job).attempt) == ("accepted", 0)
    with stage.engine.connect() as connection:
        record = queries.find(connection, job)
        assert record is not None
        assert (record.job["state"], record.attempts) == ("accepted", [])
    stage.sql("UPDATE jobs SET state = 'expired', step = 12, finished_at = now() WHERE id = :job", job=job)
    assert move(stage) == 1
    assert ids(stage, "jobs_archive") == [job, job]
    with stage.engine.connect() as connection:
        record = queries.find(connection, job)
        assert record is not None
        assert (record.job["state"], record.attempts) == ("expired", [])


def test_an_attempt_of_an_archived_job_publishes_nothing(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    speaker = Publisher(job, Token(1, 1), "a-life")
    assert publish(stage, "child", speaker) is not None
    stage.end(job)
    assert move(stage) == 1
    for attempt in (1, 2):
        stale = Publisher(job, Token(1, attempt), "a-life")
        assert publish(stage, "late-child", stale) is None
        with stage.engine.connect() as connection:
            assert not single.may_publish(connection, stale)
    assert ids(stage, "jobs") == ["child"]


def test_late_transition_of_an_archived_job_changes_nothing(stage: Stage) -> None:
    job = done(stage)
    assert move(stage) == 1
    left = Outbox(publishes=[NewJob("late-child", "task", "slots=1", MESSAGE)]).to_text()
    common: dict[str, Any] = {"worker": "a", "incarnation": "a-life", "admitted_ms": 1, "started_ms": 1, "at_ms": 2}
    late = [
        Transition(job, Token(1, 1), "running", Step.RUNNING, losses=0, **common),
        Transition(job, Token(2, 2), "failed", Step.ENDED, losses=0, outcome="failed", outbox=left, **common),
    ]
    assert outbox.publishes(left)
    with stage.engine.connect() as connection:
        assert job_transitions.apply(connection, late) == []
        assert connection.execute(text("SELECT count(*) FROM attempts")).scalar_one() == 0
    assert ids(stage, "jobs") == []


def test_archived_job_is_removed_from_a_ledger_that_still_has_it(stage: Stage) -> None:
    """Redis came back with old books, for example."""
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.sql("UPDATE attempts SET ended_at = now(), outcome = 'succeeded' WHERE job_id = :job", job=job)
    stage.sql("UPDATE jobs SET state = 'succeeded', step = 9, finished_at = now() WHERE id = :job", job=job)
    assert move(stage) == 1
    report = reconcile(stage.engine, stage.ledger)
    assert report.to_json()["kinds"] == {"missing in Postgres, running in the ledger": 1}
    assert report.all_repaired
    assert verify.check(stage.engine, stage.redis, at_rest=True, patience=0.2).lines() == []


# -- the duty


@pytest.fixture
def stores(settings: Settings, platform_environment: dict[str, str]) -> Iterator[Any]:
    """Yield `stores(keep)`, which returns the stores of a process with this setting."""
    made: list[Stores] = []

    def make(keep: str) -> Stores:
        kept = Settings.from_environ({**platform_environment, "PLATFORM_KEEP_FINISHED": keep})
        made.append(Stores(lambda _: kept))
        return made[-1]

    yield make
    for opened in made:
        opened.engine.dispose()


@pytest.mark.parametrize(("keep", "moved"), [("2592000", 0), ("0", 0), ("0.001", 1)])
def test_the_duty_keeps_jobs_for_as_long_as_the_setting_says(stage: Stage, stores: Any, keep: str, moved: int) -> None:
    job = done(stage)
    stage.sql("UPDATE jobs SET finished_at = now() - interval '29 days' WHERE id = :job", job=job)
    app: Any = None  # The duty has no use for an app
    assert duty.run_once(app, stores(keep))["archived"] == moved
    assert duty.run_once(app, stores(keep))["archived"] == 0


def test_one_pass_of_the_duty_is_bounded(stage: Stage, stores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(7):
        done(stage)
    stage.sql("UPDATE jobs SET finished_at = now() - interval '1 day'")
    monkeypatch.setattr(duty, "MAX_SHARE", 0.0)
    monkeypatch.setattr(archive, "CHUNK", 2)
    app: Any = None
    assert [duty.run_once(app, stores("1"))["archived"] for _ in range(5)] == [2, 2, 2, 1, 0]


def test_one_pass_of_the_duty_moves_all_that_it_has_time_for(
    stage: Stage, stores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(25):
        done(stage)
    stage.sql("UPDATE jobs SET finished_at = now() - interval '1 day'")
    monkeypatch.setattr(duty, "MAX_SHARE", 10.0)
    monkeypatch.setattr(archive, "CHUNK", 2)
    app: Any = None
    assert duty.run_once(app, stores("1"))["archived"] == 25
