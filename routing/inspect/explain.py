"""Explain why a job has not started: the decision of the policy itself, over the books as they stand.

The explanation is a value. Its words are made where it is shown. Nothing is written and nothing is admitted here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

import redis as redispy
from redis.exceptions import RedisError
from sqlalchemy import Connection, func, select

from celery_capacity.routing.database import schema
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.amounts import CPUS
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request, filed_shape, split_shape
from celery_capacity.routing.model.states import FINAL, HOLDING, State, Store
from celery_capacity.routing.policy.placement import Admission, Book, Refusal, order, survey
from celery_capacity.routing.store import backlog, dependencies

#: Most needed jobs that an explanation names.
SHOWN_NEEDS: Final = 10


@dataclass(frozen=True, slots=True)
class Explanation:
    """The reason why a job is where it is.

    `resource`, `asked` and `free` (millicores, bytes or counts) tell the shortage on the worker (`worker`) that comes
    closest. `place` is the job's place, from 1, among the jobs with an equal request. `before` is the number of all
    waiting jobs that come earlier in order, for any request.
    """

    job: str
    state: State
    why: Reason
    request: Request
    declared: bool
    resource: str | None = None
    asked: int | None = None
    free: int | None = None
    worker: str | None = None
    place: int | None = None
    before: int | None = None
    due_at: datetime | None = None
    #: workers that would have room if they were empty
    large_enough: int | None = None
    live_workers: int | None = None
    #: the jobs that must succeed first, at most `SHOWN_NEEDS`
    needs: tuple[str, ...] = ()
    #: the rate of its task, as somebody wrote it
    rate: str | None = None

    @property
    def waits(self) -> bool:
        """Return whether the job waits: it neither runs nor has ended."""
        return self.why not in (Reason.RUNS, Reason.ENDED)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "why": self.why.value,
            "request": self.request.to_people(),
            "asked": self._number(self.asked),
            "free": self._number(self.free),
            "due_at": None if self.due_at is None else self.due_at.astimezone(UTC).isoformat(),
        }

    def _number(self, amount: int | None) -> int | float | None:
        return amounts.cpus_number(amount) if amount is not None and self.resource == CPUS else amount


def explain(client: redispy.Redis, connection: Connection, job: str) -> Explanation | None:
    """Return why `job` is where it is; None where Postgres has no such job. At most four round trips to Redis.

    The archive is searched too. All jobs there have ended.
    """
    row = _row(connection, job)
    if row is None:
        return _archived(connection, job)
    state, request = State(row.state), Request.from_shape(row.shape)
    if state is State.SCHEDULED and row.due_at is None:
        return _constrained(connection, job, row, request)
    simple = _without_books(state)
    if simple is not None:
        worker = row.worker if state in HOLDING else None
        due_at = row.due_at if state is State.SCHEDULED else None
        return Explanation(job, state, simple, request, row.declared, worker=worker, due_at=due_at)
    if connection.execute(select(schema.authority.c.authority)).scalar_one_or_none() == Store.POSTGRES:
        return Explanation(job, state, Reason.LEDGER_STANDS_BACK, request, row.declared)
    try:
        head = snapshot.read_head(client)
        if head.epoch is None:
            return Explanation(job, state, Reason.LEDGER_CLOSED, request, row.declared)
        books = snapshot.read_books(client, head.leases)
        card = snapshot.read_cards(client, [job]).get(job)
        held = Request.from_shape(card.shape) if card is not None and card.shape else request
        filed = card.shape if card is not None and card.shape else filed_shape(request.shape, row.name)
        _, task = split_shape(filed)
        catalogues = {book.catalogue for book in books.values()} - {""}
        ahead, before, knowing = _ahead(client, head.shapes, filed, order(row.priority, row.seq), catalogues, task)
    except RedisError:
        return Explanation(job, state, Reason.LEDGER_UNREACHABLE, request, row.declared)
    if head.staying:
        ahead_there, before_there = backlog.staying_before(connection, filed, row.priority, row.seq)
        ahead, before = ahead + ahead_there, before + before_there
    live = [book.to_policy(head.now, knowing) for book in books.values() if head.is_live(book)]
    refusal = refuse(held, live, ahead, task)
    why = Reason.ABOUT_TO_START if refusal is None else refusal.reason
    if state is State.ACCEPTED and why in (Reason.ABOUT_TO_START, Reason.BEHIND_SHAPE):
        why = Reason.ON_ITS_WAY
    return Explanation(
        job,
        state,
        why,
        request,
        row.declared,
        resource=(refusal and refusal.resource) or None,
        asked=refusal.asked if refusal and refusal.resource else None,
        free=refusal.free if refusal and refusal.resource else None,
        worker=(refusal and refusal.worker) or None,
        place=ahead + 1,
        before=before,
        large_enough=sum(1 for book in live if book.knows(task) and _when_empty(request, book)),
        live_workers=len(live),
    )


def _row(connection: Connection, job: str) -> Any:
    jobs = schema.jobs.c
    return connection.execute(
        select(
            jobs.state,
            jobs.shape,
            jobs.declared,
            jobs.worker,
            jobs.due_at,
            jobs.priority,
            jobs.seq,
            jobs.name,
            jobs.needs,
            jobs.not_before,
            func.now().label("now"),
        ).where(jobs.id == job)
    ).one_or_none()


def _constrained(connection: Connection, job: str, row: Any, request: Request) -> Explanation:
    """Explain a constrained job: other jobs, the time that it has then, or the rate of its task."""
    needs = dependencies.needs_of(connection, row.seq, SHOWN_NEEDS) if row.needs else []
    later = row.not_before if row.not_before is not None and row.not_before > row.now else None
    why = Reason.NEEDS_JOBS if row.needs else Reason.SCHEDULED if later else Reason.RATE_LIMIT
    rates = schema.rates.c
    rate = connection.execute(select(rates.said).where(rates.name == row.name)).scalar_one_or_none()
    return Explanation(
        job,
        State.SCHEDULED,
        why,
        request,
        row.declared,
        due_at=later,
        needs=tuple(needs),
        rate=rate if why is Reason.RATE_LIMIT else None,
    )


def _archived(connection: Connection, job: str) -> Explanation | None:
    gone = schema.jobs_archive.c
    query = select(gone.state, gone.request, gone.declared).where(gone.id == job).order_by(gone.seq.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    return Explanation(job, State(row.state), Reason.ENDED, Request.from_people(row.request), row.declared)


def refuse(request: Request, live: Sequence[Book], ahead: int, task: str = "") -> Refusal | None:
    """Return the policy's reason for not admitting a request; None where it would admit it."""
    decision = survey(request, live, ahead, task)
    return None if isinstance(decision, Admission) else decision


