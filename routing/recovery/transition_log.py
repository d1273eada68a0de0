"""The stream of transitions: what the scripts noted and Postgres does not have yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from redis.exceptions import RedisError
from sqlalchemy import Engine

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.store import refused_transitions
from celery_capacity.routing.store.job_transitions import Applied, Transition

#: Entries applied in one statement: some 20 ms of Postgres.
CHUNK: Final = 1000


def parse(entry: bytes, fields: dict[bytes, bytes]) -> Transition:
    """A transition from an entry of the stream, as `note` in lua/lib/transitions.lua wrote it."""

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
        told=text("told") == "1",
    )


def read(ledger: Ledger, *, older_than_ms: int = 0, after: str = "-", most: int = CHUNK) -> list[Transition]:
    """Return the oldest readable entries, those that are at least so many milliseconds old."""
    newest = _newest(ledger, older_than_ms)
    return _parsed(_page(ledger, after, newest, most))[0]


def _newest(ledger: Ledger, older_than_ms: int) -> str:
    """Return the end of a range of entries that are at least so many milliseconds old. Names of entries never go back:
    while they are ahead of a clock that was set back they tell no age, and all are read."""
    if not older_than_ms:
        return "+"
    now = ledger.measure()
    try:
        newest: Any = ledger.client.xrevrange(keys.STREAM, count=1)
    except RedisError as error:
        raise StoreUnavailable(f"the stream cannot be read: {error}") from error
    ahead = bool(newest) and int(newest[0][0].decode().partition("-")[0]) > now
    return "+" if ahead else f"{now - older_than_ms}-0"


def _page(ledger: Ledger, oldest: str, newest: str, most: int | None = None) -> list[tuple[bytes, dict[bytes, bytes]]]:
    try:
        found: Any = ledger.client.xrange(keys.STREAM, min=oldest, max=newest, count=most)
    except RedisError as error:
        raise StoreUnavailable(f"the stream cannot be read: {error}") from error
    return [(entry, fields) for entry, fields in found]


def _parsed(
    page: Sequence[tuple[bytes, dict[bytes, bytes]]],
) -> tuple[list[Transition], list[tuple[bytes, dict[bytes, bytes]]]]:
    """The transitions of a page, and the entries of which none can be made."""
    transitions, unreadable = [], []
    for entry, fields in page:
        try:
            transitions.append(parse(entry, fields))
        except ValueError:
            unreadable.append((entry, fields))
    return transitions, unreadable


def settled(transitions: Sequence[Transition]) -> list[tuple[str, str]]:
    """The entries to forget (entry, job) once these are written. Of an attempt only the newest entry exists, since each
    replaces the one before."""
    newest: dict[tuple[str, int, int, bool], Transition] = {}
    for one in transitions:
        if one.entry:
            newest[one.job, one.epoch, one.attempt, one.step >= Step.FILED] = one
    return [(one.entry, one.job) for one in newest.values()]


def unapplied(ledger: Ledger) -> Iterator[Transition]:
    """Yield every readable entry of the stream, oldest first."""
    oldest = "-"
    while True:
        page = _page(ledger, oldest, "+", CHUNK)
        yield from _parsed(page)[0]
        if len(page) < CHUNK:
            return
        oldest = f"({page[-1][0].decode()}"


def write(
    engine: Engine, ledger: Ledger, transitions: Sequence[Transition], *, wait: bool = True
) -> tuple[list[Applied], int]:
    """Write transitions into Postgres, then drop their entries; returns also how many are left: somebody keeps their
    rows locked, or Postgres takes them in no way (`routing.store.refused_transitions`)."""
    if not transitions:
        return [], 0
    applied, left = refused_transitions.write(engine, transitions, wait=wait)
    kept = {one.entry for one in left}
    ledger.forget(settled([one for one in transitions if one.entry not in kept]))
    return applied, len(left)


def _set_aside(engine: Engine, ledger: Ledger, unreadable: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> None:
    """Keep entries that no script wrote, and drop them from the stream."""
    for entry, fields in unreadable:
        said = {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in fields.items()}
        refused_transitions.set_aside(engine, said, f"entry {entry.decode()} is no transition")
        ledger.forget([(entry.decode(), said.get("job", ""))])


def apply_all(
    engine: Engine, ledger: Ledger, *, older_than_ms: int = 0, between: Callable[[], None] = lambda: None
) -> tuple[int, list[Applied]]:
    """Apply what is in the stream; returns the number of entries that left it, and the rows that changed.

    Entries younger than `older_than_ms` are left to the worker that is about to write them in its own batch. Entries
    that cannot be written now stay, and the pass goes on behind them; it waits for locked rows once. `between`
    is called before each page, and may raise.
    """
    newest = _newest(ledger, older_than_ms)
    oldest, entries, wait = "-", 0, True
    applied: list[Applied] = []
    while True:
        between()
        page = _page(ledger, oldest, newest, CHUNK)
        transitions, unreadable = _parsed(page)
        written, left = write(engine, ledger, transitions, wait=wait)
        _set_aside(engine, ledger, unreadable)
        applied += written
        entries += len(page) - left
        if len(page) < CHUNK:
            return entries, applied
        oldest, wait = f"({page[-1][0].decode()}", wait and not left


def apply_entry(engine: Engine, ledger: Ledger, entry: str) -> None:
    """Write one entry now, for a caller after whom perhaps nobody comes. One that is gone was written by another."""
    write(engine, ledger, _parsed(_page(ledger, entry, entry))[0])
