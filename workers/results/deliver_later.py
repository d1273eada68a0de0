"""Delivery of outboxes that stand in the rows of ended jobs.

Such a job's worker died before it could deliver, the result backend was away, or no worker was there to tell the end.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from celery import Celery, states
from celery.app.task import Context
from celery.exceptions import WorkerLostError
from kombu.compression import decompress
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.serialization import loads, prepare_accept_content
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DataError

from celery_capacity.routing.errors import Infeasible, NotAccepted, Unsupported
from celery_capacity.routing.insert import replacements
from celery_capacity.routing.model import message as messages
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.outbox import UNANNOUNCED, UNTOLD, Outbox, parse
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.states import State
from celery_capacity.routing.model.token import NO_ATTEMPT, Token
from celery_capacity.routing.store import fencing, refused_transitions
from celery_capacity.workers.process.attempts import Attempt, held
from celery_capacity.workers.process.stores import Stores, transactions
from celery_capacity.workers.results import running_workers
from celery_capacity.workers.results.backends import HOPELESS, kept_of
from celery_capacity.workers.results.chord_parts import ChordPart, ChordParts
from celery_capacity.workers.results.deliver import as_part, chords_in, deliver
from celery_capacity.workers.results.events import Announcer, failure_of

logger = logging.getLogger(__name__)

#: Most rows delivered in one pass.
MAX_ROWS: Final = 1000
#: Most rows with nothing but results that are delivered in one transaction.
TOGETHER: Final = 100
#: Most bytes of the outboxes in such a transaction. Results are not compressed on their way.
TOGETHER_BYTES: Final = 1024**2

#: Errors that lie in the outbox of a single job: a class that this process cannot import, a value that does not fit
#: into the backend.
OF_A_JOB: Final = (
    TypeError, ValueError, LookupError, AttributeError, ImportError, DecodeError, ContentDisallowed, DataError,
)  # fmt: skip

_LEFT: Final = text(
    "SELECT id, epoch, attempt, state, error, outbox, message, coalesce(incarnation, '') AS incarnation, replaces "
    "FROM jobs WHERE outbox IS NOT NULL AND (:announces OR outbox <> :unannounced) "
    "AND (CAST(:ids AS text[]) IS NULL OR id = ANY(CAST(:ids AS text[]))) "
    # The outbox ends with the worker that is delivering it, see `Outbox.to_text`.
    "AND NOT EXISTS (SELECT 1 FROM workers w WHERE w.incarnation <> :me AND w.status IN ('ready', 'draining') "
    """AND w.incarnation = substring(right(outbox, :tail) FROM '"by": "([^"]+)"[}]$')) """
    "ORDER BY id LIMIT :most"
)
#: Characters at the end of an outbox that name the delivering worker.
_TAIL: Final = 500
#: Locks a row for its delivery, unless another process has it or has delivered it since it was read.
_MINE: Final = text("SELECT id FROM jobs WHERE id = :id AND outbox = :outbox FOR NO KEY UPDATE SKIP LOCKED")
#: Locks many rows that are to be delivered. Outboxes may be large, so they are compared by a digest.
_ALL_MINE: Final = text("""
SELECT j.id FROM unnest(CAST(:ids AS text[]), CAST(:digests AS text[])) AS x (id, digest)
JOIN jobs j ON j.id = x.id AND md5(j.outbox) = x.digest ORDER BY j.id FOR NO KEY UPDATE OF j SKIP LOCKED
""")
_ALL_DONE: Final = text("UPDATE jobs SET outbox = NULL WHERE id = ANY(CAST(:ids AS text[]))")
_DONE: Final = text("UPDATE jobs SET outbox = :rest WHERE id = :id AND outbox = :outbox")
#: Waits for a transaction that writes the row at this moment.
_LOCK: Final = text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE")


def deliver_rows(app: Celery, stores: Stores, only: list[str] | None = None) -> int:
    """Deliver the outboxes of all jobs, or `only` these; return how many. Stops where the backend does not take one."""
    replaced = set[str]()
    parts = parts_of(app)
    with transactions(stores.engine).connect() as connection:
        with connection.begin():
            announces = {"announces": announcer_of(app) is not None, "unannounced": UNANNOUNCED}
            by = {"me": parts.incarnation if parts is not None else "", "tail": _TAIL}
            rows = connection.execute(_LEFT, {"ids": only, "most": MAX_ROWS, **announces, **by}).all()
        plain = [row for row in rows if _has_results_alone(row)]
        together, refused, answers = _deliver_together(app, connection, plain)
        delivered = len(together)
        replaced |= {row.replaces for row in together} - {None}
        alone = {row.id for row in plain} - {row.id for row in refused}
        for row in [row for row in rows if row.id not in alone] if answers else ():
            with connection.begin():
                if connection.execute(_MINE, {"id": row.id, "outbox": row.outbox}).first() is None:
                    continue
                done = _deliver(app, connection, row, parts)
                if done is None:
                    continue
                if not done:
                    break
                delivered += 1
                replaced |= {row.replaces} - {None}
        with connection.begin():
            # An ended step of a replacement publishes nothing more, so its replaced job may end.
            ended = replacements.end_abandoned(connection, sorted(replaced))
    return delivered + (deliver_rows(app, stores, ended) if ended else 0)


def _has_results_alone(row: Any) -> bool:
    """Return True if a row left results alone: nothing that takes longer than the backend, or needs more than it."""
    if len(row.outbox) > TOGETHER_BYTES:
        return False
    try:
        outbox = parse(row.outbox)
        is_more = outbox.publishes or outbox.by
        return bool(outbox.results) and not is_more and all("result" in note for note in outbox.results)
    except (ValueError, TypeError, LookupError):
        return False


def _batches(rows: Sequence[Any]) -> Iterator[list[Any]]:
    batch, size = list[Any](), 0
    for row in rows:
        if batch and (len(batch) == TOGETHER or size + len(row.outbox) > TOGETHER_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row.outbox)
    if batch:
        yield batch


def _deliver_together(app: Celery, connection: Connection, rows: Sequence[Any]) -> tuple[list[Any], list[Any], bool]:
    """Deliver rows with results alone, many in one transaction: after an outage there may be tens of thousands.

    Return the delivered rows, the rows to be tried one by one since the backend refuses one of them, and whether the
    backend answers.
    """
    delivered, refused = list[Any](), list[Any]()
    for batch in _batches(rows):
        some = {row.id: row for row in batch}
        digests = [hashlib.md5(row.outbox.encode(), usedforsecurity=False).hexdigest() for row in batch]
        with connection.begin():
            values = {"ids": list(some), "digests": digests}
            mine = [some[job] for job in connection.execute(_ALL_MINE, values).scalars()]
            results = [note for row in mine for note in parse(row.outbox).results]
            speaker = Attempt(Tag("", NO_ATTEMPT), "", patient=lambda: True)
            try:
                deliver(app.backend, Outbox([], results), speaker)
            except Exception as error:
                if isinstance(error, OF_A_JOB):
                    refused += mine
                    continue
                logger.warning("the outboxes of %d jobs are not delivered yet: %s", len(mine), error)
                return delivered, refused, False
            connection.execute(_ALL_DONE, {"ids": [row.id for row in mine]})
        delivered += mine
    return delivered, refused, True


def deliver_parts(app: Celery, stores: Stores, jobs: Sequence[str]) -> None:
    """Have the chord parts of jobs counted while the backend takes no results. Parts counted in Redis stay in rows."""
    parts = parts_of(app)
    with transactions(stores.engine).connect() as connection:
        with connection.begin():
            by = {"me": parts.incarnation if parts is not None else "", "tail": _TAIL}
            values = {"ids": list(jobs), "most": len(jobs), "announces": True, "unannounced": UNANNOUNCED, **by}
            rows = connection.execute(_LEFT, values).all()
        for row in rows:
            outbox = parse(row.outbox)
            if chords_in(outbox):
                with connection.begin():
                    if connection.execute(_MINE, {"id": row.id, "outbox": row.outbox}).first() is not None:
                        _deliver_parts(app, connection, row, outbox, parts)


def _deliver_parts(app: Celery, connection: Connection, row: Any, outbox: Outbox, parts: ChordParts | None) -> None:
    job, engine = row.id, connection.engine
    speaker = Attempt(Tag(job, Token(row.epoch, row.attempt)), row.incarnation, patient=lambda: True)
    results = [note for note in outbox.results if "chord" not in note]
    rest = Outbox(outbox.publishes, results).to_text()
    by = replace(outbox, by=parts.incarnation if parts is not None else "").to_text()

    def afterwards(error: Exception | None) -> None:
        if error is not None:
            logger.info("the part of a chord that job %s left is not counted yet: %s", job, error)
        note_rest(engine, job, by, rest if error is None else replace(outbox, by="").to_text())

    chords = Outbox([], chords_in(outbox))
    part = as_part(speaker, outbox, lambda: deliver(app.backend, chords, speaker), afterwards)
    _bring(parts, part)
    if part.late:
        connection.execute(_DONE, {"id": job, "outbox": row.outbox, "rest": by})
    elif part.done:
        connection.execute(_DONE, {"id": job, "outbox": row.outbox, "rest": rest or None})


def tell_late(app: Celery, engine: Engine, incarnation: str, job: str, token: Token, left: str) -> None:
    """Deliver the outbox of an attempt whose end was refused, if the attempt had ended its job itself.

    It did so within `celery_capacity.fenced`, before it lost its lease. Then its value is the job's, however late it
    comes. The outbox of any other refused attempt is dropped.
    """
    with engine.connect() as connection:
        if not fencing.has_succeeded(connection, job, token):
            return
    speaker = Attempt(Tag(job, token), incarnation, patient=lambda: True)
    outbox, parts = parse(left), parts_of(app)

    def afterwards(error: Exception | None) -> None:
        if error is not None:
            logger.warning("the late outbox of job %s is dropped: %s", job, error)

    part = as_part(speaker, outbox, lambda: deliver(app.backend, outbox, speaker), afterwards)
    # A value alone needs no thread, so that it is not dropped because chord parts are late.
    _bring(parts if chords_in(outbox) else None, part)
    if part.late:
        return
    if part.error is not None:
        raise part.error
    if not part.done:
        logger.error("the late outbox of job %s is dropped: too many parts of chords are late", job)


def note_rest(engine: Engine, job: str, left: str, rest: str | None) -> None:
    """Replace the outbox `left` in a row by `rest`, once the row says `left`. Waits for a writer of the row."""
    with transactions(engine).begin() as connection:
        connection.execute(_LOCK, {"id": job})
        connection.execute(_DONE, {"id": job, "outbox": left, "rest": rest or None})


def _deliver(app: Celery, connection: Connection, row: Any, parts: ChordParts | None) -> bool | None:
    """Deliver a row's outbox; return True if that is done, False if the backend takes none, None if this row waits."""
    job, outbox = row.id, _outbox_of(app, connection.engine, row)
    speaker = Attempt(Tag(job, Token(row.epoch, row.attempt)), row.incarnation, patient=lambda: True)
    by = replace(outbox, by=parts.incarnation if parts is not None else "").to_text()
    engine = connection.engine

    def announce() -> str | None:
        return _announce(app, outbox, job, State(row.state), row.error, row.message)

    def afterwards(error: Exception | None) -> None:
        if error is not None:
            logger.warning("the outbox of job %s is not delivered yet: %s", job, error)
        note_rest(engine, job, by, announce() if error is None else replace(outbox, by="").to_text())

    part = as_part(speaker, outbox, lambda: _tell_all(app, row, outbox, speaker), afterwards)
    part.late = parts is not None and parts.is_under_way(part.key)
    if not part.late:
        # Results alone need no thread, since they take only as long as the backend.
        _bring(parts if chords_in(outbox) or _untold(outbox) else None, part)
    if part.late:
        # Also if the row does not name this worker yet: such a row was written from the entry in the stream.
        connection.execute(_DONE, {"id": job, "outbox": row.outbox, "rest": by})
        return None
    if part.error is not None:
        logger.warning("the outbox of job %s is not delivered yet: %s", job, part.error)
        # The outbox stays in the row. Any other error concerns the backend, and so all other rows.
        return None if isinstance(part.error, OF_A_JOB) else False
    if not part.done:
        return None
    connection.execute(_DONE, {"id": job, "outbox": row.outbox, "rest": announce()})
    return True


