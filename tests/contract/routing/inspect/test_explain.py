"""The explanation of each job equals that of a brute-force oracle, in clusters that came about by real steps."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from celery_capacity.routing.forecast import line
from celery_capacity.routing.insert import single
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.inspect.explanation import Explanation
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model.expected import RunTime, expected_class
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request, timed
from celery_capacity.routing.policy.pauses import Scope
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.policy.tenants import Rule, tenant_term
from celery_capacity.routing.recovery import controls, workers_with_room
from celery_capacity.routing.recovery.reservations import Memory, renew_reservations
from celery_capacity.routing.store import controls as stored
from celery_capacity.workers.process.stores import transactions
from tests.contract.routing.ledger.test_admission import ON_A_SERVER
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.oracle import Job, Reserved, Terms, Worker, World
from tests.fixtures.stores.staged import MESSAGE, Stage

TENANTS: Final = ("default", "art", "physics")
QUEUES: Final = ("celery", "mail")
#: Expected times far above the time that a test takes: unknown, within that of a longer job, longer.
TIMES: Final = (0, *map(expected_class, (2**20, 2**23)))
AMOUNTS: Final = st.fixed_dictionaries(
    {"cpus": st.sampled_from([500, 1000, 2000, 4000]), "memory": st.sampled_from([0, 0, 1, 3])},
    optional={"licence": st.just(1)},
)
PART: Final = st.dictionaries(st.sampled_from(["cpus", "slots"]), st.sampled_from([1, 2, 1000, 3000]), max_size=1)


class Asked(NamedTuple):
    """A job that is submitted."""

    amounts: dict[str, int]
    priority: int
    tenant: str
    queue: str
    runs: int
    key: bool


ASKED: Final = st.builds(
    Asked,
    AMOUNTS,
    st.sampled_from([0, 0, 1, 9]),
    st.sampled_from(TENANTS),
    st.sampled_from(["celery", "celery", "celery", "mail"]),
    st.sampled_from(TIMES),
    st.sampled_from([False, False, False, False, True]),
)
WORKER: Final = st.tuples(
    st.sampled_from([1000, 3000, 4000]),
    st.sampled_from([2, 4]),
    st.integers(1, 4),
    st.integers(0, 1),
    st.sampled_from([("celery",), ("celery", "mail")]),
)
#: Most clusters have workers, so that more of their jobs wait for room.
CLUSTER_WORKERS: Final = st.lists(WORKER, min_size=1, max_size=3) | st.lists(WORKER, max_size=1)
PAUSED: Final = st.sampled_from([None, None, None, ("queue", "mail"), ("tenant", "art"), ("platform", "")])
RULES: Final = st.dictionaries(
    st.sampled_from(TENANTS), st.builds(Rule, st.sampled_from([1, 2]), PART, PART), max_size=2
)
PAST: Final = st.dictionaries(st.sampled_from(TENANTS), st.sampled_from([0.25, 0.5]), max_size=2)


class Cluster(NamedTuple):
    """Steps that make a cluster. `early`, `late`: jobs before and after the operators' orders. `ends`: of starts."""

    workers: list[tuple[int, int, int, int, tuple[str, ...]]]
    early: list[Asked]
    late: list[Asked]
    cordoned: set[int]
    paused: tuple[str, str] | None
    rules: dict[str, Rule]
    past: dict[str, float]
    ends: int
    depth: int


CLUSTERS: Final = st.builds(
    Cluster,
    CLUSTER_WORKERS,
    st.lists(ASKED, max_size=8),
    st.lists(ASKED, min_size=1, max_size=8),
    st.sets(st.integers(0, 2), max_size=1),
    PAUSED,
    RULES | st.just({}),
    PAST,
    st.integers(0, 2),
    st.integers(0, 1),
)


