"""Whatever happens to a ledger in whatever order, its books are those of the plain-Python model after every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from routing import keys, stream
from routing.ledger import Ledger
from routing.policy import Refusal, choose, order
from routing.replies import Adopted, Ended, Filled, Taken
from routing.request import Request
from routing.states import Step
from routing.store import Transition
from tests.fixtures.books import MESSAGE, MOST_LOSSES, VIEW, open_ledger
from tests.fixtures.comparing import differences, expected, observe
from tests.fixtures.model import ALL, Job, Model, Note, Worker

#: A grace that is over as soon as the lease is, and one that never is (ms).
OVER, NOT_OVER = 0, 10**14

NAMES: Final = st.sampled_from(["a", "b", "c"])
REQUESTS: Final = st.sampled_from(
    [
        Request.of({"cpus": 1000}),
        Request.of({"cpus": 1000}),
        Request.of({}),
        Request.of({"cpus": 500, "memory": 1}),
        Request.of({"cpus": 2000, "memory": 2}),
        Request.of({"cpus": 500, "licence": 1}),
        Request.of({"cpus": 4000}),
    ]
)
CAPACITIES: Final = st.fixed_dictionaries(
    {"cpus": st.sampled_from([1000, 2000, 4000, 6000]), "slots": st.sampled_from([1, 2, 5])},
    optional={"memory": st.sampled_from([2, 4]), "licence": st.just(1)},
)
#: A worker of a new epoch opens its book at once, or after it said what it holds.
REJOINS: Final = st.sampled_from(["closed", "ready"])
OUTCOMES: Final = st.sampled_from(
    ["succeeded", "failed", "cancelled", "expired", "replaced", "retried", "handed_back", "lost"]
)


class Machine(RuleBasedStateMachine):
    """`ledger` is set by the test. Jobs are j1, j2, ...; a worker's incarnations are `<name>-1`, `<name>-2`, ..."""

    ledger: Ledger

    @initialize()
    def begin(self) -> None:
        self.ledger.client.flushdb()
        self.ledger.open(1)
        self.model = Model()
        self.seq = 0
        self.lives: dict[str, int] = {}
        #: what came out of the queues: (worker, incarnation, job, token)
        self.arrived: list[tuple[str, str, str, tuple[int, int]]] = []
        #: all that were ever submitted, as Postgres has them: job -> (request, order)
        self.rows: dict[str, tuple[Request, int]] = {}
        self.check_register("a", "a-1", {"cpus": 4000, "slots": 2, "memory": 4, "licence": 1})
        self.check_register("b", "b-1", {"cpus": 3000, "slots": 5, "memory": 2})

    # -- jobs ----------------------------------------------------------------------------------------------------

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4), priority=st.sampled_from([0, 0, 0, 5, 9]))
    def submit(self, requests: list[Request], priority: int) -> None:
        for request in requests:
            self.seq += 1
            job_id = f"j{self.seq}"
            self.rows[job_id] = (request, order(priority, self.seq))
            self.check_submit(job_id, 0, 0)

    def check_submit(self, job_id: str, attempt: int, losses: int) -> None:
        request, place = self.rows[job_id]
        done = self.ledger.submit(job_id, request.shape, place, MESSAGE, attempt=attempt, losses=losses)
        assert done.state == self.model.submit(job_id, request, place, attempt, losses)
        if done.state == "admitted":
            assert (done.worker, done.attempt) == (self.model.jobs[job_id].worker, self.model.jobs[job_id].attempt)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        """The sweep, the duty for scheduled jobs, or a submit that was stuck."""
        job_id = data.draw(st.sampled_from(sorted(self.rows)))
        known = self.model.jobs.get(job_id)
        self.check_submit(job_id, known.attempt if known else 0, known.losses if known else 0)

    @precondition(lambda self: any(self.model.queues.values()))
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        """A worker takes the messages of its queue."""
        queue = data.draw(st.sampled_from(sorted(name for name, sent in self.model.queues.items() if sent)))
        for job_id, token in self.model.queues.pop(queue):
            message: Any = self.ledger.client.rpop(queue)
            assert message.endswith(f'"delivery_tag":"{job_id}:{token[0]}.{token[1]}"}}}}'.encode())
            _, name, life = queue.split(".")
            self.arrived.append((name, life, job_id, token))

    def work(self, data: st.DataObject) -> None:
        """A worker takes all that is in its queue and claims it, as it should."""
        before = len(self.arrived)
        self.arrive(data)
        name, life, _, _ = self.arrived[-1]
        new = [(job_id, token) for _, _, job_id, token in self.arrived[before:]]
        arrived = [(job_id, f"{token[0]}.{token[1]}", f"n{job_id}") for job_id, token in new]
        claimed = self.ledger.settle(name, life, arrived=arrived, most_losses=MOST_LOSSES).claimed
        assert [claim.ok for claim in claimed] == [self.model.claim(*one, name, life, f"n{one[0]}") for one in new]

    # Twice each: what should happen happens more often than what should not.
    work_first = precondition(lambda self: any(self.model.queues.values()))(rule(data=st.data())(work))
    work_too = precondition(lambda self: any(self.model.queues.values()))(rule(data=st.data())(work))

    @precondition(lambda self: self.arrived)
    @rule(data=st.data(), nonce=st.sampled_from(["n", "m"]))
    def claim(self, data: st.DataObject, nonce: str) -> None:
        """In time, too late, a second time with the same nonce or another."""
        some = st.sampled_from(self.arrived)
        one, other = data.draw(some), data.draw(some)
        arrived = [(job_id, f"{token[0]}.{token[1]}", f"{nonce}{job_id}") for _, _, job_id, token in (one, other)]
        claimed = self.ledger.settle(one[0], one[1], arrived=arrived, most_losses=MOST_LOSSES).claimed
        model = [
            self.model.claim(job_id, token, one[0], one[1], f"{nonce}{job_id}") for _, _, job_id, token in (one, other)
        ]
        assert [claim.ok for claim in claimed] == model

    def finish(self, data: st.DataObject, asks: bool, outcome: str) -> None:
        """One or two attempts end, as they should."""
        workers = [worker for worker in self.model.workers.values() if worker.held]
        worker = data.draw(st.sampled_from(workers))
        some = st.lists(st.sampled_from(list(worker.held.items())), min_size=1, max_size=2, unique=True)
        ends = [(job_id, token, outcome) for job_id, token in data.draw(some)]
        self.check_end(worker.name, worker.incarnation, ends, f"asked{len(self.arrived)}" if asks else "")

    finish_first = precondition(lambda self: self.attempts())(
        rule(data=st.data(), asks=st.booleans(), outcome=OUTCOMES)(finish)
    )
    finish_too = precondition(lambda self: self.attempts())(
        rule(data=st.data(), asks=st.booleans(), outcome=OUTCOMES)(finish)
    )

    def attempts(self) -> list[tuple[str, tuple[int, int]]]:
        """What is held by any worker."""
        return [attempt for worker in self.model.workers.values() for attempt in worker.held.items()]

    @precondition(lambda self: self.arrived)
    @rule(data=st.data(), asks=st.booleans())
    def end_wrongly(self, data: st.DataObject, asks: bool) -> None:
        """Any worker says of any attempts that they ended, also of others' and of such that ended before."""
        name, life = data.draw(st.sampled_from(self.speakers()))
        known = self.attempts() + [(job_id, token) for _, _, job_id, token in self.arrived[-5:]]
        ends = [(*data.draw(st.sampled_from(known)), data.draw(OUTCOMES)) for _ in range(2)]
        self.check_end(name, life, ends, "wrong" if asks else "")

    def check_end(self, name: str, life: str, ends: list[tuple[str, tuple[int, int], str]], nonce: str) -> None:
        settled = self.ledger.settle(
            name,
            life,
            ended=[Ended(job_id, f"{token[0]}.{token[1]}", outcome) for job_id, token, outcome in ends],
            most_losses=MOST_LOSSES,
            nonce=nonce,
        )
        verdicts, handed_over = self.model.release(name, life, ends, nonce or None)
        assert [(one.verdict, one.state) for one in settled.released] == verdicts
        assert [one.job for one in settled.handed_over] == handed_over

    def speakers(self) -> list[tuple[str, str]]:
        """(name, incarnation) of the workers there are, more often than of their former lives."""
        now = [(worker.name, worker.incarnation) for worker in self.model.workers.values()]
        return 3 * now + [(name, f"{name}-{n + 1}") for name, lives in self.lives.items() for n in range(lives)]

    @precondition(lambda self: self.model.jobs)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        """A task publishes its own successor."""
        job = self.model.jobs[data.draw(st.sampled_from(sorted(self.model.jobs)))]
        assert self.ledger.succeed(job.id) == job.holds
        job.successor = job.successor or job.holds

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), state=st.sampled_from(["cancelled", "expired"]))
    def cancel(self, data: st.DataObject, state: str) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.rows)))
        assert self.ledger.cancel(job_id, state).verdict == self.model.cancel(job_id, self.rows[job_id][0], state)

    @rule(data=st.data())
    def redeliver(self, data: st.DataObject) -> None:
        admitted = sorted(job_id for job_id, job in self.model.jobs.items() if job.state == "admitted")
        due = data.draw(st.lists(st.sampled_from(admitted), unique=True)) if admitted else []
        for number, job_id in enumerate(due):
            self.ledger.client.zadd(keys.UNCLAIMED, {job_id: number + 1})
        assert self.ledger.redeliver() == self.model.redeliver(due)

    @precondition(lambda self: self.model.stream)
    @rule(share=st.sampled_from([0.3, 1.0]))
    def forget(self, share: float) -> None:
        """Postgres gets the oldest entries."""
        found = stream.read(self.ledger)
        found = found[: max(1, round(len(found) * share))]
        self.model.forget([_note(one) for one in found])
        assert self.ledger.forget(stream.settled(found)) == len(found)

    # -- workers -------------------------------------------------------------------------------------------------

    @rule(
        name=NAMES,
        capacity=CAPACITIES,
        new=st.booleans(),
        status=st.sampled_from(["ready", "ready", "ready", "closed"]),
    )
    def register(self, name: str, capacity: dict[str, int], new: bool, status: str) -> None:
        """A new life of a worker, or another capacity of the one there is; closed, it has yet to say what it holds."""
        lives = self.lives.get(name, 0)
        life = f"{name}-{lives + 1 if new or not lives else lives}"
        self.check_register(name, life, capacity, status)

    def check_register(self, name: str, life: str, capacity: dict[str, int], status: str = "ready") -> None:
        queue = f"queue.{name}.{life}"
        done = self.ledger.register(name, life, queue, Request.of(capacity).shape, VIEW, status)
        admitted = self.model.register(name, life, queue, capacity, status)
        if admitted is None:
            assert isinstance(done, Taken)
        else:
            assert done == Filled(admitted)
            self.lives[name] = int(life.rpartition("-")[2])

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        """With a list that may lack what the worker holds, and name what it does not hold."""
        name, life = data.draw(st.sampled_from(self.speakers()))
        holds = data.draw(st.lists(st.sampled_from(sorted(self.rows) or ["j0"]), unique=True, max_size=6))
        renewed = self.ledger.renew(name, life, {}, holds, MOST_LOSSES)
        taken = self.model.renew(name, life, holds)
        assert (renewed.known, renewed.taken_back) == (taken is not None, taken or 0)

    def heartbeat(self) -> None:
        """Each worker says what it holds; one that is not known registers, one that has drained begins a new life."""
        for name, lives in sorted(self.lives.items()):
            worker = self.model.workers.get(name)
            life = f"{name}-{lives}"
            if worker is not None and worker.status == "draining" and not worker.held:
                assert self.ledger.leave(name, life) == self.model.leave(name, life)
                worker, life = None, f"{name}-{lives + 1}"
            holds = list(worker.held) if worker is not None else []
            renewed = self.ledger.renew(name, life, {}, holds, MOST_LOSSES)
            taken = self.model.renew(name, life, holds)
            assert (renewed.known, renewed.taken_back) == (taken is not None, 0)
            if taken is None:
                self.check_register(name, life, {"cpus": 3000, "slots": 3, "memory": 4})

    heartbeat_first = rule()(heartbeat)
    heartbeat_too = rule()(heartbeat)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), how=st.sampled_from(["drain", "leave", "condemn"]))
    def go(self, data: st.DataObject, how: str) -> None:
        name, life = data.draw(st.sampled_from(self.speakers()))
        if how == "drain":
            assert self.ledger.drain(name, life) == self.model.drain(name, life)
        elif how == "leave":
            assert self.ledger.leave(name, life) == self.model.leave(name, life)
        else:
            self.ledger.condemn(name, life)
            self.model.condemn(name, life)

    @precondition(lambda self: any(worker.live for worker in self.model.workers.values()))
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """The time of a lease is over, and nobody noticed yet."""
        name = data.draw(st.sampled_from(sorted(n for n, worker in self.model.workers.items() if worker.live)))
        end = self.ledger.now_ms() - 1
        self.ledger.client.hset(keys.book(name), "lease", end)
        self.ledger.client.zadd(keys.LEASES, {name: end})
        self.model.workers[name].live = False

    @rule(name=NAMES, over=st.booleans())
    def lapse(self, name: str, over: bool) -> None:
        lapsed = self.ledger.lapse(name, OVER if over else NOT_OVER, MOST_LOSSES)
        assert (lapsed.verdict, lapsed.taken_back) == self.model.lapse(name, over)

    @precondition(lambda self: self.model.workers)
    @rule(data=st.data())
    def recover(self, data: st.DataObject) -> None:
        """A worker asks for what it was handed over in a reply that was lost."""
        name = data.draw(st.sampled_from(sorted(self.model.workers)))
        worker = self.model.workers[name]
        holds = data.draw(st.lists(st.sampled_from(sorted(worker.held) or ["j0"]), unique=True))
        found = self.ledger.recover(name, worker.incarnation, holds)
        jobs = [self.model.jobs[job_id] for job_id in worker.held if job_id not in holds]
        assert [one.job for one in found] == [job.id for job in jobs if job.state == "running" and job.kept]

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def adopt_wrongly(self, data: st.DataObject) -> None:
        """A worker says that it runs an attempt which went on without it, or is another's."""
        name, life = data.draw(st.sampled_from(self.speakers()))
        _, _, job_id, token = data.draw(st.sampled_from(self.arrived[-8:]))
        known = self.model.jobs.get(job_id)
        if known is not None:
            request, place = self.rows[job_id]
            job = Job(job_id, request, place, *token, started=True, nonce="n", incarnation=life)
            self.adopt(Worker(name, life, "", {}), [job])

    # -- epochs --------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def lose_everything(self, data: st.DataObject) -> None:
        """Redis is emptied. Postgres knows of the attempts but of the last claims; some workers died meanwhile."""
        before = self.model
        self.ledger.client.flushdb()
        self.model = Model(epoch=before.epoch)
        self.ledger.open(before.epoch + 1)
        self.model.open(before.epoch + 1)
        held = [job for job in before.jobs.values() if job.holds]
        unknown = data.draw(st.lists(st.sampled_from(held), unique_by=lambda job: job.id)) if held else []
        for name, worker in sorted(before.workers.items()):
            shape = Request.of(worker.capacity).shape
            assert self.ledger.reserve(name, worker.incarnation, shape)
            assert self.model.reserve(name, worker.incarnation, dict(worker.capacity))
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
                f"{job.epoch}.{job.attempt}",
                job.request.shape,
                job.order,
                1,
                2 if job.started else 0,
                job.nonce or "",
                job.losses,
            )
            for job in jobs
        ]
        refused = self.ledger.adopt(worker.name, worker.incarnation, adopted)
        assert refused == [job.id for job in jobs if not self.model.adopt(worker.name, worker.incarnation, job)]

    def bring_back(self, before: Model, unknown: list[Job]) -> None:
        """The backlog, in its order, with those of whose last attempt Postgres does not know."""
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
        """What is right is left as it is."""
        assert [self.ledger.recount(name) for name in self.model.workers] == [0] * len(self.model.workers)
        assert [self.ledger.seat(job_id) for job_id in self.model.jobs] == [0] * len(self.model.jobs)
        assert not any(self.ledger.mend(one.request.shape, one.job) for one in self.model.backlog())

    def compare(self) -> None:
        lines = differences(observe(self.ledger.client), expected(self.model))
        assert lines == [], "\n".join(["", *lines])

    def teardown(self) -> None:
        """Everything ends; at rest every allocation is zero (I3), and nothing is left but what is told apart."""
        for job_id in [waiting.job for waiting in self.model.backlog()]:
            self.ledger.cancel(job_id, "cancelled")
            self.model.cancel(job_id, self.rows[job_id][0], "cancelled")
        for name, worker in list(self.model.workers.items()):
            ends = [(job_id, token, "succeeded") for job_id, token in worker.held.items()]
            ended = [Ended(job_id, f"{token[0]}.{token[1]}", outcome) for job_id, token, outcome in ends]
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


def _note(one: Transition) -> Note:
    return Note(one.job, (one.epoch, one.attempt), one.state, Step(one.step), one.worker, one.losses, one.outcome)


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    with open_ledger(redis_url) as ledger:
        yield ledger


@pytest.mark.long
def test_the_books_are_those_of_the_model_after_every_step(ledger: Ledger) -> None:
    machine = type("LedgerMachine", (Machine,), {"ledger": ledger})
    steps = settings(stateful_step_count=50, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
    run_state_machine_as_test(machine, settings=steps)
