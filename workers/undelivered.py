"""Delivering what stands in the rows of ended jobs: their worker died before it could, the result backend was away, or
no worker was there to say how they ended."""

from __future__ import annotations

import logging
from typing import Any, Final

from celery import Celery, states
from celery.app.task import Context
from celery.exceptions import TaskError, WorkerLostError
from kombu.compression import decompress
from kombu.serialization import loads, prepare_accept_content
from sqlalchemy import Connection, Engine, text

from routing import fence, outbox, replacing
from routing import message as messages
from routing.errors import NotAccepted, Unsupported
from routing.message import Tag
from routing.outbox import Outbox
from routing.states import State
from workers import living
from workers.announcing import Announcer
from workers.attempts import Attempt, held
from workers.delivery import deliver
from workers.pull import transactions
from workers.results import HOPELESS, kept_of
from workers.stores import Stores

logger = logging.getLogger(__name__)

#: Rows delivered in one pass.
MOST: Final = 1000

_LEFT: Final = text(
    "SELECT id, epoch, attempt, state, error, outbox, message, coalesce(incarnation, '') AS incarnation, replaces "
    "FROM jobs WHERE outbox IS NOT NULL AND (:announces OR outbox <> :unannounced) "
    "AND (CAST(:ids AS text[]) IS NULL OR id = ANY(CAST(:ids AS text[]))) "
    "ORDER BY id LIMIT :most"
)
#: Nobody else delivers a row that is locked, and one that was delivered since it was read is delivered no more.
_MINE: Final = text("SELECT id FROM jobs WHERE id = :id AND outbox = :outbox FOR UPDATE SKIP LOCKED")
_DONE: Final = text("UPDATE jobs SET outbox = :rest WHERE id = :id AND outbox = :outbox")


def deliver_rows(app: Celery, stores: Stores, only: list[str] | None = None) -> int:
    """Deliver for all jobs, or `only` these; returns for how many. Stops where the backend does not take one."""
    delivered, replaced = 0, set[str]()
    with transactions(stores.engine).connect() as connection:
        with connection.begin():
            announces = {"announces": announcer_of(app) is not None, "unannounced": outbox.UNANNOUNCED}
            rows = connection.execute(_LEFT, {"ids": only, "most": MOST, **announces}).all()
        for row in rows:
            with connection.begin():
                if connection.execute(_MINE, {"id": row.id, "outbox": row.outbox}).first() is None:
                    continue
                if not _deliver(app, connection, row):
                    break
                delivered += 1
                replaced |= {row.replaces} - {None}
        with connection.begin():
            # What was a step of a replacement publishes nothing more.
            ended = replacing.end_abandoned(connection, sorted(replaced))
    return delivered + (deliver_rows(app, stores, ended) if ended else 0)


def tell_late(app: Celery, engine: Engine, incarnation: str, job: str, token: str, left: str) -> None:
    """What an attempt left whose end the ledger refused: nobody's business, unless it had ended its job itself before
    it lost its lease (`celery_capacity.fenced`). Then its value is the job's, however late it comes."""
    epoch, _, attempt = token.partition(".")
    with engine.connect() as connection:
        if not fence.has_succeeded(connection, job, int(epoch), int(attempt)):
            return
    speaker = Attempt(Tag(job, int(epoch), int(attempt)), incarnation, patient=lambda: True)
    deliver(app.backend, outbox.parse(left), speaker)


def _deliver(app: Celery, connection: Connection, row: Any) -> bool:
    job, left = row.id, row.outbox
    box = outbox.parse(left)
    speaker = Attempt(Tag(job, row.epoch, row.attempt), row.incarnation, patient=lambda: True)
    try:
        deliver(app.backend, box, speaker)
        untold = [note for note in box.results if "untold" in note]
        if untold and not (untold[0].get("unless_told") and app.backend.get_state(job) in states.READY_STATES):
            with held(speaker):
                _tell_anyhow(app, job, State(row.state), row.error or "", bytes(row.message))
    except Exception as problem:
        # It stays where it is: whatever hinders it now concerns the backend, not the job.
        logger.warning("what job %s left is not delivered yet: %s", job, problem)
        return False
    rest = _announce(app, box, job, State(row.state), row.error, row.message)
    connection.execute(_DONE, {"id": job, "outbox": left, "rest": rest})
    return True