def _outbox_of(app: Celery, engine: Engine, row: Any) -> Outbox:
    """Return the outbox of a row. An unreadable outbox is set aside, and the result is made from the row's state."""
    try:
        return parse(row.outbox)
    except (ValueError, TypeError, LookupError) as error:
        left = {"job": row.id, "token": str(Token(row.epoch, row.attempt)), "outbox": row.outbox}
        detail = f"the outbox of job {row.id} cannot be read: {error!r}"
        tally = app.platform.ledger.tally
        refused_transitions.set_aside(engine, tally, left, Refusal.UNREADABLE_OUTBOX, detail)
        return parse(UNTOLD)


def _bring(parts: ChordParts | None, part: ChordPart) -> None:
    """Deliver a part in a thread of `parts`, or in this thread where there is none: a process that is no worker."""
    if parts is not None:
        list(parts.deliver([part]))
        return
    try:
        part.deliver()
        part.done = True
    except Exception as error:
        part.error = error


def _tell_all(app: Celery, row: Any, outbox: Outbox, speaker: Attempt) -> None:
    deliver(app.backend, outbox, speaker)
    untold = _untold(outbox)
    # A thread that delivers for an attempt reads the state from the backend itself, never from a row.
    with held(speaker):
        if untold and not (untold[0].get("unless_told") and app.backend.get_state(row.id) in states.READY_STATES):
            _tell_anyhow(app, row.id, State(row.state), row.error or "", bytes(row.message))


