"""The election of the one worker that runs the duties: a lease with a fencing number.

The lease is kept where admissions are decided. In the ledger one script grants it. While Postgres decides, one guarded
statement does, in the one row of the table `runner`. The holder renews the lease while it works. Once the lease ran
out, another worker can take it, under a larger fencing number; from then on the old holder is refused. Duties guard
themselves (`workers.duties`), so two runners for a moment only cost work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text

from celery_capacity.routing.ledger.connection import LedgerServer


@dataclass(frozen=True, slots=True)
class Elected:
    """Reply to a call of `elect`.

    `fence`: number of the caller's lease, 0 where it has none. `asked`: duties that others asked for. `epoch`: that of
    the ledger, 0 where it is cold. `has_book`: True if the caller's worker has a book there.
    """

    fence: int
    asked: tuple[str, ...] = ()
    epoch: int = 0
    has_book: bool = False


class Elections(LedgerServer):
    """The lease in the ledger. It is granted in any epoch, because its holder opens a cold ledger.

    A worker of another database than that of the books does not get it.
    """

    def elect(
        self,
        caller: str,
        fence: int,
        term: float,
        asks: Iterable[str] = (),
        worker: str = "",
    ) -> Elected:
        """Take, renew or watch the lease for `term` seconds (0: give it back), and ask for duties.

        `asks`: the duties that this caller asks the runner for. The reply also has the epoch of the ledger, and says if
        the caller's worker has a book there.
        """
        rows = [{"duty": duty} for duty in asks]
        values = {"caller": caller, "worker": worker, "fence": fence, "term": round(term * 1000)}
        reply = self._call("elect", rows, **values, database=self.database)
        epoch, has_book = reply.number("epoch"), reply["book"] == "1"
        if reply.head != "elected":
            return Elected(0, (), epoch, has_book)
        return Elected(reply.number("fence"), tuple(reply.rest), epoch, has_book)


# A lease that lasts longer than the longest term was taken before the clock was set back: it may be taken over.
_ELECT: Final = text("""
INSERT INTO runner (incarnation, fence, until)
VALUES (:caller, :fence + 1, clock_timestamp() + make_interval(secs => :term))
ON CONFLICT ("only") DO UPDATE SET incarnation = excluded.incarnation, until = excluded.until,
  fence = CASE WHEN (runner.incarnation, runner.fence) = (:caller, :fence) THEN runner.fence
               ELSE greatest(runner.fence, :fence) + 1 END
WHERE (runner.incarnation, runner.fence) = (:caller, :fence) OR runner.until <= clock_timestamp()
  OR runner.until > clock_timestamp() + make_interval(secs => 2 * :term)
RETURNING fence
""")
_RESIGN: Final = text("UPDATE runner SET until = clock_timestamp() WHERE (incarnation, fence) = (:caller, :fence)")


def elect(connection: Connection, caller: str, fence: int, term: float) -> Elected:
    """Take, renew or watch the lease in Postgres for `term` seconds."""
    number = connection.execute(_ELECT, {"caller": caller, "fence": fence, "term": term}).scalar_one_or_none()
    return Elected(number or 0)


def resign(connection: Connection, caller: str, fence: int) -> None:
    """Give the lease in Postgres back."""
    connection.execute(_RESIGN, {"caller": caller, "fence": fence})
