"""What processes of different releases share, and by which number they know whether they may.

A number is that of a *format*, and goes up only where an older process would misread what a newer one writes: a new
field, key, script or column that may be missing does not raise it. So a process of the release before goes on working
beside newer ones, and only a newer format is refused.

===============  ====================================  ==========================================
what             where its number is                   a process that knows an older one
===============  ====================================  ==========================================
tables           the thousands of the newest revision  does not start (`NotMigrated`)
ledger           `ledger:epoch`, the field `format`    is told `cold` by each script, and does not join
message          header `capacity_request`, `format`   hands the job back
===============  ====================================  ==========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from celery_capacity.routing.errors import InvalidRequest, show

#: Of the books in Redis.
LEDGER: Final = 1
#: Of the message of a job, as its row keeps it.
MESSAGE: Final = 1
#: What is written where nothing is said: by releases before there were numbers.
FIRST: Final = 1


def of_revision(revision: str) -> int:
    """The format of the tables at a revision: "0003" and "0099" are of one, "1000" is the first of the next."""
    digits = revision[:-3]
    return int(digits) if digits.isdigit() else 0


def is_known(carried: Mapping[str, object]) -> bool:
    """Return whether this release knows the format that the header of a job's message says. (None: it says nothing.)"""
    found = carried.get("format")
    return found is None or (isinstance(found, int) and not isinstance(found, bool) and FIRST <= found <= MESSAGE)


def check_message(carried: Mapping[str, object]) -> None:
    """Raise `InvalidRequest` where the header of a job's message says a format that this release does not know."""
    found = carried.get("format")
    if not is_known(carried):
        raise InvalidRequest(
            f"a message of format {show(found)}, and this version of the platform knows {MESSAGE}",
            value=found,
            advice="Install the version of the platform that sent it.",
        )
