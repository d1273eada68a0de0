"""The duty that raises the priority of jobs by the time that they wait, whichever store decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_capacity.routing.database import ageing as table
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import PlaceVerdict
from celery_capacity.routing.policy.placement import TOP_PRIORITY
from celery_capacity.workers.client.priorities import set_priority
from celery_capacity.workers.duties import ageing
from celery_capacity.workers.process.stores import transactions
from tests.fixtures.stores.authorities import Authority

#: Seconds for a step.
STEP = 1000.0


@pytest.fixture
def ageing_cluster(authority: Authority) -> Authority:
    """Return a cluster in which jobs age, with a full worker of one CPU."""
    authority.stores._made["settings"] = replace(authority.stores.settings, ageing=STEP)
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    assert authority.starts("a") == [job]
    duty(authority)
    return authority


def duty(cluster: Authority) -> int:
    run = ageing.run_once if cluster.name == "ledger" else ageing.without_ledger
    return run(cluster.app, cluster.stores)["raised"]


def note(cluster: Authority) -> None:
    """Let enough time pass that the duty notes the jobs which were submitted until now. They age from here."""
    pass_time(cluster, STEP / table.MARKS)
    duty(cluster)


def pass_time(cluster: Authority, seconds: float) -> None:
    """Let everything that was noted lie so many seconds further back."""
    cluster.stage.apply()
    for column in ("ageing.since", "ageing.due_at", "ageing_marks.at", "jobs.due_at"):
        name, _, of = column.partition(".")
        # The time of a mark is its key, and moves by itself.
        cluster.stage.sql(f"UPDATE {name} SET {of} = {of} - make_interval(secs => :by)", by=seconds)


def priorities(cluster: Authority, *jobs: str) -> list[int]:
    return [cluster.row(job).priority for job in jobs]


def ends(cluster: Authority) -> list[str]:
    """Let the running job end; return what starts then."""
    with cluster.stage.engine.connect() as connection:
        running = connection.exec_driver_sql("SELECT id FROM jobs WHERE state = 'running'").scalar_one()
    assert cluster.end(running) == "released"
    return cluster.starts("a")


def test_job_gains_a_step_in_each_time_and_starts_before_a_later_one(ageing_cluster: Authority) -> None:
    low = ageing_cluster.submit(cpus=1000)
    note(ageing_cluster)
    pass_time(ageing_cluster, STEP * 0.5)
    assert (duty(ageing_cluster), priorities(ageing_cluster, low)) == (0, [0])
    pass_time(ageing_cluster, STEP * 0.6)
    assert (duty(ageing_cluster), priorities(ageing_cluster, low)) == (1, [1])
    assert duty(ageing_cluster) == 0
    same, high = ageing_cluster.submit(cpus=1000, priority=1), ageing_cluster.submit(cpus=1000, priority=2)
    assert [ends(ageing_cluster), ends(ageing_cluster), ends(ageing_cluster)] == [[high], [low], [same]]
    ends(ageing_cluster)


def test_job_ages_up_to_the_highest_priority(ageing_cluster: Authority) -> None:
    jobs = [ageing_cluster.submit(cpus=1000, priority=priority) for priority in (0, 5, TOP_PRIORITY)]
    note(ageing_cluster)
    for _ in range(TOP_PRIORITY + 2):
        pass_time(ageing_cluster, STEP)
        duty(ageing_cluster)
    assert priorities(ageing_cluster, *jobs) == [TOP_PRIORITY] * 3
    ageing_cluster.revoke(jobs[2])
    assert [ends(ageing_cluster), ends(ageing_cluster)] == [[jobs[0]], [jobs[1]]]
    ends(ageing_cluster)


def test_job_with_an_eta_ages_from_the_time_at_which_it_is_due(ageing_cluster: Authority) -> None:
    job = ageing_cluster.submit(cpus=1000, due_in=3600)
    pass_time(ageing_cluster, STEP * 3)
    assert (duty(ageing_cluster), priorities(ageing_cluster, job)) == (0, [0])
    ageing_cluster.make_due(job)
    ageing_cluster.duty()
    assert duty(ageing_cluster) == 0
    pass_time(ageing_cluster, STEP)
    assert (duty(ageing_cluster), priorities(ageing_cluster, job)) == (1, [1])
    assert ends(ageing_cluster) == [job]
    ends(ageing_cluster)


def test_pass_after_a_long_pause_gives_all_steps_at_once(ageing_cluster: Authority) -> None:
    jobs = [ageing_cluster.submit(cpus=1000, priority=priority) for priority in (0, 1)]
    note(ageing_cluster)
    pass_time(ageing_cluster, STEP * 3)
    assert (duty(ageing_cluster), priorities(ageing_cluster, *jobs)) == (6, [3, 4])


def test_more_jobs_than_a_statement_raises_all_gain_a_step(
    ageing_cluster: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "CHUNK", 3)
    for name in ("_SUBMITTED", "_WERE_DUE"):
        statement = getattr(table, name)
        monkeypatch.setattr(table, name, type(statement)(statement.text.replace("500", "3")))
    jobs = [ageing_cluster.submit(cpus=1000, priority=number % 3) for number in range(10)]
    due = [ageing_cluster.submit(cpus=1000, due_in=3600) for _ in range(7)]
    for job in due:
        ageing_cluster.make_due(job)
    ageing_cluster.duty()
    note(ageing_cluster)
    pass_time(ageing_cluster, STEP)
    assert duty(ageing_cluster) == len(jobs) + len(due)
    assert priorities(ageing_cluster, *jobs, *due) == [number % 3 + 1 for number in range(10)] + [1] * 7


def test_operators_priority_ages_on(ageing_cluster: Authority) -> None:
    job = ageing_cluster.submit(cpus=1000)
    note(ageing_cluster)
    pass_time(ageing_cluster, STEP)
    duty(ageing_cluster)
    set_priority(ageing_cluster.stores, [job], 4)
    pass_time(ageing_cluster, STEP)
    assert (duty(ageing_cluster), priorities(ageing_cluster, job)) == (1, [5])


def test_second_runner_gives_no_step_twice(ageing_cluster: Authority) -> None:
    jobs = [ageing_cluster.submit(cpus=1000), ageing_cluster.submit(cpus=1000, due_in=3600)]
    ageing_cluster.make_due(jobs[1])
    ageing_cluster.duty()
    note(ageing_cluster)
    pass_time(ageing_cluster, STEP)
    with transactions(ageing_cluster.stores.engine).begin() as connection:
        steps = table.begun_steps(connection)
    assert duty(ageing_cluster) == 2
    for begun in steps:
        step: table.Step | None = begun
        while step is not None:
            with transactions(ageing_cluster.stores.engine).begin() as connection:
                raised, step = table.raise_next(connection, step)
            assert raised == []
    assert (duty(ageing_cluster), priorities(ageing_cluster, *jobs)) == (0, [1, 1])


def test_operators_priority_holds_that_comes_while_a_job_is_moved(
    ageing_cluster: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ageing_cluster.submit(cpus=1000)
    note(ageing_cluster)
    pass_time(ageing_cluster, STEP)
    move, calls = Ledger.reprioritize, list[int]()

    def late(ledger: Ledger, jobs: Sequence[tuple[str, int, str]]) -> list[PlaceVerdict]:
        calls.append(len(jobs))
        if len(calls) == 1:
            set_priority(ageing_cluster.stores, [job], 8)
        return move(ledger, jobs)

    monkeypatch.setattr(Ledger, "reprioritize", late)
    assert duty(ageing_cluster) == 1
    if not calls:
        set_priority(ageing_cluster.stores, [job], 8)
    other = ageing_cluster.submit(cpus=1000, priority=7)
    assert [ends(ageing_cluster), ends(ageing_cluster)] == [[job], [other]]
    ends(ageing_cluster)


def test_job_that_waits_again_after_a_long_attempt_ages_from_then(ageing_cluster: Authority) -> None:
    job = ageing_cluster.submit(cpus=1000)
    assert ends(ageing_cluster) == [job]
    note(ageing_cluster)
    pass_time(ageing_cluster, STEP * (TOP_PRIORITY + 1))
    ageing_cluster.stage.sql("UPDATE jobs SET admitted_at = admitted_at - make_interval(secs => 5000)")
    duty(ageing_cluster)
    ageing_cluster.lose("a")
    assert (ageing_cluster.waits(job), priorities(ageing_cluster, job)) == (True, [0])
    assert duty(ageing_cluster) == 0
    pass_time(ageing_cluster, STEP)
    assert (duty(ageing_cluster), priorities(ageing_cluster, job)) == (1, [1])


def test_other_setting_starts_the_ages_anew(ageing_cluster: Authority) -> None:
    job = ageing_cluster.submit(cpus=1000)
    note(ageing_cluster)
    pass_time(ageing_cluster, STEP * 2.5)
    assert (duty(ageing_cluster), priorities(ageing_cluster, job)) == (2, [2])
    ageing_cluster.stores._made["settings"] = replace(ageing_cluster.stores.settings, ageing=STEP / 10)
    assert (duty(ageing_cluster), priorities(ageing_cluster, job)) == (0, [2])
    pass_time(ageing_cluster, STEP / 10)
    assert (duty(ageing_cluster), priorities(ageing_cluster, job)) == (1, [3])


def test_ageing_turned_off_and_on_again_starts_the_ages_anew(ageing_cluster: Authority) -> None:
    job = ageing_cluster.submit(cpus=1000)
    note(ageing_cluster)
    made = ageing_cluster.stores._made
    for seconds in (0.0, STEP):
        made["settings"] = replace(ageing_cluster.stores.settings, ageing=seconds)
        pass_time(ageing_cluster, STEP)
        run = ageing.run_once if ageing_cluster.name == "ledger" else ageing.without_ledger
        run(ageing_cluster.app, ageing_cluster.stores)
    assert priorities(ageing_cluster, job) == [0]
    pass_time(ageing_cluster, STEP)
    assert (duty(ageing_cluster), priorities(ageing_cluster, job)) == (1, [1])


def test_without_the_setting_nothing_is_noted_or_raised(authority: Authority) -> None:
    run = ageing.run_once if authority.name == "ledger" else ageing.without_ledger
    authority.submit(cpus=1000)
    assert run(authority.app, authority.stores) == {}
    with authority.stage.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM ageing").scalar_one() == 0


#: Events: a job of a priority comes, or so many quarters of a step pass.
EVENTS = st.lists(
    st.one_of(st.tuples(st.just("job"), st.integers(0, TOP_PRIORITY)), st.tuples(st.just("time"), st.integers(1, 20))),
    max_size=12,
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS)
def test_each_job_has_the_steps_of_the_time_for_which_it_waited(
    ageing_cluster: Authority, events: list[tuple[str, int]]
) -> None:
    for table_name in ("ageing", "ageing_marks"):
        ageing_cluster.stage.sql(f"DELETE FROM {table_name}")
    now, jobs = 0.0, dict[str, tuple[int, float]]()
    duty(ageing_cluster)
    for what, number in events:
        if what == "job":
            # The job is noted a tenth of a step later, and ages from there.
            jobs[ageing_cluster.submit(cpus=1000, priority=number)] = number, now + STEP / table.MARKS
        else:
            note(ageing_cluster)
            now += STEP / table.MARKS
            pass_time(ageing_cluster, STEP * number / 4)
            now += STEP * number / 4
            duty(ageing_cluster)
    expected = {
        job: min(TOP_PRIORITY, priority + table.steps_gained(max(0.0, now - since), STEP))
        for job, (priority, since) in jobs.items()
    }
    assert dict(zip(jobs, priorities(ageing_cluster, *jobs), strict=True)) == expected
    for job in jobs:
        ageing_cluster.revoke(job)


@pytest.mark.parametrize(
    ("waited", "seconds", "steps"), [(0, 60, 0), (59, 60, 0), (60, 60, 1), (9e9, 60, 9), (9, 0, 0)]
)
def test_steps_gained_are_whole_and_bounded(waited: float, seconds: float, steps: int) -> None:
    assert table.steps_gained(waited, seconds) == steps
