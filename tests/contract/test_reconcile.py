"""Each kind of damage to the ledger is found, named and repaired; work that goes on is never taken for damage."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from sqlalchemy import Engine, text

from routing import backlog, enroll, keys, stream, verify
from routing.drift import Reconciled
from routing.ledger import Ledger
from routing.policy import order
from routing.reconcile import reconcile
from routing.replies import Ended, LedgerClosed
from routing.request import Request
from routing.settings import Settings
from tests.fixtures.staged import MESSAGE, MOST_LOSSES, Stage

#: Seconds for which a violation must stay; nothing else moves when it is looked for.
BRIEFLY: Final = 0.2
WIDE: Final = "cpus=9000,slots=1"
SLIM: Final = "cpus=3500,slots=1"


@dataclass
class Scene:
    """A platform in the middle of its work. Worker a (4 CPUs) is full, b (3 CPUs) has one left; two shapes wait."""

    stage: Stage
    #: runs on a
    running: str
    #: is admitted to a, and not claimed yet
    admitted: str
    #: runs on b
    other: str
    #: wait: two that are wider than any worker, one that fits on an empty a
    wide: str
    wide_too: str
    slim: str
    #: must not start before an hour
    later: str
    #: ended
    done: str

    @property
    def redis(self) -> Any:
        return self.stage.redis


@pytest.fixture
def scene(engine: Engine, settings: Settings) -> Iterator[Scene]:
    stage = Stage(engine, settings)
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=3000)
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


Damage = Callable[[Scene], object]
#: What is done to the stores -> by which kind it is found.
DAMAGES: Final[dict[str, tuple[Damage, str]]] = {}


def damage(kind: str) -> Callable[[Damage], Damage]:
    def add(done: Damage) -> Damage:
        DAMAGES[done.__name__.replace("_", " ")] = (done, kind)
        return done

    return add


# -- keys of jobs


@damage("running in Postgres, missing in the ledger")
def the_key_of_a_running_job_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.job(scene.running))


@damage("admitted in Postgres, missing in the ledger")
def the_key_of_an_admitted_job_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.job(scene.admitted))


@damage("waiting in Postgres, missing in the ledger")
def the_key_of_a_waiting_job_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.job(scene.slim))


@damage("waiting in Postgres, missing in the ledger")
def all_that_is_known_of_a_waiting_job_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.job(scene.slim), keys.wait(SLIM))
    scene.redis.zrem(keys.SHAPES, SLIM)


@damage("running in Postgres, missing in the ledger")
def all_that_is_known_of_a_running_job_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.job(scene.other), keys.held("b"))
    scene.redis.hincrby(keys.book("b"), "a.cpus", -2000)
    scene.redis.hincrby(keys.book("b"), "a.slots", -1)
    scene.redis.decrby(keys.ALLOCATED, 2000)


@damage("held without its place")
def the_token_in_the_key_of_a_running_job_is_newer_than_in_the_list_of_its_worker(scene: Scene) -> None:
    scene.redis.hset(keys.held("a"), scene.running, "1.0")


# -- lists of workers, and deliveries


@damage("held without its place")
def the_entry_of_a_running_job_in_the_list_of_its_worker_is_deleted(scene: Scene) -> None:
    scene.redis.hdel(keys.held("a"), scene.running)


@damage("held without its place")
def the_entry_of_an_admitted_job_in_the_list_of_its_worker_is_deleted(scene: Scene) -> None:
    scene.redis.hdel(keys.held("a"), scene.admitted)


@damage("held without its place")
def the_list_of_a_worker_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.held("a"))


@damage("a book that is not the sum")
def a_worker_holds_a_job_that_nobody_knows(scene: Scene) -> None:
    scene.redis.hset(keys.held("a"), "ghost", "1.1")


@damage("a book that is not the sum")
def a_second_worker_holds_a_job(scene: Scene) -> None:
    scene.redis.hset(keys.held("b"), scene.running, "1.1")


@damage("a book that is not the sum")
def a_worker_that_nobody_knows_holds_a_job_that_nobody_knows(scene: Scene) -> None:
    scene.redis.hset(keys.held("ghost"), "ghost", "1.1")


@damage("held without its place")
def an_admitted_job_is_never_delivered_again(scene: Scene) -> None:
    scene.redis.zrem(keys.UNCLAIMED, scene.admitted)


@damage("a delivery of a job that was not admitted")
def a_job_that_nobody_knows_is_to_be_delivered_again(scene: Scene) -> None:
    scene.redis.zadd(keys.UNCLAIMED, {"ghost": 7})


@damage("held without its place")
def a_running_job_is_to_be_delivered_again(scene: Scene) -> None:
    scene.redis.zadd(keys.UNCLAIMED, {scene.running: 7})


# -- queues


@damage("waiting without its place")
def the_place_of_a_waiting_job_is_deleted(scene: Scene) -> None:
    scene.redis.zrem(keys.wait(WIDE), scene.wide)


@damage("waiting without its place")
def the_only_place_of_a_shape_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.wait(SLIM))


@damage("waiting without its place")
def a_waiting_job_stands_before_its_turn(scene: Scene) -> None:
    scene.redis.zadd(keys.wait(WIDE), {scene.wide_too: 1})


@damage("a place without its waiting job")
def a_job_that_nobody_knows_waits(scene: Scene) -> None:
    scene.redis.zadd(keys.wait(WIDE), {"ghost": 1})


@damage("a place without its waiting job")
def a_running_job_waits_too(scene: Scene) -> None:
    scene.redis.zadd(keys.wait(SLIM), {scene.running: 1})


@damage("a place without its waiting job")
def a_waiting_job_waits_under_another_shape_too(scene: Scene) -> None:
    scene.redis.zadd(keys.wait(SLIM), {scene.wide: order(0, 1)})


@damage("a shape out of its place")
def the_place_of_a_shape_is_wrong(scene: Scene) -> None:
    scene.redis.zadd(keys.SHAPES, {WIDE: 7})


@damage("a shape out of its place")
def a_shape_is_not_among_the_shapes(scene: Scene) -> None:
    scene.redis.zrem(keys.SHAPES, WIDE)


@damage("a shape out of its place")
def a_shape_that_nobody_waits_under_is_among_the_shapes(scene: Scene) -> None:
    scene.redis.zadd(keys.SHAPES, {"cpus=7,slots=1": 7})


# -- books and sums


@damage("a book that is not the sum")
def a_book_has_more_allocated_than_is_held(scene: Scene) -> None:
    scene.redis.hincrby(keys.book("a"), "a.cpus", 300)


@damage("a book that is not the sum")
def a_book_has_less_allocated_than_is_held(scene: Scene) -> None:
    scene.redis.hincrby(keys.book("b"), "a.cpus", -1500)
    scene.redis.hincrby(keys.book("b"), "a.memory", 5)


@damage("a book that is not the sum")
def a_book_has_lost_what_is_allocated(scene: Scene) -> None:
    scene.redis.hdel(keys.book("b"), "a.cpus", "a.slots")


@damage("a book that is not the sum")
def a_worker_with_room_is_not_in_the_index(scene: Scene) -> None:
    scene.redis.zrem(keys.FREE, "b")


@damage("a book that is not the sum")
def a_worker_stands_in_the_index_with_more_than_it_has(scene: Scene) -> None:
    scene.redis.zadd(keys.FREE, {"a": 9000})


@damage("a book that is not the sum")
def a_worker_that_nobody_knows_stands_in_the_index(scene: Scene) -> None:
    scene.redis.zadd(keys.FREE, {"ghost": 9000})


@damage("a book that is not the sum")
def a_worker_has_no_lease_among_the_leases(scene: Scene) -> None:
    scene.redis.zrem(keys.LEASES, "a")


@damage("a book that is not the sum")
def a_lease_ends_at_another_time_than_the_book_says(scene: Scene) -> None:
    scene.redis.zadd(keys.LEASES, {"a": 7})


@damage("a worker without a book")
def the_book_of_a_worker_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.book("a"))


@damage("a worker without a book")
def the_book_of_a_worker_is_torn(scene: Scene) -> None:
    scene.redis.hdel(keys.book("a"), "epoch")


@damage("held by a worker that has no book")
def the_book_of_a_worker_that_has_left_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.book("b"))
    scene.stage.sql("UPDATE workers SET status = 'lost', left_at = now() WHERE name = 'b'")


@damage("a sum of CPUs that is not the sum of the books")
def the_sum_of_the_allocated_cpus_is_wrong(scene: Scene) -> None:
    scene.redis.incrby(keys.ALLOCATED, 1000)


@damage("a sum of CPUs that is not the sum of the books")
def the_sum_of_the_allocated_cpus_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.ALLOCATED)


@damage("a sum of CPUs that is not the sum of the books")
def the_sum_that_people_read_is_wrong(scene: Scene) -> None:
    scene.redis.set(keys.ALLOCATED_CPUS, "7")


@damage("a sum of CPUs that is not the sum of the books")
def the_sum_that_people_read_is_deleted(scene: Scene) -> None:
    scene.redis.delete(keys.ALLOCATED_CPUS)


# -- the stream


@damage("a transition that was lost with the stream")
def the_stream_is_lost_with_an_admission(scene: Scene) -> None:
    scene.stage.submit(cpus=1000, applied=False)
    scene.redis.delete(keys.STREAM)


@damage("a transition that was lost with the stream")
def the_stream_is_lost_with_a_filing(scene: Scene) -> None:
    scene.stage.submit(cpus=9000, applied=False)
    scene.redis.delete(keys.STREAM)


@damage("a transition that was lost with the stream")
def the_stream_is_lost_with_a_claim(scene: Scene) -> None:
    arrived = [(scene.admitted, "1.1", "nonce")]
    scene.stage.ledger.settle("a", "a-life", arrived=arrived, most_losses=MOST_LOSSES)
    scene.redis.delete(keys.STREAM)


@damage("running in Postgres, ended in the ledger")
def the_stream_is_lost_with_an_end(scene: Scene) -> None:
    scene.stage.end(scene.other, applied=False)
    scene.redis.delete(keys.STREAM)


@damage("accepted in Postgres, ended in the ledger")
def the_stream_is_lost_with_a_whole_life(scene: Scene) -> None:
    job = scene.stage.submit(cpus=1000, applied=False)
    ledger = scene.stage.ledger
    ledger.settle("b", "b-life", arrived=[(job, "1.1", "nonce")], most_losses=MOST_LOSSES)
    ledger.settle("b", "b-life", ended=[Ended(job, "1.1", "failed")], most_losses=MOST_LOSSES)
    scene.redis.delete(keys.STREAM)


@damage("running in Postgres, ended in the ledger")
def the_stream_is_lost_with_a_retry(scene: Scene) -> None:
    scene.stage.end(scene.other, "retried", applied=False)
    scene.redis.delete(keys.STREAM)


@damage("a transition that was lost with the stream")
def the_stream_is_lost_with_a_hand_back_and_the_next_attempt(scene: Scene) -> None:
    scene.stage.end(scene.other, "handed_back", applied=False)
    scene.redis.delete(keys.STREAM)


@damage("a transition that was lost with the stream")
def the_stream_is_lost_with_a_hand_back_into_the_backlog(scene: Scene) -> None:
    scene.stage.ledger.drain("b", "b-life")
    scene.stage.end(scene.other, "handed_back", applied=False)
    scene.redis.delete(keys.STREAM)


@damage("waiting in Postgres, ended in the ledger")
def the_stream_is_lost_with_a_cancellation(scene: Scene) -> None:
    assert scene.stage.ledger.cancel(scene.wide, "cancelled").verdict == "ended"
    scene.redis.delete(keys.STREAM)


# -- rows


@damage("succeeded in Postgres, running in the ledger")
def a_running_job_has_ended_in_postgres(scene: Scene) -> None:
    scene.stage.sql(
        "WITH a AS (UPDATE attempts SET ended_at = now(), outcome = 'succeeded' WHERE job_id = :job)"
        " UPDATE jobs SET state = 'succeeded', step = 9, finished_at = now() WHERE id = :job",
        job=scene.running,
    )


@damage("cancelled in Postgres, waiting in the ledger")
def a_waiting_job_has_ended_in_postgres(scene: Scene) -> None:
    scene.stage.sql(
        "UPDATE jobs SET state = 'cancelled', step = 12, finished_at = now() WHERE id = :job", job=scene.slim
    )


@damage("missing in Postgres, running in the ledger")
def the_row_of_a_running_job_is_deleted(scene: Scene) -> None:
    scene.stage.sql("DELETE FROM jobs WHERE id = :job", job=scene.running)
    scene.stage.sql("DELETE FROM attempts WHERE job_id = :job", job=scene.running)


@damage("missing in Postgres, waiting in the ledger")
def the_row_of_a_waiting_job_is_deleted(scene: Scene) -> None:
    scene.stage.sql("DELETE FROM jobs WHERE id = :job", job=scene.wide)


@damage("accepted in Postgres, running in the ledger")
def the_row_of_a_running_job_is_from_an_older_backup(scene: Scene) -> None:
    scene.stage.sql(
        "UPDATE jobs SET state = 'accepted', epoch = 0, attempt = 0, step = 0, worker = NULL WHERE id = :job",
        job=scene.running,
    )


@damage("waiting in Postgres, running in the ledger")
def the_row_of_a_running_job_says_that_it_waits_for_another_attempt(scene: Scene) -> None:
    scene.stage.sql(
        "WITH a AS (UPDATE attempts SET ended_at = now(), outcome = 'taken_back' WHERE job_id = :job)"
        " UPDATE jobs SET state = 'waiting', step = 11 WHERE id = :job",
        job=scene.other,
    )


@damage("scheduled in Postgres, waiting in the ledger")
def the_row_of_a_waiting_job_is_scheduled_with_its_successor(scene: Scene) -> None:
    scene.stage.sql(
        "UPDATE jobs SET state = 'scheduled', due_at = now() + interval '1 h' WHERE id = :job", job=scene.wide
    )


# -- the tests


def check(scene: Scene) -> list[str]:
    return verify.check(scene.stage.engine, scene.redis, patience=BRIEFLY).lines()


def finish(scene: Scene) -> None:
    """Everything that can run runs and ends; what cannot is cancelled, and what is not due is not waited for."""
    stage = scene.stage
    # Whatever the heartbeats would have done: a worker with a closed book registers again.
    for worker, cpus in (("a", 4000), ("b", 3000)):
        stage.worker(worker, cpus=cpus)
    stage.sql("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE state = 'scheduled'")
    for _ in range(20):
        stage.apply()
        with stage.engine.connect() as connection:
            enroll.submit_rows(stage.ledger, backlog.stranded(connection, -1.0, 1000))
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
                assert stage.ledger.cancel(job, "cancelled").verdict == "ended"
    raise AssertionError(f"these did not end: {rows}")


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_repaired(scene: Scene, name: str) -> None:
    done, kind = DAMAGES[name]
    done(scene)
    first = reconcile(scene.stage.engine, scene.stage.ledger)
    assert kind in first.found, first.to_json()
    assert first.all_repaired, (first.found, first.repaired)
    stream.apply_all(scene.stage.engine, scene.stage.ledger)
    assert check(scene) == []
    second = reconcile(scene.stage.engine, scene.stage.ledger)
    assert second.to_json()["kinds"] == {}
    assert int(scene.redis.hget(keys.COUNTERS, "drift")) >= first.drift
    finish(scene)
    report = verify.check(scene.stage.engine, scene.redis, at_rest=True, patience=BRIEFLY)
    assert report.lines() == []


def test_nothing_is_found_where_nothing_is_wrong(scene: Scene) -> None:
    assert check(scene) == []
    found = reconcile(scene.stage.engine, scene.stage.ledger)
    assert (found.drift, found.checked) == (0, 6)
    finish(scene)
    found = reconcile(scene.stage.engine, scene.stage.ledger)
    assert (found.drift, found.checked) == (0, 0)


def test_what_the_stream_still_says_is_applied_and_is_no_drift(scene: Scene) -> None:
    scene.stage.submit(cpus=1000, applied=False)
    scene.stage.end(scene.other, applied=False)
    found = reconcile(scene.stage.engine, scene.stage.ledger)
    assert (found.applied, found.drift) == (2, 0)


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


def test_a_repair_admits_what_fits_now(scene: Scene) -> None:
    a_running_job_has_ended_in_postgres(scene)
    reconcile(scene.stage.engine, scene.stage.ledger)
    scene.stage.apply()
    assert (scene.stage.row(scene.slim).state, scene.stage.row(scene.slim).worker) == ("admitted", "a")


def test_several_kinds_of_damage_at_once_are_all_repaired(scene: Scene) -> None:
    the_list_of_a_worker_is_deleted(scene)
    all_that_is_known_of_a_waiting_job_is_deleted(scene)
    the_sum_of_the_allocated_cpus_is_wrong(scene)
    a_job_that_nobody_knows_waits(scene)
    all_that_is_known_of_a_running_job_is_deleted(scene)
    the_stream_is_lost_with_a_claim(scene)
    first = reconcile(scene.stage.engine, scene.stage.ledger)
    assert first.all_repaired
    assert first.drift >= 6
    stream.apply_all(scene.stage.engine, scene.stage.ledger)
    assert check(scene) == []
    assert reconcile(scene.stage.engine, scene.stage.ledger).drift == 0


def test_two_at_once_repair_it_once_and_do_no_harm(scene: Scene, settings: Settings) -> None:
    the_list_of_a_worker_is_deleted(scene)
    all_that_is_known_of_a_waiting_job_is_deleted(scene)
    all_that_is_known_of_a_running_job_is_deleted(scene)
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(reconcile, scene.stage.engine, Ledger(settings)) for _ in range(2)]
        for run in runs:
            run.result()
    stream.apply_all(scene.stage.engine, scene.stage.ledger)
    assert check(scene) == []
    assert reconcile(scene.stage.engine, scene.stage.ledger).drift == 0


def test_a_ledger_that_is_cold_is_not_compared(scene: Scene) -> None:
    scene.redis.flushdb()
    with pytest.raises(LedgerClosed):
        reconcile(scene.stage.engine, scene.stage.ledger)


# -- while work goes on


class Work:
    """Jobs that come, run, fail, go back and are cancelled, as fast as one thread can, until it is told to stop."""

    def __init__(self, engine: Engine, settings: Settings, number: int) -> None:
        self.engine = engine
        self.ledger = Ledger(settings)
        self.ledger.epoch = 1
        self.chance = random.Random(number)
        self.prefix = f"t{number}-"
        self.done = 0

    def __call__(self, enough: threading.Event) -> int:
        while not enough.is_set():
            self.submit()
            for worker in ("a", "b", "c"):
                self.receive(worker)
            self.finish()
            if self.chance.random() < 0.5:
                stream.apply_all(self.engine, self.ledger)
        self.ledger.client.close()
        return self.done

    def submit(self) -> None:
        with self.engine.connect() as connection:
            rows = []
            for _ in range(5):
                self.done += 1
                shape = Request.of({"cpus": self.chance.choice([500, 1000, 3000])}).shape
                job = f"{self.prefix}{self.done}"
                insert = "INSERT INTO jobs (id, name, state, shape, request, message, queue) VALUES (:id, 'task', "
                seq = connection.execute(
                    text(insert + "'accepted', :shape, '{}', :message, 'celery') RETURNING seq"),
                    {"id": job, "shape": shape, "message": MESSAGE},
                ).scalar_one()
                rows.append((job, shape, order(0, seq), MESSAGE, 0, 0, 0))
        self.ledger.submit_all(rows)
        if self.chance.random() < 0.3:
            self.ledger.cancel(rows[-1][0], "cancelled")

    def receive(self, worker: str) -> None:
        client: Any = self.ledger.client
        arrived = []
        for message in client.rpop(f"queue.{worker}", 5) or []:
            tag = message.rpartition(b'"delivery_tag":"')[2].removesuffix(b'"}}').decode()
            job, _, token = tag.rpartition(":")
            arrived.append((job, token, self.prefix))
        claimed = self.ledger.settle(worker, f"{worker}-life", arrived=arrived, most_losses=MOST_LOSSES).claimed
        for one in claimed:
            if one.ok:
                outcome = self.chance.choice(["succeeded", "failed", "handed_back", "lost"])
                client.rpush("running", f"{worker} {one.job} {one.token} {outcome}")

    def finish(self) -> None:
        client: Any = self.ledger.client
        for raw in client.lpop("running", 4) or []:
            worker, job, token, outcome = raw.decode().split()
            ended = [Ended(job, token, outcome)]
            self.ledger.settle(worker, f"{worker}-life", ended=ended, most_losses=MOST_LOSSES)


def test_work_that_goes_on_meanwhile_is_never_taken_for_drift(engine: Engine, settings: Settings) -> None:
    stage = Stage(engine, settings)
    for worker in ("a", "b", "c"):
        stage.worker(worker, cpus=4000, slots=3)
    enough = threading.Event()
    work = [Work(stage.engine, settings, number) for number in range(3)]
    found: list[Reconciled] = []
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(one, enough) for one in work]
        try:
            ledger = Ledger(settings)
            while sum(one.done for one in work) < 1500 and not any(run.done() for run in running):
                found.append(reconcile(stage.engine, ledger))
        finally:
            enough.set()
        for run in running:
            run.result()
    kinds = [one.to_json()["kinds"] for one in found]
    assert [kind for kind in kinds if kind] == []
    assert sum(one.checked for one in found) > 0
    assert len(found) > 3
    stage.apply()
    assert verify.check(stage.engine, stage.redis, patience=BRIEFLY).lines() == []
    assert reconcile(stage.engine, stage.ledger).drift == 0
    ledger.client.close()
    stage.close()
