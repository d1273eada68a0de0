"""Chords that are counted in Postgres: their sizes, and the chord parts that have arrived.

A chord is counted in the store that has its size: in Redis, or here where Redis was away when the size was stored. A
part of a chord whose size nobody has stored yet is kept here as well, since the size may come to either store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text


@dataclass(frozen=True, slots=True)
class Chord:
    """A chord. `size`: parts of its header, None while unknown. `structure`: the nested results of its header."""

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
_CHORD_PARTS: Final = text("SELECT outcome FROM chord_parts WHERE group_id = :group ORDER BY position, member")
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
    """Count a chord here. An argument that is None leaves the stored value as it is."""
    connection.execute(_NOTE, {"group": group, "size": size, "structure": structure})


def is_noted(connection: Connection, group: str) -> bool:
    """Return whether a chord is counted here."""
    return connection.execute(_EXISTS, {"group": group}).first() is not None


def enlarge(connection: Connection, group: str) -> bool:
    """Add one part to the size of a chord; return False where the chord is not counted here."""
    return connection.execute(_ENLARGE, {"group": group}).rowcount > 0


def add_part(connection: Connection, group: str, member: str, position: float, outcome: bytes) -> None:
    """Keep a chord part. Idempotent: a `member` that is there already changes nothing."""
    values = {"group": group, "member": member, "position": position, "outcome": outcome}
    connection.execute(_ADD, values)


def lock(connection: Connection, group: str) -> Chord | None:
    """Lock a chord until the end of the caller's transaction; return None where it is not counted here."""
    row = connection.execute(_LOCK, {"group": group}).first()
    return None if row is None else Chord(row[0], row[1])


def is_complete(connection: Connection, group: str, chord: Chord) -> bool:
    """Return whether all parts of the header of a chord have arrived."""
    count = int(connection.execute(_COUNT, {"group": group}).scalar_one())
    return chord.size is not None and count >= chord.size


def parts(connection: Connection, group: str) -> Sequence[bytes]:
    """Return the encoded outcomes of the parts of a chord, in the order of its header."""
    return [bytes(row[0]) for row in connection.execute(_CHORD_PARTS, {"group": group})]


def forget(connection: Connection, group: str) -> None:
    """Delete a chord and its parts, after its body was published."""
    for statement in _FORGET:
        connection.execute(statement, {"group": group})


def forget_old(connection: Connection, seconds: float) -> int:
    """Delete chords and parts older than `seconds`, whose results have expired; return how many rows."""
    return sum(connection.execute(statement, {"seconds": seconds}).rowcount for statement in _FORGET_OLD)