class Made:
    """A cluster on the stage, and the oracle's copy of it, which is read from what was done."""

    def __init__(self, stage: Stage, drawn: Cluster) -> None:
        self.stage, self.drawn = stage, drawn
        self.asked: dict[str, Asked] = {}
        stage.redis.flushdb()
        stage.sql("TRUNCATE jobs, attempts, job_keys, key_notes, workers, cordons, pauses, tenants")
        stage.ledger.open_epoch(stage.ledger.epoch)
        stage.ledger.finish_epoch(stage.ledger.epoch)
        for number, (cpus, memory, slots, licence, queues) in enumerate(drawn.workers):
            stage.worker(f"w{number}", cpus=cpus, memory=memory, slots=slots, licence=licence, queues=queues)
        for asked in drawn.early:
            self.submit(asked)
        self.order()
        for asked in drawn.late:
            self.submit(asked)
        for job in self.running()[: drawn.ends]:
            stage.start(job)
            stage.end(job)
        self.settle()

    def submit(self, asked: Asked) -> None:
        job = f"job-{len(self.asked)}"
        self.asked[job] = asked
        run_time = RunTime(asked.runs, asked.runs)
        shape = timed(Request.of(asked.amounts).within(asked.queue).shape + tenant_term(asked.tenant), run_time)
        limits = json.dumps({"key": {"most": 1}}) if asked.key else None
        new = NewJob(
            job, "task", shape, MESSAGE, asked.priority, queue=asked.queue, expected_ms=asked.runs, key_limits=limits
        )
        with transactions(self.stage.engine).begin() as connection:
            inserted = single.insert_job(connection, new)
        if inserted.starts:
            place = order(asked.priority, self.stage.row(job).seq)
            self.stage.ledger.submit(job, shape, place, MESSAGE, submitted_ms=self.stage.ledger.now_ms())
            self.stage.apply()

    def order(self) -> None:
        """Give the orders of operators."""
        with transactions(self.stage.engine).begin() as connection:
            if names := [f"w{number}" for number in self.drawn.cordoned if number < len(self.drawn.workers)]:
                stored.cordon(connection, names, "ann@desk", None)
            if self.drawn.paused:
                kind, name = self.drawn.paused
                scope = Scope.of(**{kind: name}) if name else Scope.of()
                stored.pause(connection, scope, "ann@desk", None)
            for tenant, rule in self.drawn.rules.items():
                stored.set_tenant(connection, tenant, rule, "ann@desk")
        controls.level(self.stage.engine, self.stage.ledger)
        for tenant, use in self.drawn.past.items():
            self.stage.redis.hset(keys.PAST, tenant, str(use))

    def settle(self) -> None:
        """Do what the runner of the duties does each second, until nothing starts any more."""
        memory, engine, ledger = Memory(), self.stage.engine, self.stage.ledger
        while True:
            controls.refresh_shares(engine, ledger)
            started = workers_with_room.fill_all(ledger)
            started += renew_reservations(ledger, Rules(self.drawn.depth, 10**9), memory).get("admitted", 0)
            self.stage.apply()
            if not started:
                return

    def running(self) -> list[str]:
        with self.stage.engine.connect() as connection:
            query = text("SELECT id FROM jobs WHERE state IN ('admitted', 'running') ORDER BY seq")
            return list(connection.execute(query).scalars())

    def world(self) -> World:
        with self.stage.engine.connect() as connection:
            query = text(
                "SELECT id, state, worker, extract(epoch FROM admitted_at)::float AS since FROM jobs"
                " WHERE state IN ('accepted', 'waiting', 'scheduled', 'admitted', 'running') ORDER BY seq"
            )
            jobs = {}
            for number, row in enumerate(connection.execute(query)):
                asked = self.asked[row.id]
                worker = (row.worker or "") if row.state in ("admitted", "running") else ""
                jobs[row.id] = Job(
                    row.id,
                    {"slots": 1, **asked.amounts},
                    asked.priority,
                    number,
                    asked.tenant,
                    asked.queue,
                    asked.runs,
                    row.state == "scheduled",
                    worker,
                    row.since or 0.0,
                )
        books = snapshot.read_books(self.stage.redis, [f"w{number}" for number in range(len(self.drawn.workers))])
        heads = {int(place): job for place, job in self.orders(jobs)}
        return World(
            [
                Worker(
                    f"w{number}",
                    {"cpus": cpus, "memory": memory, "slots": slots, "licence": licence},
                    frozenset(queues),
                    number in self.drawn.cordoned,
                )
                for number, (cpus, memory, slots, licence, queues) in enumerate(self.drawn.workers)
            ],
            list(jobs.values()),
            {name: Terms(rule.weight, dict(rule.nominal), dict(rule.quota)) for name, rule in self.drawn.rules.items()},
            self.drawn.past,
            frozenset([self.drawn.paused] if self.drawn.paused else []),
            [
                Reserved(entry.worker, heads[entry.order], entry.at, entry.beside)
                for book in books.values()
                if (entry := book.reservation) is not None
            ],
            self.stage.ledger.now_ms(),
        )

    def orders(self, jobs: dict[str, Job]) -> list[tuple[int, Job]]:
        return [(order(job.priority, self.stage.row(name).seq), job) for name, job in jobs.items()]

    def explained(self, job: str) -> Explanation:
        with self.stage.engine.connect() as connection:
            explanation = explain(self.stage.redis, connection, job)
        assert explanation is not None
        return explanation


