"""Explain why a job has not started: the decision of the policy itself, over the books as they stand.

The explanation is a value. Its words are made where it is shown. Nothing is written and nothing is admitted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import redis as redispy
from redis.exceptions import RedisError
from sqlalchemy import Connection, func, select

from celery_capacity.routing.database import schema, tenants
from celery_capacity.routing.forecast.cluster import TooLarge, live_books
from celery_capacity.routing.forecast.line import Line, read_rivals
from celery_capacity.routing.forecast.shares import past_use, read_shares, with_past
from celery_capacity.routing.forecast.starts import EstimatedStart, estimated_start
from celery_capacity.routing.insert import key_lines
from celery_capacity.routing.inspect import held_back, running_jobs, waiting
from celery_capacity.routing.inspect.explanation import Explanation, over_quota
from celery_capacity.routing.inspect.waiting import LedgerReading
from celery_capacity.routing.ledger import snapshot
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import (
    Request,
    alternatives_of,
    filed_shape,
    run_time_of,
    split_shape,
    terms_of,
)
from celery_capacity.routing.model.states import FINAL, HOLDING, State, Store
from celery_capacity.routing.policy.feasibility import (
    count_before,
    first_possible,
    judge,
    large_workers,
    startable_shapes,
)
from celery_capacity.routing.policy.labels import place_of, words_of_labels
from celery_capacity.routing.policy.missing import missing_on_each, unblocked_by
from celery_capacity.routing.policy.pauses import Pauses
from celery_capacity.routing.policy.placement import Admission, Book, Refusal, Waiting, order
from celery_capacity.routing.policy.reservation import Reservation, Rules, comes_first
from celery_capacity.routing.policy.tenants import Sharing, tenant_of
from celery_capacity.routing.store import controls, dependencies

#: Most needed jobs that an explanation names.
SHOWN_NEEDS: Final = 10
#: Workers of which an explanation says what is missing there.
SHOWN_WORKERS: Final = 5
#: Workers whose running jobs are looked at for those whose ends make room: the closest ones.
LOOKED_AT: Final = 64
#: Lost attempts after which a job ends, where the caller does not say.
MAX_LOSSES: Final = 3
#: Reasons for which an explanation says what each worker lacks.
SHORT_OF_ROOM: Final = frozenset(
    {Reason.NO_ROOM, Reason.ALONE, Reason.TOO_LARGE, Reason.UNKNOWN_RESOURCE, Reason.NO_WORKER}
)
#: Reasons for which a start can be estimated: the job waits for nothing but room.
ESTIMATED: Final = frozenset(
    {
        Reason.NO_ROOM,
        Reason.ALONE,
        Reason.RESERVED,
        Reason.BEHIND_SHAPE,
        Reason.CORDONED,
        Reason.TENANT_SHARE,
        Reason.LEDGER_STANDS_BACK,
    }
)
#: Seconds without a heartbeat after which Postgres no longer counts a worker, where the caller does not say.
WORKER_TTL: Final = 60.0
#: Seconds in which past use of tenants halves, by default.
SHARE_HALVES_IN: Final = 600.0


def explain(
    client: redispy.Redis,
    connection: Connection,
    job: str,
    most_losses: int = MAX_LOSSES,
    rules: Rules | None = None,
    worker_ttl: float = WORKER_TTL,
    share_halves_in: float = SHARE_HALVES_IN,
) -> Explanation | None:
    """Return why `job` is where it is; None where Postgres has no such job. At most seven round trips to Redis.

    The archive is searched too. All jobs there have ended. `most_losses`, `worker_ttl` and
    `share_halves_in`: the settings of the workers.
    With `rules`, those by which the workers start jobs, the start of a job that waits for room is estimated. That takes
    up to some seconds where many jobs are before it.
    """
    return explain_by(LedgerReading(client), connection, job, most_losses, rules, worker_ttl, share_halves_in)


def explain_by(
    reading: LedgerReading,
    connection: Connection,
    job: str,
    most_losses: int = MAX_LOSSES,
    rules: Rules | None = None,
    worker_ttl: float = WORKER_TTL,
    share_halves_in: float = SHARE_HALVES_IN,
) -> Explanation | None:
    """Explain a job by a reading of the ledger that other explanations share. See `explain`."""
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
    if (pause := controls.pause_of(connection, row.queue, row.name, tenant_of(row.shape))) is not None:
        return Explanation(job, state, Reason.PAUSED, request, row.declared, pause=pause)
    sharing = tenants.sharing_in_use(connection)
    if sharing is not None:
        sharing = replace(sharing, past=past_use(reading.client))
    alternatives = alternatives_of(row.shape)
    exceeded = [sharing.exceeded(tenant_of(row.shape), it) for it in alternatives] if sharing else []
    if sharing is not None and all(exceeded):
        return over_quota(job, row, sharing)
    if connection.execute(select(schema.authority.c.authority)).scalar_one_or_none() == Store.POSTGRES:
        explanation = Explanation(job, state, Reason.LEDGER_STANDS_BACK, request, row.declared)
        return replace(explanation, estimate=_estimated_by_rows(connection, job, row, rules, most_losses, worker_ttl))
    try:
        seen = _read_ledger(reading, connection, job, row, most_losses, sharing is not None)
    except RedisError:
        return Explanation(job, state, Reason.LEDGER_UNREACHABLE, request, row.declared)
    if seen is None:
        return Explanation(job, state, Reason.LEDGER_CLOSED, request, row.declared)
    passed_over = [alternative for alternative, resource in zip(alternatives, exceeded, strict=False) if resource]
    explanation = _explain_waiting(connection, job, row, seen, most_losses, passed_over)
    if sharing is not None and passed_over and explanation.why in (Reason.TOO_LARGE, Reason.UNKNOWN_RESOURCE):
        # No worker could hold what the quota leaves.
        return over_quota(job, row, sharing)
    if sharing is not None:
        explanation = _in_line(connection, explanation, row, seen, sharing)
    if sharing is not None and explanation.why is Reason.RESERVED:
        explanation = _by_turns(explanation, seen, order(row.priority, row.seq), sharing)
    if rules is None or explanation.why not in ESTIMATED:
        return explanation
    live = [book for book in seen.registered if book.worker in seen.live]
    shares = None if sharing is None else with_past(sharing, reading.client, share_halves_in)
    start = estimated_start(connection, job, (row.priority, row.seq), live, rules, most_losses, shares)
    return replace(explanation, estimate=start)


def _estimated_by_rows(
    connection: Connection, job: str, row: Any, rules: Rules | None, most_losses: int, worker_ttl: float
) -> EstimatedStart | None:
    """Estimate the start of a job while Postgres decides: each worker pulls what fits it."""
    if rules is None:
        return None
    try:
        books = live_books(connection, worker_ttl)
    except TooLarge:
        return None
    shares = read_shares(connection, None, 0.0)
    return estimated_start(connection, job, (row.priority, row.seq), books, rules, most_losses, shares)


@dataclass(frozen=True, slots=True)
class _Ledger:
    """The ledger as one job sees it. `held`: the request that its next attempt holds. `registered`: all workers.

    `before`: the waiting jobs that come before the job, by the shape under which they are filed. `reservations`: those
    of the workers, by name. `higher`: those of `before` that have a higher priority.
    """

    held: Request
    filed: str
    registered: Sequence[Book]
    live: frozenset[str]
    before: Mapping[str, int]
    higher: Mapping[str, int]
    reservations: Mapping[str, Reservation]


def _read_ledger(
    reading: LedgerReading, connection: Connection, job: str, row: Any, most_losses: int, shared: bool
) -> _Ledger | None:
    """Read the books and the backlog; return None where the ledger is cold. Raises `RedisError`.

    `shared`: tenants are in use.
    """
    client, head = reading.client, reading.head
    if head.epoch is None:
        return None
    card = snapshot.read_cards(client, [job]).get(job)
    filed = card.shape if card is not None and card.shape else filed_shape(row.shape, row.name)
    before = _count_before(reading, connection, row.priority, row.seq, most_losses)
    tasks = {split_shape(shape).task for shape in (filed, *before)} - {""}
    registered = reading.registered(tasks)
    return _Ledger(
        held=first_possible(filed, registered),
        filed=filed,
        registered=registered,
        live=frozenset(book.worker for book in reading.books if head.is_live(book)),
        before=before,
        higher=_count_before(reading, connection, row.priority, 0, most_losses) if shared else {},
        reservations={book.worker: book.reservation for book in reading.books if book.reservation is not None},
    )


def _count_before(
    reading: LedgerReading, connection: Connection, priority: int, seq: int, most_losses: int
) -> Counter[str]:
    """Count the waiting jobs that come before a place, by the shape under which they are filed."""
    client, head, position = reading.client, reading.head, order(priority, seq)
    # A shape whose jobs all stand at its border or behind it is not among the waiting shapes.
    borders = reading.borders
    before = Counter(waiting.count_before(client, list({*head.shapes, *borders}), position))
    if head.staying:
        before.update(reading.staying_before(connection, priority, seq))
    if head.left:
        before.update(waiting.count_left(client, connection, borders, most_losses, position))
    return before


def _explain_waiting(
    connection: Connection, job: str, row: Any, seen: _Ledger, most_losses: int, passed_over: Sequence[Request]
) -> Explanation:
    """Explain a job that waits in the ledger, or is on its way there: by the policy, over the books.

    `passed_over`: alternatives that a quota holds back.
    """
    state, request = State(row.state), Request.from_shape(row.shape)
    task = split_shape(seen.filed).task
    ahead = _like(seen.filed, seen.before)
    pauses = Pauses(frozenset(pause.scope for pause in controls.pauses(connection)))
    startable = {filed: number for filed, number in seen.before.items() if not pauses.hold_back(filed)}
    bound = run_time_of(seen.filed).bound
    terms, location = terms_of(seen.filed), place_of(seen.filed)
    first = Request.from_shape(split_shape(seen.filed)[0])
    decision = judge(first, seen.registered, ahead, task, bound, terms, passed_over)
    refusal = None if isinstance(decision, Admission) else decision
    why = Reason.ABOUT_TO_START if refusal is None else refusal.reason
    if state is State.ACCEPTED and why in (Reason.ABOUT_TO_START, Reason.BEHIND_SHAPE):
        why = Reason.ON_ITS_WAY
    live = [book for book in seen.registered if book.worker in seen.live]
    cordon = held_back.cordon_in_the_way(connection, seen.filed, live, refusal)
    if cordon is not None:
        why, refusal = Reason.CORDONED, Refusal(Reason.CORDONED, worker=cordon.worker)
    missing = missing_on_each(seen.held, seen.registered, task, bound, terms) if why in SHORT_OF_ROOM else []
    large = large_workers(alternatives_of(row.shape), seen.registered, task, terms)
    unblocking = None
    if why in (Reason.NO_ROOM, Reason.ALONE):
        workers = [line.worker for line in missing if line.admits and line.worker in large][:LOOKED_AT]
        running = running_jobs.on_workers(connection, workers, most_losses)
        unblocking = unblocked_by(seen.held, seen.registered, running, task, bound, terms)
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
        before=sum(seen.before.values()),
        position=count_before(startable, seen.registered),
        large_enough=sum(book.admitting and book.worker in large for book in seen.registered),
        live_workers=len(seen.live),
        missing=tuple(missing[:SHOWN_WORKERS]),
        more_missing=max(0, len(missing) - SHOWN_WORKERS),
        unblocked_by=unblocking,
        cordon=cordon,
        where=str(location) or None,
        exclusive=bool(location.exclusive),
        labels=words_of_labels([book.labels for book in seen.registered], terms) if why is Reason.NO_LABEL else None,
    )


def _by_turns(explanation: Explanation, seen: _Ledger, position: int, sharing: Sharing) -> Explanation:
    """Return the explanation of a job beside a reservation with the turns of tenants.

    A job whose turn is first passes the reservation, as soon as the jobs of its shape before it have started.
    """
    reservation = seen.reservations.get(explanation.worker or "")
    if reservation is None:
        return explanation
    waiting = Waiting(explanation.job, seen.held, position, terms=terms_of(seen.filed))
    if comes_first(waiting, reservation, sharing):
        why = Reason.BEHIND_SHAPE if (explanation.place or 1) > 1 else Reason.ABOUT_TO_START
        return replace(explanation, why=Reason.ON_ITS_WAY if explanation.state is State.ACCEPTED else why)
    tenant = tenant_of(reservation.shape)
    return explanation if tenant == tenant_of(seen.filed) else replace(explanation, tenant=tenant)


def _in_line(
    connection: Connection, explanation: Explanation, row: Any, seen: _Ledger, sharing: Sharing
) -> Explanation:
    """Return the explanation of a job with its place in the line of all tenants, and with the tenant that is first."""
    pauses = Pauses(frozenset(pause.scope for pause in controls.pauses(connection)))
    rivals = read_rivals(connection, tenant_of(seen.filed), row.priority)
    admissible = [
        filed
        for filed in {*seen.before, *rivals.shapes}
        if not pauses.hold_back(filed)
        and not all(sharing.exceeded(tenant_of(filed), request) for request in alternatives_of(filed))
    ]
    may_start = startable_shapes(admissible, seen.registered)
    startable = {filed: number for filed, number in seen.before.items() if number > 0 and filed in may_start}
    higher = {filed: seen.higher.get(filed, 0) for filed in startable}
    earlier = {filed: number - higher[filed] for filed, number in startable.items()}
    line = Line(rivals, sharing, may_start)
    position = line.count_before(seen.filed, row.seq, higher, earlier)
    first = line.first_tenant(seen.filed) if explanation.why is Reason.NO_ROOM else None
    if first is None:
        return replace(explanation, position=position)
    return replace(explanation, position=position, why=Reason.TENANT_SHARE, tenant=first)


def _like(filed: str, before: Mapping[str, int]) -> int:
    """Return how many of these jobs are like a filed shape, whatever run time is expected."""
    kind = (*split_shape(filed)[:2], terms_of(filed))
    return sum(number for other, number in before.items() if (*split_shape(other)[:2], terms_of(other)) == kind)


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
            jobs.queue,
            jobs.needs,
            jobs.not_before,
            func.now().label("now"),
        ).where(jobs.id == job)
    ).one_or_none()


def _constrained(connection: Connection, job: str, row: Any, request: Request) -> Explanation:
    """Explain a constrained job: other jobs, the time that it has then, one of its keys, or the rate of its task."""
    needs = dependencies.needs_of(connection, row.seq, SHOWN_NEEDS) if row.needs else []
    later = row.not_before if row.not_before is not None and row.not_before > row.now else None
    key = None if row.needs or later else key_lines.held_by(connection, job)
    why = Reason.NEEDS_JOBS if row.needs else Reason.SCHEDULED if later else Reason.RATE_LIMIT
    why = why if key is None else Reason.KEY_LIMIT
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
        key=key,
    )


def _archived(connection: Connection, job: str) -> Explanation | None:
    gone = schema.jobs_archive.c
    query = select(gone.state, gone.request, gone.declared).where(gone.id == job).order_by(gone.seq.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    return Explanation(job, State(row.state), Reason.ENDED, Request.from_people(row.request), row.declared)


def _without_books(state: State) -> Reason | None:
    """Return the reason where the state alone tells it, else None."""
    if state in FINAL:
        return Reason.ENDED
    if state in HOLDING:
        return Reason.RUNS
    plain: Mapping[State, Reason] = {State.SCHEDULED: Reason.SCHEDULED, State.REPLACED: Reason.REPLACED}
    return plain.get(state)
