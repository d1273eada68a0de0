"""Formats that processes of different releases share, and the numbers by which they know whether they may.

A number belongs to a *format*. It goes up only where an older process would misread the data of a newer one: a new
field, key, script or column that may be missing does not raise it. So a process of the release before goes on working
beside newer ones, and only a newer format is refused.

===============  ====================================  ==========================================
format           where its number is                   a process that knows an older one
===============  ====================================  ==========================================
tables           the thousands of the newest revision  does not start (`NotMigrated`)
ledger           `ledger:epoch`, the field `format`    is told `cold` by each script, and does not join
message          header `capacity_request`, `format`   hands the job back
===============  ====================================  ==========================================

A process that knows a newer format of the ledger finds the books cold, and opens them anew from Postgres and from the
stream. Entries of the stream have one format in all releases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from celery_capacity.routing.errors import InvalidRequest, show

#: Format of the books in Redis. 2: a job is one value, in 1 it was a hash; workers stand in the indexes by class.
#: 3: the shape of a job may end with its run time. 4: terms may stand before that.
LEDGER: Final = 4
#: Format of a job's message, as its row keeps it.
MESSAGE: Final = 1
#: Format where no number is written: by releases before there were numbers.
FIRST: Final = 1


def of_revision(revision: str) -> int:
    """Return the format of the tables at a revision: "0003" and "0099" have one format, "1000" begins the next."""
    digits = revision[:-3]
    return int(digits) if digits.isdigit() else 0


def is_known(carried: Mapping[str, object]) -> bool:
    """Return True if this release knows the format in the header of a job's message.

    A header without a format is known.
    """
    number = carried.get("format")
    return number is None or (isinstance(number, int) and not isinstance(number, bool) and FIRST <= number <= MESSAGE)


def check_message(carried: Mapping[str, object]) -> None:
    """Raise `InvalidRequest` where the header of a job's message has a format that this release does not know."""
    number = carried.get("format")
    if not is_known(carried):
        raise InvalidRequest(
            f"a message of format {show(number)}, and this version of the platform knows {MESSAGE}",
            value=number,
            advice="Install the version of the platform that sent it.",
        )
