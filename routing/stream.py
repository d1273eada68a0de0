"""The stream of transitions: what the scripts noted and Postgres does not have yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from redis.exceptions import RedisError
from sqlalchemy import Engine

from routing import keys, store
from routing.errors import StoreUnavailable
from routing.ledger import Ledger
from routing.states import FINAL, Step
from routing.store import Applied, Transition

#: Entries applied in one statement: some 20 ms of Postgres.
CHUNK: Final = 1000


def parse(entry: bytes, fields: dict[bytes, bytes]) -> Transition:
    """A transition from an entry of the stream, as `note` in lua/prelude_jobs.lua wrote it."""

    def text(name: str) -> str:
        return fields.get(name.encode(), b"").decode("utf-8", "replace")

    def number(name: str) -> int:
        return int(text(name) or 0)

    return Transition(
        job=text("job"),
        epoch=number("epoch"),
        attempt=number("attempt"),
        state=text("state"),
        step=number("step"),
        worker=text("worker"),
        incarnation=text("incarnation"),
        admitted_ms=number("admitted"),
        started_ms=number("started"),
        at_ms=number("at"),
        losses=number("losses"),
        outcome=text("outcome"),
        error=text("error"),
        entry=entry.decode(),
        outbox=text("outbox"),
    )


def read(ledger: Ledger, *, older_than_ms: int = 0, after: str = "-", most: int = CHUNK) -> list[Transition]:
    """The oldest entries, those that are at least so many milliseconds old."""
    newest = f"{ledger.measure() - older_than_ms}-0" if older_than_ms else "+"
    try:
        found: Any = ledger.client.xrange(keys.STREAM, min=after, max=newest, count=most)
    except RedisError as error:
        raise StoreUnavailable(f"the stream cannot be read: {error}") from error
    return [parse(entry, fields) for entry, fields in found]


def settled(transitions: Sequence[Transition]) -> list[tuple[str, str]]:
    """The entries to forget (entry, job) once these are written. Of an attempt only the newest entry exists, since each
    replaces the one before; a job that ended has no entry in its tombstone."""
    newest: dict[tuple[str, int, int, bool], Transition] = {}
    for one in transitions:
        if one.entry:
            newest[one.job, one.epoch, one.attempt, one.step >= Step.FILED] = one
    return [(one.entry, "" if one.state in FINAL else one.job) for one in newest.values()]


def write(engine: Engine, ledger: Ledger, transitions: Sequence[Transition]) -> tuple[list[Applied], int]:
    """Write transitions into Postgres, then drop their entries; returns also how many could not be written now, since
    somebody keeps their rows locked."""
    if not transitions:
        return [], 0
    applied, left = store.apply_unlocked(engine, transitions)
    kept = {one.entry for one in left}
    ledger.forget(settled([one for one in transitions if one.entry not in kept]))
    return applied, len(left)


def apply_all(engine: Engine, ledger: Ledger, *, older_than_ms: int = 0) -> tuple[int, list[Applied]]:
    """Apply what is in the stream; returns the number of entries, and the rows that changed.

    Entries younger than `older_than_ms` are left to the worker that is about to write them in its own batch.
    """
    entries = 0
    applied: list[Applied] = []
    while True:
        found = read(ledger, older_than_ms=older_than_ms)
        if not found:
            return entries, applied
        written, left = write(engine, ledger, found)
        applied += written
        entries += len(found) - left
        if len(found) < CHUNK or left:
            return entries, applied


def apply_entry(engine: Engine, ledger: Ledger, entry: str) -> None:
    """Write one entry now, for a caller after whom perhaps nobody comes. One that is gone was written by another."""
    try:
        found: Any = ledger.client.xrange(keys.STREAM, min=entry, max=entry)
    except RedisError as error:
        raise StoreUnavailable(f"the stream cannot be read: {error}") from error
    write(engine, ledger, [parse(entry, fields) for entry, fields in found])
