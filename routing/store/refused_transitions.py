"""Write transitions so that a transition that Postgres never takes concerns its own job alone.

Postgres may refuse a transition at every try: its encoding has no character for the text of an error, the message of a
retry breaks a rule of the operator, or a page of the row is damaged. A failing batch is halved until such a transition
is alone. It is then written in the first of these ways that Postgres takes:

1. with the same meaning and its error in ASCII;
2. without what it would have published, which goes into the table `quarantine`;
3. as a mark on its row, and into the table `quarantine`. An end stays an end: nobody may run that job again.

A transition that cannot be written in any of these ways stays in the stream. Everything else goes on. An error that
concerns the whole store (no connection, a full disk, a missing right) says nothing about a transition, and is raised.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, StatementError

from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.errors import storable
from celery_capacity.routing.insert import successors
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model import outbox
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.reasons import Refusal, Tally
from celery_capacity.routing.model.states import FINAL, Outcome, State, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store import job_transitions, quarantine
from celery_capacity.routing.store.job_transitions import Applied, Transition
from celery_capacity.routing.store.quarantine import SetAside

logger = logging.getLogger(__name__)

#: Classes of SQLSTATE that concern the whole store, or pass by themselves: connections, transaction states such as
#: read-only, rights, rollbacks such as a deadlock, missing tables, resources, locks, an operator's intervention, the
#: system below.
STORE_WIDE: Final = ("08", "0A", "25", "28", "3D", "40", "42", "53", "55", "57", "58")
#: The largest numbers that the columns of a token hold.
_MAX_EPOCH: Final = 2**63 - 1
_MAX_ATTEMPT: Final = 2**31 - 1

#: Beginning of the error in a row whose transition was written as a mark.
MARK: Final = "a transition was set aside: "

_MARK: Final = text(f"""
UPDATE jobs SET error = :error WHERE id = :job
AND state NOT IN ({", ".join(f"'{state.value}'" for state in sorted(FINAL))}) AND (epoch, attempt) <= (:epoch, :attempt)
""")
_END: Final = text(f"""
UPDATE jobs SET state = :state, step = {Step.DROPPED.value}, epoch = :epoch, attempt = :attempt, finished_at = now(),
  error = :error, outbox = '{outbox.UNTOLD}'
WHERE id = :job AND state NOT IN ({", ".join(f"'{state.value}'" for state in sorted(FINAL))})
  AND (epoch, attempt) <= (:epoch, :attempt)
""")
_RESTORE: Final = text(f"""
UPDATE jobs SET error = nullif(:error, ''), outbox = nullif(:outbox, '')
WHERE id = :job AND state = :state AND state IN ({", ".join(f"'{state.value}'" for state in sorted(FINAL))})
  AND step = {Step.DROPPED.value} AND epoch = :epoch AND attempt = :attempt AND error LIKE :mark