def _announce(app: Celery, box: Outbox, job: str, state: State, error: str | None, message: bytes) -> str | None:
    """Where a job ended that no worker held, a worker says so to whoever listens to events and signals. What then stays
    in the row: where this process is no worker, that it is not announced yet."""
    silent = state in (State.CANCELLED, State.EXPIRED, State.LOST)
    if not silent or not any("untold" in note or "unannounced" in note for note in box.results):
        return None
    announcer = announcer_of(app)
    if announcer is None:
        return outbox.UNANNOUNCED
    try:
        request = context_of(app, bytes(message))
    except Exception as problem:
        logger.info("the end of job %s is not announced, its message cannot be read: %s", job, problem)
    else:
        announcer.ended(job, state, error or "", request)
    return None


def announcer_of(app: Celery) -> Announcer | None:
    """What tells events and signals in this process, None where it is no worker."""
    runtime = living.newest(app)
    announcer: Announcer | None = None if runtime is None else runtime.announcer
    return announcer


def _tell_anyhow(app: Celery, job: str, state: State, error: str, message: bytes) -> None:
    """The same though its message, or what it says is to be called, is such that nobody can make anything of it: then
    whoever waits hears of the end, and no other job's end is kept back."""
    try:
        request = context_of(app, message)
    except Exception as problem:
        # Nothing is asked of a store in there: it lies in the message, and will lie there the next time.
        logger.warning("the message of job %s cannot be read, its result alone is told: %s", job, problem)
        request = Context(id=job)
    try:
        _tell(app, job, state, error, request)
    except (*HOPELESS, Unsupported, NotAccepted):
        logger.exception("what follows job %s cannot be called, its result alone is told", job)
        _tell(app, job, state, error, Context(id=job))


def _tell(app: Celery, job: str, state: State, error: str, request: Context) -> None:
    """The result of a job that ended while no worker held it; its chord and its callbacks hear of it too."""
    value_wanted, errors = kept_of(app, request)
    if state is State.SUCCEEDED:
        # It ended itself (`celery_capacity.fenced`), and its process died before it could return anything; or its value
        # was stored with its end, of which Postgres did not hear: that one stays.
        stored = app.backend.get_state(job) == states.SUCCESS
        value = app.backend.get_result(job) if stored else None
        app.backend.mark_as_done(job, value, request=request, store_result=value_wanted and not stored)
        _go_on(app, job, request, value)
    elif state is State.LOST:
        lost = WorkerLostError(error or "the job was lost with its workers")
        app.backend.mark_as_failure(job, lost, request=request, store_result=errors)
    elif state is State.FAILED:
        # (Only of one that was replaced: whatever else fails is told by its worker.)
        app.backend.mark_as_failure(job, TaskError(error), request=request, store_result=errors)
    else:
        # (As with Celery, whoever revokes a job finds it revoked, whatever is kept of its task.)
        kept = errors or state is State.CANCELLED
        app.backend.mark_as_revoked(job, error or state.value, request=request, store_result=kept)


def _go_on(app: Celery, job: str, request: Context, value: Any) -> None:
    """Publish what comes after a body that succeeded, as Celery's trace does before it returns. (A step that was
    published has its id already, and is left as it is.)"""
    following = {"parent_id": job, "root_id": request.root_id or job}
    for callback in request.callbacks or ():
        app.signature(callback).apply_async((value,), **following)
    *later, following_step = request.chain or (None,)
    if following_step is not None:
        app.signature(following_step).apply_async((value,), chain=later, **following)


def context_of(app: Celery, message: bytes) -> Context:
    """A job's message as Celery's hooks know it: a request."""
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
