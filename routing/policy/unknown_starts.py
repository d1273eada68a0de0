"""Attempts of which nobody knows whether they started: their worker died, and the ledger was lost before Postgres had
their claim.

Postgres hears of a claim within milliseconds, while the body runs already. Whoever opens the next epoch learns of the
claims in between from the stream, if it survived, and from each worker that lives. Of a worker that is silent nobody
knows: each job that waited may have started there. Two rules keep the promises all the same:

- **Known before the start.** An attempt whose loss would matter starts when Postgres has its claim: of a job that may
  start only once, or that has lost an attempt already (or is in doubt).
- **In doubt.** Every other job is brought in with the next number left out, so that none is used twice, and as one that
  has lost an attempt. So a job is in doubt once at the most, and starts as often as its losses allow, no more.
"""

from __future__ import annotations

from typing import Final

#: Allowed losses below which a doubt would be the last but one: then each attempt is known before it starts.
FEWEST_LOSSES: Final = 3


def is_known_before_start(losses: int, most_losses: int, rerun: bool) -> bool:
    """Return True if the next attempt of a job starts only when Postgres has its claim."""
    return not rerun or losses > 0 or most_losses < FEWEST_LOSSES


def losses_in_doubt(losses: int, most_losses: int, rerun: bool) -> int:
    """Return the losses of a job, one attempt of which may have started and was lost."""
    return losses if is_known_before_start(losses, most_losses, rerun) else losses + 1
