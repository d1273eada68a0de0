"""Chords that are counted in Postgres: their sizes, and the parts that have come.

A chord is counted where its size was stored: in Redis, and here where Redis was away then. A part of a chord whose size
nobody has stored yet is kept here as well, since the size may come to either place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text


@dataclass(frozen=True, slots=True)
class Chord:
    """`size`: parts of its header, None while that is not known. `structure`: the nested results of its header."""

    size: int | None
    structure: str | None


_NOTE: Final = text("SELECT note_chord(:group, CAST(:size AS integer), CAST(:structure AS text))")
_ENLARGE: Final = text("UPDATE chords SET size = coalesce(size, 0) + 1 WHERE group_id = :group")
_ADD: Final = text(
    "INSERT INTO chord_parts (group_id, member, position, outcome) VALUES (:group, :member, :position, :outcome) "
    "ON CONFLICT DO NOTHING"
)
_LOCK: Final = text("SELECT size, structure FROM chords WHERE group_id = :group FOR UPDATE")
_EXISTS: Final = text("SELECT 1 FROM chords WHERE group_id = :group")
_PARTS: Final = text("SELECT outcome FROM chord_parts WHERE group_id = :group ORDER BY position, member")
_COUNT: Final = text("SELECT count(*) FROM chord_parts WHERE group_id = :group")
_FORGET: Final = (
    text("DELETE FROM chord_parts WHERE group_id = :group"),
    text("DELETE FROM chords WHERE group_id = :group"),
)
_FORGET_OLD: Final = (
    text("DELETE FROM chord_parts WHERE made_at < now() - make_interval(secs => :seconds)"),
    text("DELETE FROM chords WHERE made_at < now() - make_interval(secs => :seconds)"),
)


def note(connection: Connection, group: str, size: int | None = None, structure: str | None = None) -> None:
    """Have a chord counted here; what is None stays as it was."""
    connection.execute(_NOTE, {"group": group, "size": size, "structure": structure})


def is_noted(connection: Connection, group: str) -> bool:
    """Return whether a chord is counted here."""
    return connection.execute(_EXISTS, {"group": group}).first() is not None


def enlarge(connection: Connection, group: str) -> bool:
    """Add one to the size of a chord; False where it is not counted here."""
    return connection.execute(_ENLARGE, {"group": group}).rowcount > 0


def add_part(connection: Connection, group: str, member: str, position: float, outcome: bytes) -> None:
    """Keep a part. The same `member` again changes nothing."""
    values = {"group": group, "member": member, "position": position, "outcome": outcome}
    connection.execute(_ADD, values)


def lock(connection: Connection, group: str) -> Chord | None:
    """A chord that is counted here, locked until the end of the caller's transaction."""
    row = connection.execute(_LOCK, {"group": group}).first()
    return None if row is None else Chord(row[0], row[1])


def is_complete(connection: Connection, group: str, chord: Chord) -> bool:
    """Return whether all parts of its header have come."""
    count = int(connection.execute(_COUNT, {"group": group}).scalar_one())
    return chord.size is not None and count >= chord.size


def parts(connection: Connection, group: str) -> Sequence[bytes]:
    """Return the values of its parts, in the order of its header."""
    return [bytes(row[0]) for row in connection.execute(_PARTS, {"group": group})]


def forget(connection: Connection, group: str) -> None:
    """Its body is published."""
    for statement in _FORGET:
        connection.execute(statement, {"group": group})


def forget_old(connection: Connection, seconds: float) -> int:
    """Forget chords and parts that are so old that their results have expired; returns how many rows."""
    return sum(connection.execute(statement, {"seconds": seconds}).rowcount for statement in _FORGET_OLD)
