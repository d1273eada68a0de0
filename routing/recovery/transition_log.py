"""The stream of transitions that the scripts noted and Postgres does not have yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from redis.exceptions import RedisError
from sqlalchemy import Engine

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store import refused_transitions
from celery_capacity.routing.store.job_transitions import Applied, Transition

#: Entries applied in one statement: some 20 ms of Postgres.
CHUNK: Final = 1000


def parse(entry: bytes, fields: dict[bytes, bytes]) -> Transition:
    """Parse an entry of the stream, as `note` in lua/lib/transitions.lua wrote it. Raises `ValueError`."""

    def text(name: str) -> str:
        return fields.get(name.encode(), b"").decode("utf-8", "replace")

    def number(name: str) -> int:
        return int(text(name) or 0)

    return Transition(
        job=text("job"),
        token=Token(number("epoch"), number("attempt")),
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
        shape=text("shape"),
    )


def _newest(ledger: Ledger, older_than_ms: int) -> str:
    """Return the end of a range of entries that are at least so many milliseconds old.

    The ids of entries never go back. While they are ahead of a clock that was set back they tell no age, and all
    entries are read.
    """
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
        rows: Any = ledger.client.xrange(keys.STREAM, min=oldest, max=newest, count=most)
    except RedisError as error:
        raise StoreUnavailable(f"the stream cannot be read: {error}") from error
    return [(entry, fields) for entry, fields in rows]


def _parsed(
    page: Sequence[tuple[bytes, dict[bytes, bytes]]],
) -> tuple[list[Transition], list[tuple[bytes, dict[bytes, bytes]]]]:
    """Return the transitions of a page, and the entries that cannot be parsed."""
    transitions, unreadable = [], []
    for entry, fields in page:
        try:
            transitions.append(parse(entry, fields))
        except ValueError:
            unreadable.append((entry, fields))
    return transitions, unreadable


def written(transitions: Sequence[Transition]) -> list[tuple[str, str]]:
    """Return the entries (entry, job) to delete once these transitions are written.

    Of an attempt only the newest entry exists, since each entry replaces the one before.
    """
    newest: dict[tuple[str, Token, bool], Transition] = {}
    for transition in transitions:
        if transition.entry:
            newest[transition.job, transition.token, transition.step >= Step.FILED] = transition
    return [(transition.entry, transition.job) for transition in newest.values()]


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
    """Write transitions into Postgres, then delete their entries; return the changed rows, and how many are left.

    A transition is left where somebody keeps its row locked, or Postgres takes it in no way
    (`routing.store.refused_transitions`).
    """
    if not transitions:
        return [], 0
    applied, left = refused_transitions.write(engine, ledger.tally, transitions, wait=wait)
    kept = {transition.entry for transition in left}
    ledger.ack_transitions(written([transition for transition in transitions if transition.entry not in kept]))
    return applied, len(left)


def _set_aside(engine: Engine, ledger: Ledger, unreadable: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> None:
    """Keep entries that no script wrote in the quarantine, and delete them from the stream."""
    for entry, fields in unreadable:
        texts = {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in fields.items()}
        detail = f"entry {entry.decode()} is no transition"
        refused_transitions.set_aside(engine, ledger.tally, texts, Refusal.NO_TRANSITION, detail)
        ledger.ack_transitions([(entry.decode(), texts.get("job", ""))])


def apply_all(
    engine: Engine, ledger: Ledger, *, older_than_ms: int = 0, between: Callable[[], None] = lambda: None
) -> tuple[int, list[Applied]]:
    """Apply the stream; return the number of entries that left it, and the rows that changed.

    Entries younger than `older_than_ms` are left to the worker that is about to write them in its own batch. Entries
    that cannot be written now stay, and the pass goes on behind them. The pass waits for locked rows once. `between`
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
    """Write one entry now, for a caller that may be the last process for a while.

    An entry that is gone was written by another process.
    """
    write(engine, ledger, _parsed(_page(ledger, entry, entry))[0])
