"""Books of a ledger are those of the plain-Python model after every step, whatever happens in whatever order."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Adopted, Ended
from celery_capacity.routing.model.amounts import labels
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.states import Outcome, State, WorkerStatus
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import Refusal, choose
from tests.fixtures.model.comparing import differences, expected, observe
from tests.fixtures.model.job_rules import JobRules
from tests.fixtures.model.ledger import ALL, Model
from tests.fixtures.model.parts import Job, Worker
from tests.fixtures.stores.books import FOR_EVER, MOST_LOSSES

#: Age of a lease's end (ms): more than a client's estimate of the server's clock may be off.
AGO = 3_600_000
#: A grace that is over as soon as the lease is, and one that never is (ms).
OVER, NOT_OVER = -AGO, 10**14

NAMES: Final = st.sampled_from(["a", "b", "c"])
AMOUNTS: Final = st.fixed_dictionaries(
    {"cpus": st.sampled_from([1000, 2000, 4000, 6000]), "slots": st.sampled_from([1, 2, 5])},
    optional={"memory": st.sampled_from([2, 4]), "licence": st.just(1), "gpus": st.just(2)},
)
QUEUES: Final = st.sampled_from([["celery"], ["celery"], ["celery", "mail"], ["mail"], ["celery", "Vidéo", "mail"]])
CAPACITIES: Final = st.builds(lambda amounts, queues: {**amounts, **labels(queues)}, AMOUNTS, QUEUES)
#: A worker of a new epoch opens its book at once, or after it said what it holds.
REJOINS: Final = st.sampled_from([WorkerStatus.CLOSED, WorkerStatus.READY])


class Machine(JobRules):
    """The rules about jobs, and the rules about workers and epochs."""

    # -- workers -------------------------------------------------------------------------------------------------

    @rule(
        name=NAMES,
        capacity=CAPACITIES,
        new=st.booleans(),
        status=st.sampled_from([WorkerStatus.READY, WorkerStatus.READY, WorkerStatus.READY, WorkerStatus.CLOSED]),
    )
    def register(self, name: str, capacity: dict[str, int], new: bool, status: WorkerStatus) -> None:
        """Begin a new life of a worker, or change its capacity; a closed worker has yet to say what it holds."""
        lives = self.lives.get(name, 0)
        life = f"{name}-{lives + 1 if new or not lives else lives}"
        self.check_register(name, life, capacity, status)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        """Renew with a list that may lack jobs that the worker holds, and name jobs that it does not hold."""
        name, life = data.draw(st.sampled_from(self.speakers()))
        holds = data.draw(st.lists(st.sampled_from(sorted(self.rows) or ["j0"]), unique=True, max_size=6))
        whole = data.draw(st.booleans())
        # With any other list no time goes by.
        missing_ms = 0 if whole else round(FOR_EVER * 1000)
        renewed = self.ledger.renew(name, life, {}, holds, MOST_LOSSES, missing_ms=missing_ms)
        taken = self.model.renew(name, life, holds, whole)
        assert (renewed.known, renewed.taken_back) == (taken is not None, taken or 0)

    def heartbeat(self) -> None:
        """Have each worker say what it holds. An unknown worker registers, and a drained one begins a new life."""
        for name, lives in sorted(self.lives.items()):
            worker = self.model.workers.get(name)
            life = f"{name}-{lives}"
            if worker is not None and worker.status == "draining" and not worker.held:
                assert self.ledger.leave(name, life) == self.model.leave(name, life)
                worker, life = None, f"{name}-{lives + 1}"
            holds = list(worker.held) if worker is not None else []
            renewed = self.ledger.renew(name, life, {}, holds, MOST_LOSSES)
            taken = self.model.renew(name, life, holds, False)
            assert (renewed.known, renewed.taken_back) == (taken is not None, 0)
            if taken is None:
                self.check_register(name, life, {"cpus": 3000, "slots": 3, "memory": 4})

    heartbeat_first = rule()(heartbeat)
    heartbeat_too = rule()(heartbeat)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), how=st.sampled_from(["drain", "leave", "expire_lease"]))
    def go(self, data: st.DataObject, how: str) -> None:
        name, life = data.draw(st.sampled_from(self.speakers()))
        if how == "drain":
            assert self.ledger.drain(name, life) == self.model.drain(name, life)
        elif how == "leave":
            assert self.ledger.leave(name, life) == self.model.leave(name, life)
        else:
            self.ledger.expire_lease(name, life)
            self.model.expire_lease(name, life)

    @precondition(lambda self: any(worker.live for worker in self.model.workers.values()))
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """Let the time of a lease be over before anybody has noticed."""
        name = data.draw(st.sampled_from(sorted(n for n, worker in self.model.workers.items() if worker.live)))
        self.end_lease(name)
        self.model.workers[name].live = False

    def end_lease(self, name: str) -> None:
        end = self.ledger.now_ms() - AGO
        self.ledger.client.hset(keys.book(name), "lease", end)
        self.ledger.client.zadd(keys.LEASES, {name: end})

    @rule(name=NAMES, over=st.booleans())
    def lapse(self, name: str, over: bool) -> None:
        lapsed = self.ledger.lapse(name, OVER if over else NOT_OVER, MOST_LOSSES)
        assert (lapsed.verdict, lapsed.taken_back) == self.model.lapse(name, over)

    @precondition(lambda self: self.model.workers)
    @rule(data=st.data())
    def hand_over_again(self, data: st.DataObject) -> None:
        """Have a worker ask for jobs that it was handed over in a reply that was lost."""
        name = data.draw(st.sampled_from(sorted(self.model.workers)))
        worker = self.model.workers[name]
        holds = data.draw(st.lists(st.sampled_from(sorted(worker.held) or ["j0"]), unique=True))
        handed_over = self.ledger.hand_over_again(name, worker.incarnation, holds)
        jobs = [self.model.jobs[job_id] for job_id in worker.held if job_id not in holds]
        assert [handed.job for handed in handed_over] == [job.id for job in jobs if job.state == "running" and job.kept]

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def adopt_wrongly(self, data: st.DataObject) -> None:
        """Have a worker say that it runs an attempt which went on without it, or is another's."""
        name, life = data.draw(st.sampled_from(self.speakers()))
        _, _, job_id, token = data.draw(st.sampled_from(self.arrived[-8:]))
        registered = self.model.jobs.get(job_id)
        if registered is not None:
            request, place = self.rows[job_id]
            job = Job(job_id, request, place, *token, started=True, nonce="n", incarnation=life)
            self.adopt(Worker(name, life, "", {}), [job])

    # -- epochs --------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def lose_everything(self, data: st.DataObject) -> None:
        """Empty Redis.

        Postgres knows of the attempts but of the last claims. Some workers died meanwhile.
        """
        before = self.model
        self.ledger.client.flushdb()
        self.model = Model(epoch=before.epoch)
        self.ledger.open_epoch(before.epoch + 1)
        self.ledger.finish_epoch(before.epoch + 1)
        self.model.open(before.epoch + 1)
        held = [job for job in before.jobs.values() if job.holds]
        unknown = data.draw(st.lists(st.sampled_from(held), unique_by=lambda job: job.id)) if held else []
        for name, worker in sorted(before.workers.items()):
            shape = Capacity.of(worker.capacity).shape
            assert self.ledger.reserve_book(name, worker.incarnation, shape)
            assert self.model.reserve_book(name, worker.incarnation, dict(worker.capacity))
            self.end_lease(name)
            self.adopt(worker, [job for job in held if job.worker == name and job not in unknown])
        self.compare()
        early = data.draw(st.booleans())
        if early:
            self.bring_back(before, unknown)
        for name, worker in sorted(before.workers.items()):
            if worker.live and worker.queue and data.draw(st.booleans()):
                self.check_register(name, worker.incarnation, worker.capacity, data.draw(REJOINS))
                self.adopt(worker, [before.jobs[job_id] for job_id in worker.held])
        if not early:
            self.bring_back(before, unknown)

    def adopt(self, worker: Worker, jobs: list[Job]) -> None:
        adopted = [
            Adopted(
                job.id,
                Token(job.epoch, job.attempt),
                job.request.shape,
                job.order,
                1,
                2 if job.started else 0,
                job.nonce or "",
                job.losses,
                job.rerun,
            )
            for job in jobs
        ]
        refused = self.ledger.adopt(worker.name, worker.incarnation, adopted)
        wanted = [job.id for job in jobs if not self.model.adopt(worker.name, worker.incarnation, job)]
        assert [job for job, _ in refused] == wanted

    def bring_back(self, before: Model, unknown: list[Job]) -> None:
        """Bring back the backlog, in its order, with the jobs whose last attempt Postgres does not know."""
        for job in sorted(before.jobs.values(), key=lambda job: job.order):
            if job.state == "waiting":
                self.check_submit(job.id, job.attempt, job.losses)
            elif job in unknown:
                self.check_submit(job.id, job.attempt - 1, job.losses)

    # -- what holds after every step -----------------------------------------------------------------------------

    @invariant()
    def all_is_right(self) -> None:
        self.compare()
        books = self.model.books()
        for book in books:
            # I1: only capacity that shrank, or an attempt of an older epoch, may exceed it; the book says so.
            assert (book.over is not None) == self.model.workers[book.worker].shrunk, book
        for waiting in self.model.backlog():
            # I5, under the policy.
            assert isinstance(choose(waiting.request, books, ALL), Refusal), waiting

    @rule()
    def reconcile(self) -> None:
        """Leave books that are right as they are."""
        assert self.ledger.recount(list(self.model.workers)) == [0] * len(self.model.workers)
        assert [self.ledger.repair_job(job_id) for job_id in self.model.jobs] == [0] * len(self.model.jobs)
        assert not any(self.ledger.repair_queue(waiting.request.shape, waiting.job) for waiting in self.model.backlog())

    def compare(self) -> None:
        lines = differences(observe(self.ledger.client), expected(self.model))
        assert lines == [], "\n".join(["", *lines])

    def teardown(self) -> None:
        """End everything.

        At rest every allocation is zero (I3), and nothing is left but what is told apart.
        """
        for job_id in [waiting.job for waiting in self.model.backlog()]:
            self.ledger.cancel(job_id, State.CANCELLED)
            self.model.cancel(job_id, self.rows[job_id][0], "cancelled")
        for name, worker in list(self.model.workers.items()):
            ends = [(job_id, token, "succeeded") for job_id, token in worker.held.items()]
            ended = [Ended(job_id, Token(*token), Outcome(outcome)) for job_id, token, outcome in ends]
            self.ledger.settle(name, worker.incarnation, ended=ended, most_losses=MOST_LOSSES)
            self.model.release(name, worker.incarnation, ends, None)
        self.compare()
        self.reconcile()
        facts = observe(self.ledger.client)
        assert (facts["allocated"], facts["allocated_cpus"], facts["held"], facts["wait"]) == (0, "0", {}, {})
        assert not [field for book in facts["book"].values() for field in book if field.startswith("a.")]
        for name, worker in list(self.model.workers.items()):
            assert self.ledger.leave(name, worker.incarnation) == 0
        assert set(observe(self.ledger.client)["job"]) == set(self.model.jobs)


#: Parts of the examples, which run beside each other: a step waits for five answers of Redis.
PARTS: Final = 2


@pytest.mark.long(60)
@pytest.mark.parametrize("part", range(PARTS))
def test_the_books_are_those_of_the_model_after_every_step(ledger: Ledger, part: int) -> None:
    machine = type("LedgerMachine", (Machine,), {"ledger": ledger})
    steps = settings(
        max_examples=settings().max_examples // PARTS,
        stateful_step_count=50,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(machine, settings=steps)
