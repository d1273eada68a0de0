"""The audit: a row for each action of an operator, written before the action, with its outcome written after it.

An action without a row does not happen. A row without an outcome belongs to an action under way, or to one whose
process was ended. A submission is no action: its job is a row itself, which names the sender.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.errors import storable

#: Targets of an action that its row names.
MAX_TARGETS: Final = 100
#: Characters of a target, and of a text in the details.
MAX_TARGET: Final = 300
MAX_TEXT: Final = 500


class Way(StrEnum):
    """The program by which an operator acts."""

    API = "api"
    CLI = "cli"
    PAGE = "page"


class Outcome(StrEnum):
    """Result of an action."""

    #: for all targets
    DONE = "done"
    #: for some of them, or not in full, or as far as it came before a store went away
    PARTLY = "partly"
    #: nothing was changed
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Actor:
    """An operator: the name, and the way by which the order comes. `noted` hears the number of each action's row."""

    name: str
    way: Way
    noted: Callable[[int], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the audit."""

    seq: int
    action: str
    targets: tuple[str, ...]
    number: int
    by: str
    via: str
    at: datetime
    details: Mapping[str, Any]
    outcome: str | None
    ended_at: datetime | None

    def to_json(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "action": self.action,
            "targets": list(self.targets),
            "number": self.number,
            "by": self.by,
            "via": self.via,
            "at": _iso(self.at),
            "details": dict(self.details),
            "outcome": self.outcome,
            "ended_at": None if self.ended_at is None else _iso(self.ended_at),
        }


_BEGIN: Final = text("""
INSERT INTO audit (action, targets, number, made_by, via, details)
VALUES (:action, CAST(:targets AS text[]), :number, :by, :via, CAST(:details AS jsonb)) RETURNING seq
""")
_END: Final = text("""
UPDATE audit SET outcome = :outcome, details = details || CAST(:details AS jsonb), ended_at = clock_timestamp()
WHERE seq = :seq AND outcome IS NULL
""")
_READ: Final = """
SELECT seq, action, targets, number, made_by, via, made_at, details, outcome, ended_at FROM audit
"""
_NEWEST: Final = text(f"{_READ} WHERE seq < :before ORDER BY seq DESC LIMIT :limit")
_ENTRY: Final = text(f"{_READ} WHERE seq = :seq")
_FORGET: Final = text("""
DELETE FROM audit WHERE seq IN (
  SELECT seq FROM audit WHERE made_at < clock_timestamp() - make_interval(secs => :keep) ORDER BY made_at LIMIT :most
)
""")

#: Actions that one statement forgets.
CHUNK: Final = 10_000
#: Beyond the number of every action.
LAST: Final = 2**63 - 1


def begin(connection: Connection, actor: Actor, action: str, targets: Sequence[str], details: Mapping[str, Any]) -> int:
    """Note that an action begins; return its number."""
    named = [storable(target, MAX_TARGET) for target in targets[:MAX_TARGETS]]
    values = {"action": action, "targets": named, "number": len(targets), "by": actor.name, "via": actor.way.value}
    return int(connection.execute(_BEGIN, {**values, "details": _details(details)}).scalar_one())


def end(connection: Connection, seq: int, outcome: Outcome, details: Mapping[str, Any]) -> None:
    """Note the outcome of an action, once."""
    connection.execute(_END, {"seq": seq, "outcome": outcome.value, "details": _details(details)})


def newest(connection: Connection, limit: int, before: int = LAST) -> list[Entry]:
    """Return actions, the newest first. `before`: the number of the oldest action that the caller has."""
    return [_entry(row) for row in connection.execute(_NEWEST, {"limit": limit, "before": before})]


def entry(connection: Connection, seq: int) -> Entry | None:
    """Return one action; None if there is none."""
    row = connection.execute(_ENTRY, {"seq": seq}).one_or_none()
    return None if row is None else _entry(row)


def forget(connection: Connection, keep: float, most: int = CHUNK) -> int:
    """Delete actions that began more than `keep` seconds ago, at most so many; return their number."""
    return connection.execute(_FORGET, {"keep": keep, "most": most}).rowcount


def _entry(row: Any) -> Entry:
    seq, action, targets, number, by, via, at, details, outcome, ended_at = row
    return Entry(seq, action, tuple(targets), number, by, via, at, details or {}, outcome, ended_at)


def _details(details: Mapping[str, Any]) -> str:
    shown = {name: storable(value, MAX_TEXT) if isinstance(value, str) else value for name, value in details.items()}
    return json.dumps({name: value for name, value in shown.items() if value is not None})


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")
