"""Each kind of damage to the ledger is found, named and repaired; work that goes on is never taken for damage."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from sqlalchemy import Engine, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect import verify
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Adopted, Arrived, LedgerClosed
from celery_capacity.routing.model.request import Request, alternatives_term, filed_shape
from celery_capacity.routing.model.states import State
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.recovery import resubmit, transition_log
from celery_capacity.routing.recovery.drift import Reconciled
from celery_capacity.routing.recovery.reconcile import reconcile
from celery_capacity.routing.recovery.reconcile_indexes import CHUNK
from celery_capacity.routing.store import backlog
from tests.fixtures.jobs.work import Work
from tests.fixtures.stores import damage
from tests.fixtures.stores.damage import DAMAGES, Scene
from tests.fixtures.stores.staged import MESSAGE, MOST_LOSSES, Stage

#: Seconds for which a violation must stay. Nothing else moves when the test looks for it.
BRIEFLY: Final = 0.2


@pytest.fixture
def scene(engine: Engine, settings: Settings) -> Iterator[Scene]:
    stage = Stage(engine, settings)
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=3000, licence=3)
    done = stage.submit(cpus=4000)
    stage.start(done)
    stage.end(done)
    running = stage.submit(cpus=4000 - 500)
    stage.start(running)
    other = stage.submit(cpus=2000)
    stage.start(other)
    admitted = stage.submit(cpus=500)
    wide, wide_too = stage.submit(cpus=9000), stage.submit(cpus=9000)
    slim = stage.submit(cpus=3500)
    later = stage.insert({"cpus": 1000}, due_at=datetime.now(UTC) + timedelta(hours=1))
    scene = Scene(stage, running, admitted, other, wide, wide_too, slim, later, done)
    assert stage.row(running).worker == stage.row(admitted).worker == "a"
    assert reconcile(stage.engine, stage.ledger).to_json()["kinds"] == {}
    yield scene
    stage.close()


def check(scene: Scene) -> list[str]:
    return verify.check(scene.stage.engine, scene.redis, patience=BRIEFLY).lines()


def finish(scene: Scene) -> None:
    """Run every job that can run to its end, and cancel the others.

    Jobs that are not due are not waited for.
    """
    stage = scene.stage
    # Do the work of the heartbeats: a worker with a closed book registers again.
    for worker, cpus in (("a", 4000), ("b", 3000)):
        stage.worker(worker, cpus=cpus)
    stage.sql("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE state = 'scheduled'")
    for _ in range(20):
        stage.apply()
        with stage.engine.connect() as connection:
            resubmit.submit_rows(stage.ledger, backlog.stranded(connection, -1.0, 1000))
            stage.apply()
            rows = connection.execute(
                text("SELECT id, state FROM jobs WHERE state IN ('waiting', 'admitted', 'running') ORDER BY seq")
            ).all()
        if not rows:
            return
        for job, state in rows:
            if state == "admitted":
                stage.start(job)
            elif state == "running":
                stage.end(job)
        if all(state == "waiting" for _, state in rows):
            for job, _ in rows:
                assert stage.ledger.cancel(job, State.CANCELLED).verdict == "ended"
    raise AssertionError(f"these did not end: {rows}")


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_repaired(scene: Scene, name: str) -> None:
    done, kind = DAMAGES[name]
    done(scene)
    first = reconcile(scene.stage.engine, scene.stage.ledger)
    assert kind in first.found, first.to_json()
    assert first.all_repaired, (first.found, first.repaired)
    transition_log.apply_all(scene.stage.engine, scene.stage.ledger)
    assert check(scene) == []
    second = reconcile(scene.stage.engine, scene.stage.ledger)
    assert second.to_json()["kinds"] == {}
    assert int(scene.redis.hget(keys.COUNTERS, "drift")) >= first.drift
    finish(scene)
    report = verify.check(scene.stage.engine, scene.redis, at_rest=True, patience=BRIEFLY)
    assert report.lines() == []


def test_nothing_is_found_where_nothing_is_wrong(scene: Scene) -> None:
    assert check(scene) == []
    report = reconcile(scene.stage.engine, scene.stage.ledger)
    assert (report.drift, report.checked) == (0, 6)
    finish(scene)
    report = reconcile(scene.stage.engine, scene.stage.ledger)
    assert (report.drift, report.checked) == (0, 0)


def test_unapplied_stream_entry_is_applied_and_is_no_drift(scene: Scene) -> None:
    scene.stage.submit(cpus=1000, applied=False)
    scene.stage.end(scene.other, applied=False)
    report = reconcile(scene.stage.engine, scene.stage.ledger)
    assert (report.applied, report.drift) == (2, 0)


def test_the_outcome_that_was_lost_with_the_stream_is_still_written(scene: Scene) -> None:
    scene.stage.end(scene.other, "failed", applied=False)
    scene.redis.delete(keys.STREAM)
    reconcile(scene.stage.engine, scene.stage.ledger)
    row = scene.stage.row(scene.other)
    assert (row.state, row.worker, row.attempt) == ("failed", "b", 1)


def test_a_running_job_keeps_its_attempt_when_only_its_places_were_lost(scene: Scene) -> None:
    scene.redis.delete(keys.held("a"))
    reconcile(scene.stage.engine, scene.stage.ledger)
    assert scene.redis.hgetall(keys.held("a")) == {
        scene.running.encode(): b"1.1",
        scene.admitted.encode(): b"1.1",
    }
    scene.stage.start(scene.admitted)
    scene.stage.end(scene.running)


def test_running_job_keeps_its_attempt_when_its_book_was_lost_too(scene: Scene) -> None:
    """Its worker lives, and registers again at its next heartbeat: a reconcile that comes before it takes nothing."""
    stage = scene.stage
    scene.redis.delete(keys.book("b"), keys.held("b"), keys.job(scene.other))
    assert reconcile(stage.engine, stage.ledger).all_repaired
    assert scene.redis.hget(keys.book("b"), "status") == b"closed"
    assert (stage.row(scene.other).state, stage.row(scene.other).attempt) == ("running", 1)
    stage.worker("b", cpus=3000)
    assert check(scene) == []
    stage.end(scene.other)
    assert (stage.row(scene.other).state, stage.row(scene.other).attempt) == ("succeeded", 1)


def test_a_running_job_of_a_worker_that_left_is_submitted_again(scene: Scene) -> None:
    stage = scene.stage
    scene.redis.delete(keys.book("b"), keys.held("b"), keys.job(scene.other))
    stage.sql("UPDATE workers SET status = 'left' WHERE name = 'b'")
    assert reconcile(stage.engine, stage.ledger).all_repaired
    stage.apply()
    assert (stage.row(scene.other).state, stage.row(scene.other).worker) == ("waiting", None)
    assert not scene.redis.exists(keys.book("b"))


#: A job that runs on a GPU, or on two CPUs.
ON_GPU: Final = Request.of({"cpus": 1000, "gpus": 1})
GPU_OR_CPUS: Final = alternatives_term([ON_GPU, Request.of({"cpus": 2000})])
TWO_CPUS: Final = f"cpus=2000,slots=1,|2{GPU_OR_CPUS[1:]}"


def _take_second_alternative(stage: Stage, *, applied: bool = True) -> str:
    stage.worker("a", cpus=2000)
    return stage.submit(place=GPU_OR_CPUS, applied=applied, cpus=1000, gpus=1)


@pytest.mark.parametrize("running", [False, True])
def test_held_alternative_reaches_the_row_though_its_entry_is_lost(stage: Stage, running: bool) -> None:
    job = _take_second_alternative(stage, applied=False)
    if running:
        arrived = [Arrived(job, Token(stage.ledger.epoch, 1), "nonce")]
        assert stage.ledger.settle("a", "a-life", arrived=arrived, most_losses=MOST_LOSSES).claimed[0].ok
    stage.redis.delete(keys.STREAM)
    reconcile(stage.engine, stage.ledger)
    row = stage.row(job)
    assert (row.state, row.shape) == ("running" if running else "admitted", TWO_CPUS)
    assert row.request == {"cpus": 2, "slots": 1}
    assert verify.check(stage.engine, stage.redis, patience=BRIEFLY).lines() == []
    stage.end(job)
    assert stage.row(job).shape == TWO_CPUS


def test_running_job_keeps_its_alternative_when_its_key_was_lost(stage: Stage) -> None:
    job = _take_second_alternative(stage)
    stage.start(job)
    stage.redis.delete(keys.job(job), keys.held("a"), keys.book("a"))
    assert reconcile(stage.engine, stage.ledger).all_repaired
    assert snapshot.read_books(stage.redis, ["a"])["a"].allocated["cpus"] == 2000
    assert verify.check(stage.engine, stage.redis, patience=BRIEFLY).lines() == []
    stage.worker("a", cpus=2000)
    stage.end(job)
    assert stage.row(job).state == "succeeded"


def test_admitted_job_waits_for_all_alternatives_when_its_key_was_lost(stage: Stage) -> None:
    job = _take_second_alternative(stage)
    stage.redis.delete(keys.job(job))
    reconcile(stage.engine, stage.ledger)
    stage.apply()
    row = stage.row(job)
    assert (row.attempt, row.shape) == (2, TWO_CPUS)
    assert verify.check(stage.engine, stage.redis, patience=BRIEFLY).lines() == []


def test_a_repair_admits_what_fits_now(scene: Scene) -> None:
    damage.a_running_job_has_ended_in_postgres(scene)
    reconcile(scene.stage.engine, scene.stage.ledger)
    scene.stage.apply()
    assert (scene.stage.row(scene.slim).state, scene.stage.row(scene.slim).worker) == ("admitted", "a")


def test_several_kinds_of_damage_at_once_are_all_repaired(scene: Scene) -> None:
    damage.the_list_of_a_worker_is_deleted(scene)
    damage.all_that_is_known_of_a_waiting_job_is_deleted(scene)
    damage.the_sum_of_the_allocated_cpus_is_wrong(scene)
    damage.a_job_that_nobody_knows_waits(scene)
    damage.all_that_is_known_of_a_running_job_is_deleted(scene)
    damage.the_stream_is_lost_with_a_claim(scene)
    first = reconcile(scene.stage.engine, scene.stage.ledger)
    assert first.all_repaired
    assert first.drift >= 6
    transition_log.apply_all(scene.stage.engine, scene.stage.ledger)
    assert check(scene) == []
    assert reconcile(scene.stage.engine, scene.stage.ledger).drift == 0


@pytest.mark.long
def test_damage_is_found_wherever_it_is_in_a_backlog_of_many_chunks(scene: Scene) -> None:
    stage, many = scene.stage, 2 * CHUNK + 300
    request = Request.of({"cpus": 9500})
    jobs = [stage.insert({"cpus": 9500}) for _ in range(many)]
    shape = filed_shape(request.shape, stage.row(jobs[0]).name)
    rows = [(job, shape, order(0, stage.row(job).seq), MESSAGE, 0, 0, 0) for job in jobs]
    assert stage.ledger.submit_many(rows) == many
    stage.apply()
    queue, first, last = keys.wait(shape), rows[0][2], rows[-1][2]
    for number in range(CHUNK + 7):
        scene.redis.zadd(queue, {f"first-{number}": first - 1, f"last-{number}": last + 1 + number})
    spread = range(0, many, 99)
    for number in spread:
        scene.redis.delete(keys.job(jobs[number]))
    for number in spread:
        scene.redis.zadd(queue, {f"between-{number}": rows[number][2]})
        scene.redis.zrem(queue, jobs[number + 1])
    report = reconcile(stage.engine, stage.ledger)
    assert report.to_json()["kinds"] == {
        "a place without its waiting job": 2 * (CHUNK + 7) + len(spread),
        "waiting in Postgres, missing in the ledger": len(spread),
        "waiting without its place": len(spread),
    }
    assert (report.all_repaired, report.checked) == (True, many + 6)
    stage.apply()
    assert check(scene) == []
    assert reconcile(stage.engine, stage.ledger).drift == 0


def test_two_at_once_repair_it_once_and_do_no_harm(scene: Scene, settings: Settings) -> None:
    damage.the_list_of_a_worker_is_deleted(scene)
    damage.all_that_is_known_of_a_waiting_job_is_deleted(scene)
    damage.all_that_is_known_of_a_running_job_is_deleted(scene)
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(reconcile, scene.stage.engine, Ledger(settings)) for _ in range(2)]
        for run in runs:
            run.result()
    transition_log.apply_all(scene.stage.engine, scene.stage.ledger)
    assert check(scene) == []
    assert reconcile(scene.stage.engine, scene.stage.ledger).drift == 0


def test_a_ledger_that_is_cold_is_not_compared(scene: Scene) -> None:
    scene.redis.flushdb()
    with pytest.raises(LedgerClosed):
        reconcile(scene.stage.engine, scene.stage.ledger)


# -- while work goes on


def test_work_that_goes_on_meanwhile_is_never_taken_for_drift(engine: Engine, settings: Settings) -> None:
    stage = Stage(engine, settings)
    for worker in ("a", "b", "c"):
        stage.worker(worker, cpus=4000, slots=3)
    enough = threading.Event()
    work = [Work(stage.engine, settings, number) for number in range(3)]
    reports: list[Reconciled] = []
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(driver, enough) for driver in work]
        try:
            ledger = Ledger(settings)
            while sum(driver.done for driver in work) < 1500 and not any(run.done() for run in running):
                reports.append(reconcile(stage.engine, ledger))
        finally:
            enough.set()
        for run in running:
            run.result()
    kinds = [report.to_json()["kinds"] for report in reports]
    assert [kind for kind in kinds if kind] == []
    assert sum(report.checked for report in reports) > 0
    assert len(reports) > 3
    stage.apply()
    assert verify.check(stage.engine, stage.redis, patience=BRIEFLY).lines() == []
    assert reconcile(stage.engine, stage.ledger).drift == 0
    ledger.client.close()
    stage.close()


def test_job_that_its_worker_ends_while_it_is_repaired_is_not_given_back(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key was deleted: the reconcile enters it once more, and so does its worker, which then ends it."""
    stage, job = scene.stage, scene.running
    scene.redis.delete(keys.job(job))
    real = Ledger.adopt

    def adopt(ledger: Ledger, worker: str, incarnation: str, held: Sequence[Adopted]) -> list[tuple[str, Token]]:
        assert real(ledger, worker, incarnation, held) == []
        stage.end(job, applied=False)
        return real(ledger, worker, incarnation, held)

    monkeypatch.setattr(Ledger, "adopt", adopt)
    reconcile(stage.engine, stage.ledger)
    stage.apply()
    assert (stage.row(job).state, stage.row(job).attempt) == ("succeeded", 1)
    assert check(scene) == []