""")
_LEAVE: Final = text(f"""
UPDATE jobs SET outbox = :outbox WHERE id = :job AND outbox IS NULL AND epoch = :epoch AND attempt = :attempt
AND state IN ({", ".join(f"'{state.value}'" for state in sorted(FINAL))})
""")
# KEY SHARE keeps the row from the archive, and is no obstacle to those who write it.
_SUBMITTED: Final = text("SELECT submitted_at FROM jobs WHERE id = :job FOR KEY SHARE")
_AWAITED: Final = text("SELECT awaited FROM jobs WHERE id = :job")


def concerns_data(error: Exception) -> bool:
    """Return True if an error lies in the data to be written, so that each further try fails too."""
    if not isinstance(error, DBAPIError):
        # The driver or our own code could not make a statement of the data.
        cause = error.orig if isinstance(error, StatementError) else error
        return isinstance(cause, (ValueError, TypeError, LookupError, ArithmeticError))
    code = str(getattr(error.orig, "pgcode", None) or "")
    return bool(code) and not error.connection_invalidated and code[:2] not in STORE_WIDE


def write(
    engine: Engine, tally: Tally, transitions: Sequence[Transition], *, wait: bool = True
) -> tuple[list[Applied], list[Transition]]:
    """Write transitions, each statement committed by itself; return the rows that changed, and transitions left.

    A transition is left where somebody keeps its row locked, or Postgres takes it in no way. `wait`: for locked rows,
    up to the time-out of a lock. Raises errors that concern the whole store.
    """
    try:
        return job_transitions.apply_unlocked(engine, transitions, wait=wait)
    except Exception as error:
        if not concerns_data(error):
            raise
        if len(transitions) == 1:
            return _write_alone(engine, tally, transitions[0], error)
    half = len(transitions) // 2
    applied, left = write(engine, tally, transitions[:half], wait=wait)
    more, more_left = write(engine, tally, transitions[half:], wait=wait)
    return applied + more, left + more_left


def set_aside(
    engine: Engine, tally: Tally, fields: Mapping[str, Any], reason: Refusal, detail: str, worker: str | None = None
) -> None:
    """Keep data that nobody can write or read in the table `quarantine`, under the name of the stream, and count it.

    Raises the errors of Postgres.
    """
    raw = json.dumps(dict(fields)).encode("ascii")
    with engine.begin() as connection:
        quarantine.write(connection, [SetAside.of(raw, keys.STREAM, reason, _ascii(detail), worker)])
    tally.add(reason)
    logger.error("set aside: %s", detail)


def read_back(kept: Mapping[str, Any]) -> Transition:
    """Return the transition that `set_aside` kept. Raises `ValueError`, `TypeError` and `LookupError` for others."""
    return Transition(**{**kept, "token": Token.parse(kept["token"])})


def is_about(connection: Connection, job: str, moment: datetime) -> bool:
    """Return True unless the job of this id was submitted after the moment, in the caller's transaction.

    An archived job leaves its id to new jobs. Such a job is none of what was set aside before.
    """
    submitted: datetime | None = connection.execute(_SUBMITTED, {"job": job}).scalar_one_or_none()
    return submitted is None or submitted <= moment


def apply_again(connection: Connection, transition: Transition) -> list[Applied] | None:
    """Write a transition that was set aside, in the caller's transaction; return the rows that changed, or None.

    State and token guard it like any other: a transition that the job has overtaken changes nothing. An end that was
    written as a mark gets its error and its outbox: then no row may go on, and the list is empty. Raises the errors of
    Postgres.
    """
    applied = job_transitions.apply(connection, [transition])
    values = {"job": transition.job, "state": transition.state, **transition.token.columns()}
    error = storable(transition.error, job_transitions.ERROR_LENGTH)
    restored = connection.execute(_RESTORE, {**values, "error": error, "outbox": transition.outbox, "mark": MARK + "%"})
    return applied if applied or restored.rowcount else None


def deliver_again(connection: Connection, job: str, token: Token, left: str) -> list[Applied] | None:
    """Put an outbox that was set aside back into the row of its ended job; return the jobs that it published.

    A row with another outbox, or of another attempt, is left as it is, and None is returned. Publishes are inserted
    first, as at the end of an attempt. Raises `ValueError`, `TypeError` and `LookupError` for a text that is no outbox.
    """
    outbox.parse(left)
    if not connection.execute(_LEAVE, {"job": job, "outbox": left, **token.columns()}).rowcount:
        return None
    return [Applied(published, State.ACCEPTED, True) for published in successors.publish_left(connection, left)]


def _write_alone(
    engine: Engine, tally: Tally, transition: Transition, error: Exception
) -> tuple[list[Applied], list[Transition]]:
    in_ascii = replace(transition, error=_ascii(transition.error), outbox=_ascii(transition.outbox))
    end = f"the {transition.state} of attempt {transition.token} of job {transition.job}"
    why = f"{end} cannot be written: {_one_line(error)}"
    ways: list[Callable[[], list[Applied]]] = [partial(_apply, engine, in_ascii)]
    if transition.outbox:
        ways.append(partial(_apply_without_outbox, engine, tally, in_ascii, why))
    ways.append(partial(_mark, engine, tally, in_ascii, why))
    for way in ways:
        try:
            return way(), []
        except Exception as again:
            if is_locked(again):
                # The transition is written when its row is free. Nothing else waits for that.
                return [], [transition]
            if not concerns_data(again):
                raise
            error = again
    logger.error("%s; it stays in the stream, and its row is damaged: %s", why, _one_line(error))
    return [], [transition]


def _apply(engine: Engine, transition: Transition) -> list[Applied]:
    with engine.connect() as connection:
        return job_transitions.apply(connection, [transition])


def _apply_without_outbox(engine: Engine, tally: Tally, transition: Transition, why: str) -> list[Applied]:
    """Write a transition without the publishes of its attempt. The results of the attempt stay.

    A retry without its successor would begin the same attempt anew, for ever. So its job has failed.
    """
    try:
        remains = outbox.parse(transition.outbox)
    except (ValueError, TypeError, LookupError):
        remains = None
    kept = outbox.UNTOLD if remains is None else Outbox([], remains.results, by=remains.by).to_text()
    less = replace(transition, outbox=kept)
    if transition.outcome == Outcome.RETRIED and (
        remains is None or any(job.id == transition.job for job in remains.publishes)
    ):
        failed, error = State.FAILED.value, _ascii(f"its retry was set aside: {why}")
        less = replace(transition, state=failed, step=Step.ENDED, outcome=failed, error=error, outbox=outbox.UNTOLD)
    applied = _apply(engine, less)
    set_aside(engine, tally, _fields(transition), Refusal.UNWRITABLE, why, transition.worker)
    return applied


def _mark(engine: Engine, tally: Tally, transition: Transition, why: str) -> list[Applied]:
    """Note in the row that a transition was set aside. An end still ends the job, with this note as its error."""
    token = Token(_clamped(transition.token.epoch, _MAX_EPOCH), _clamped(transition.token.attempt, _MAX_ATTEMPT))
    words = _ascii(f"{MARK}{why}")[: job_transitions.ERROR_LENGTH]
    values = {"job": transition.job, "error": words, **token.columns()}
    ended = transition.state in FINAL
    applied = []
    with engine.connect() as connection:
        if ended and connection.execute(_END, {**values, "state": transition.state}).rowcount:
            job_transitions.close_attempts(connection, transition.job, token.next(), max(0, transition.at_ms))
            awaited = bool(connection.execute(_AWAITED, {"job": transition.job}).scalar())
            applied = [Applied(transition.job, transition.state, False, awaited)]
        elif not ended:
            connection.execute(_MARK, values)
    set_aside(engine, tally, _fields(transition), Refusal.UNWRITABLE, why, transition.worker)
    return applied


def _fields(transition: Transition) -> dict[str, Any]:
    return {**asdict(transition), "token": str(transition.token)}


def _clamped(number: int, most: int) -> int:
    return max(0, min(number, most))


def _ascii(words: str) -> str:
    """Return the text in characters that every encoding has."""
    return words.replace("\0", "\\x00").encode("ascii", "backslashreplace").decode("ascii")


def _one_line(error: Exception) -> str:
    """Return the fault in one line, without the statement: its values do not belong in the log."""
    what = error.orig if isinstance(error, DBAPIError) else error
    lines = str(what).splitlines() or [""]
    return f"{type(what).__name__}: {lines[0]}"