def _untold(outbox: Outbox) -> list[dict[str, Any]]:
    return [note for note in outbox.results if "untold" in note]


def _announce(app: Celery, outbox: Outbox, job: str, state: State, error: str | None, message: bytes) -> str | None:
    """Send the events and signals for the end of a job that no worker held; return the outbox that stays in the row.

    Only a worker sends them. Where this process is no worker, the outbox says that the end is not announced yet.
    """
    silent = state in (State.CANCELLED, State.EXPIRED, State.LOST) or Infeasible.is_told_by(error)
    if not silent or not any("untold" in note or "unannounced" in note for note in outbox.results):
        return None
    announcer = announcer_of(app)
    if announcer is None:
        return UNANNOUNCED
    try:
        request = context_of(app, bytes(message))
    except Exception as problem:
        logger.info("the end of job %s is not announced, its message cannot be read: %s", job, problem)
    else:
        announcer.ended(job, state, error or "", request)
    return None


def parts_of(app: Celery) -> ChordParts | None:
    """Return the deliverer of chord parts in this process, None where it is no worker."""
    worker = running_workers.newest(app)
    return worker.parts if worker is not None and worker.parts.pid == os.getpid() else None


def announcer_of(app: Celery) -> Announcer | None:
    """Return the sender of events and signals in this process, None where it is no worker."""
    worker = running_workers.newest(app)
    return None if worker is None else worker.announcer