def _without_books(state: State) -> Reason | None:
    """Return the reason where the state alone tells it, else None."""
    if state in FINAL:
        return Reason.ENDED
    if state in HOLDING:
        return Reason.RUNS
    plain: Mapping[State, Reason] = {State.SCHEDULED: Reason.SCHEDULED, State.REPLACED: Reason.REPLACED}
    return plain.get(state)


def _when_empty(request: Request, book: Book) -> bool:
    large_enough = all(amount <= book.capacity.get(name, 0) for name, amount in request.amounts)
    return book.admitting and book.serves(request) and large_enough


def _ahead(
    client: redispy.Redis, shapes: Sequence[str], shape: str, order: int, catalogues: Collection[str], task: str
) -> tuple[int, int, dict[str, frozenset[str]]]:
    """Count the waiting jobs before `order`: with this shape, and in all. One round trip.

    Also return which of these catalogues have the task, each as the tasks of interest in it.
    """
    pipe = client.pipeline(transaction=False)
    for queued in shapes:
        pipe.zcount(keys.wait(queued), "-inf", f"({order}")
    for catalogue in catalogues:
        pipe.sismember(keys.tasks(catalogue), task)
    replies = iter(pipe.execute())
    counts = {queued: int(next(replies)) for queued in shapes}
    knowing = {catalogue: frozenset({task} if next(replies) else ()) for catalogue in catalogues}
    return counts.get(shape, 0), sum(counts.values()), knowing