def named(explanation: Explanation) -> str:
    """Return what an explanation names beside its reason, as the oracle does."""
    names: dict[str, Any] = {
        "tenant-quota": explanation.tenant,
        "tenant-share": explanation.tenant,
        "unknown-resource": explanation.resource,
        "reserved": explanation.worker,
        "no-worker": explanation.worker,
    }
    return names.get(explanation.why.value) or ""


def amounts_on_each(explanation: Explanation) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Return what is asked for, free and there on each worker, by resource."""
    return {
        worker.worker: {room.resource: (room.asked, room.free, room.total) for room in worker.rooms}
        for worker in explanation.missing
    }


@pytest.mark.leaves(
    "I1", "I3", "I6", because="jobs of the last cluster run on, and past use is written", sometimes=True
)
@settings(ON_A_SERVER, max_examples=examples(240))
@given(CLUSTERS)
def test_explanation_equals_that_of_a_brute_force_oracle(stage: Stage, drawn: Cluster) -> None:
    made = Made(stage, drawn)
    world = made.world()
    for job in (job for job in world.jobs if not job.worker):
        explanation = made.explained(job.name)
        assert (explanation.why.value, named(explanation)) == world.why(job), (job, world)
        if explanation.position is not None:
            assert explanation.position == world.position(job), (job, world)
        if explanation.missing:
            assert amounts_on_each(explanation) == world.missing(job)
        if explanation.why is Reason.NO_ROOM:
            chosen = explanation.unblocked_by
            assert (chosen and (chosen.worker, chosen.jobs)) == world.unblocking(job), (job, world)


# -- examples


def rule(stage: Stage, tenant: str, **changes: Any) -> None:
    with transactions(stage.engine).begin() as connection:
        stored.set_tenant(connection, tenant, Rule(**changes), "ann@desk")
    controls.level(stage.engine, stage.ledger)


def why(stage: Stage, job: str) -> tuple[Reason, str | None, int | None]:
    with stage.engine.connect() as connection:
        explanation = explain(stage.redis, connection, job)
    assert explanation is not None
    return explanation.why, explanation.tenant, explanation.position


def test_position_goes_round_by_the_turns_of_tenants(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, tenant="physics")
    flood = [stage.submit(cpus=1000, tenant="art") for _ in range(9)]
    # Art holds nothing: four of its jobs start before physics, which holds four CPUs, has another one.
    assert why(stage, stage.submit(cpus=1000, tenant="physics")) == (Reason.TENANT_SHARE, "art", 5)
    assert why(stage, stage.submit(cpus=1000, tenant="biology")) == (Reason.NO_ROOM, None, 1)
    assert why(stage, flood[-1])[2] == 10


def test_tenant_whose_jobs_cannot_start_is_not_the_one_that_comes_first(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, tenant="physics")
    for tenant in ("art", "biology", "chemistry"):
        stage.submit(cpus=9000 if tenant == "biology" else 1000, tenant=tenant)
    rule(stage, "art", quota={"cpus": 0})
    with transactions(stage.engine).begin() as connection:
        stored.pause(connection, Scope.of(tenant="chemistry"), "ann@desk", None)
    controls.level(stage.engine, stage.ledger)
    assert why(stage, stage.submit(cpus=1000, tenant="physics")) == (Reason.NO_ROOM, None, 0)


@pytest.mark.leaves("I6", because="past use is written without an ended job", sometimes=True)
def test_past_use_of_a_tenant_counts_for_who_comes_first(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=2000, tenant="physics")
    stage.submit(cpus=2000, tenant="chemistry")
    stage.submit(cpus=1000, tenant="art")
    stage.redis.hset(keys.PAST, "art", "0.9")
    assert why(stage, stage.submit(cpus=1000, tenant="physics")) == (Reason.NO_ROOM, None, 0)
    assert why(stage, "job-3") == (Reason.TENANT_SHARE, "physics", 1)


def test_jobs_behind_those_that_are_read_keep_the_order_of_submission(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "MAX_READ", 4)
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, tenant="physics")
    for _ in range(9):
        stage.submit(cpus=100, tenant="art")
    assert why(stage, stage.submit(cpus=1000, tenant="physics"))[2] == 9