def _tell_anyhow(app: Celery, job: str, state: State, error: str, message: bytes) -> None:
    """Like `_tell`, for an unreadable message or callback too: store the bare result so that waiters are released."""
    try:
        request = context_of(app, message)
    except Exception as problem:
        # `context_of` asks no store: its error would come again, and must hold up no other job's end.
        logger.warning("the message of job %s cannot be read: only its result is stored: %s", job, problem)
        request = Context(id=job)
    try:
        _tell(app, job, state, error, request)
    except (*HOPELESS, Unsupported, NotAccepted):
        logger.exception("a callback of job %s cannot be called: only its result is stored", job)
        _tell(app, job, state, error, Context(id=job))


def _tell(app: Celery, job: str, state: State, error: str, request: Context) -> None:
    """Store the result of a job that ended while no worker held it, and tell its chord and its callbacks."""
    value_wanted, errors = kept_of(app, request)
    if state is State.SUCCEEDED:
        # The job ended itself (`celery_capacity.fenced`), and its process died before it could return a value. Or the
        # ledger stored its value with its end, and Postgres did not hear of that: such a value stays.
        stored = app.backend.get_state(job) == states.SUCCESS
        value = app.backend.get_result(job) if stored else None
        app.backend.mark_as_done(job, value, request=request, store_result=value_wanted and not stored)
        _go_on(app, job, request, value)
    elif state is State.LOST:
        lost = WorkerLostError(error or "the job was lost with its workers")
        app.backend.mark_as_failure(job, lost, request=request, store_result=errors)
    elif state is State.FAILED:
        # An infeasible or a replaced job comes here: the failure of any other job is told by its worker.
        app.backend.mark_as_failure(job, failure_of(error), request=request, store_result=errors)
    else:
        # Like Celery, store that a job was revoked even where no error of its task is kept.
        kept = errors or state is State.CANCELLED
        app.backend.mark_as_revoked(job, error or state.value, request=request, store_result=kept)


def _go_on(app: Celery, job: str, request: Context, value: Any) -> None:
    """Publish what follows a successful body, like Celery's trace before it returns. A published step keeps its id."""
    following = {"parent_id": job, "root_id": request.root_id or job}
    for callback in request.callbacks or ():
        app.signature(callback).apply_async((value,), **following)
    *later, following_step = request.chain or (None,)
    if following_step is not None:
        app.signature(following_step).apply_async((value,), chain=later, **following)


def context_of(app: Celery, message: bytes) -> Context:
    """Return the request that a job's message makes, as Celery's hooks know it."""
    envelope = messages.decode(message)
    headers, properties = envelope["headers"], envelope["properties"]
    body = messages.body_of(envelope)
    if headers.get("compression"):
        body = decompress(body, headers["compression"])
    accept = prepare_accept_content(app.conf.accept_content)
    args, kwargs, embed = loads(body, envelope["content-type"], envelope["content-encoding"], accept=accept)
    return Context(
        {**headers, **(embed or {})},
        args=args,
        kwargs=kwargs,
        delivery_info=properties.get("delivery_info"),
        reply_to=properties.get("reply_to"),
        correlation_id=properties.get("correlation_id"),
    )
