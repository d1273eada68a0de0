"""The authority row in Postgres: the store that admits, and the epoch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Result, text

from celery_capacity.routing.errors import NotMigrated
from celery_capacity.routing.model.states import Store

#: Renew intervals after which a silent process that opens an epoch is overtaken: 20 s at the usual 10 s.
OPENING_INTERVALS: Final = 2.0
#: Confirm intervals for which an answer about the authority is valid, counted from the sending of the question: 10 s at
#: the usual 5 s.
VALID_INTERVALS: Final = 2.0


def change_pause(confirm_interval: float) -> float:
    """Return the seconds after a change of the authority in which nobody decides: others may believe the old one."""
    return confirm_interval * VALID_INTERVALS


def opening_term(renew_interval: float) -> float:
    """Return the seconds after which a silent process that opens an epoch is overtaken."""
    return renew_interval * OPENING_INTERVALS


@dataclass(frozen=True, slots=True)
class Authority:
    """The store that admits. `authority`: ledger or postgres.

    `changed`: the time of the change, which identifies it. `age`: seconds since then by Postgres's clock, never
    negative even where that clock was set back.
    """

    epoch: int
    authority: Store
    changed: datetime
    age: float


SELECT_AUTHORITY: Final = (
    "SELECT epoch, authority, changed_at, greatest(0, extract(epoch FROM clock_timestamp() - changed_at))::float "
    "FROM authority"
)


def read_authority(connection: Connection) -> Authority:
    """Read the one row. Raises `NotMigrated` where it is missing."""
    return authority_of(connection.execute(text(SELECT_AUTHORITY)).one_or_none())


def authority_of(row: Any) -> Authority:
    """Return the authority of a row with the columns of `SELECT_AUTHORITY`. Raises `NotMigrated` for None."""
    if row is None:
        raise NotMigrated()
    epoch, authority, changed, age = row
    return Authority(epoch, Store(authority), changed, age)


def database_id(connection: Connection) -> str:
    """Return the id of this database, which its copies share and no other has. Raises `NotMigrated` without the row."""
    value = connection.execute(text("SELECT database_id FROM authority")).scalar_one_or_none()
    if value is None:
        raise NotMigrated()
    return str(value)


def _epoch(result: Result[Any]) -> int | None:
    epoch: int | None = result.scalar_one_or_none()
    return epoch


def count_from_now(connection: Connection) -> None:
    """Count the age of the authority from now, where Postgres's clock was set back since the authority changed.

    Else nobody would decide until that clock has reached the time of the change again.
    """
    connection.execute(text("UPDATE authority SET changed_at = clock_timestamp() WHERE changed_at > clock_timestamp()"))


# An opener whose last report lies in the future made it before the clock was set back.
_BEGIN_EPOCH: Final = text("""
UPDATE authority SET epoch = greatest(epoch, :above) + 1, opening_at = clock_timestamp()
WHERE epoch = :epoch AND authority = 'ledger' AND (opening_at IS NULL OR opening_at > clock_timestamp()
  OR opening_at <= clock_timestamp() - make_interval(secs => :term))
RETURNING epoch
""")


def begin_epoch(connection: Connection, epoch: int, term: float, above: int = 0) -> int | None:
    """Begin the epoch after this one, newer than `above` too; return its number.

    Return None where another process has begun it, or opens this epoch and has reported that within `term` seconds.
    The number belongs to the caller alone: every script and statement of an opener is refused once a newer epoch has
    begun. A new epoch is no change of the authority, and nobody has to pause: the scripts compare it with the books.
    """
    values = {"epoch": epoch, "above": above, "term": term}
    return _epoch(connection.execute(_BEGIN_EPOCH, values))


_STILL_OPENING: Final = text("""
UPDATE authority SET opening_at = clock_timestamp()
WHERE epoch = :epoch AND authority = 'ledger' AND opening_at IS NOT NULL RETURNING epoch
""")
_HOLD_EPOCH: Final = text("""
SELECT set_config('idle_in_transaction_session_timeout', CAST(:hangs_ms AS text), true)
FROM authority WHERE epoch = :epoch FOR SHARE
""")


def still_opens(connection: Connection, epoch: int) -> bool:
    """Report that the caller goes on with opening an epoch; return False where it was overtaken."""
    return connection.execute(_STILL_OPENING, {"epoch": epoch}).first() is not None


def hold_epoch(connection: Connection, epoch: int, silence: float) -> bool:
    """Let no newer epoch begin before the end of the caller's transaction; return False where one has begun.

    The server ends the transaction of a caller that is silent for `silence` seconds.
    """
    values = {"epoch": epoch, "hangs_ms": max(1, round(silence * 1000))}
    return connection.execute(_HOLD_EPOCH, values).first() is not None


def end_opening(connection: Connection, epoch: int) -> None:
    """Note that the caller, which opened this epoch, does nothing more for it."""
    connection.execute(text("UPDATE authority SET opening_at = NULL WHERE epoch = :epoch"), {"epoch": epoch})


_TO_POSTGRES: Final = text("""
UPDATE authority SET authority = 'postgres', epoch = epoch + 1, changed_at = clock_timestamp(), opening_at = NULL
WHERE authority = 'ledger'
  AND EXISTS (SELECT 1 FROM workers WHERE status IN ('ready', 'draining')
    AND seen_at > now() - make_interval(secs => :seen_for))
  AND NOT EXISTS (SELECT 1 FROM workers WHERE status IN ('ready', 'draining')
    AND seen_at > now() - make_interval(secs => :seen_for)
    AND (ledger_lost_at IS NULL OR ledger_lost_at > now() - make_interval(secs => :lost_for)))
RETURNING epoch
""")


def decide_in_postgres(connection: Connection, seen_for: float, lost_for: float) -> int | None:
    """Let Postgres decide when no worker has had the ledger for `lost_for` seconds; return the new epoch, else None.

    Every worker seen in the last `seen_for` seconds counts. A single worker that lost the ledger changes nothing.
    """
    return _epoch(connection.execute(_TO_POSTGRES, {"seen_for": seen_for, "lost_for": lost_for}))


_TO_LEDGER: Final = text("""
UPDATE authority SET authority = 'ledger', epoch = epoch + 1, changed_at = clock_timestamp(), opening_at = NULL
WHERE authority = 'postgres'
  AND NOT EXISTS (SELECT 1 FROM workers WHERE status IN ('ready', 'draining')
    AND seen_at > now() - make_interval(secs => :seen_for) AND ledger_lost_at IS NOT NULL)
RETURNING epoch
""")


def decide_in_ledger(connection: Connection, seen_for: float) -> int | None:
    """Let the ledger decide again when every worker reaches it; return the new epoch, else None.

    Every worker seen in the last `seen_for` seconds counts.
    """
    return _epoch(connection.execute(_TO_LEDGER, {"seen_for": seen_for}))
