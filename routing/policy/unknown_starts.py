"""Attempts that may have started unseen: their worker died, and the ledger was lost before Postgres had their claim.

Postgres has a claim within milliseconds, while the body runs already. If the ledger is lost in between, the process
that opens the next epoch learns of the claim from the stream, if it survived, or from the live worker. A silent worker
says nothing, so each waiting job may have started there. Two rules keep the promises all the same:

- **Known before the start.** An attempt whose loss would matter starts only when Postgres has its claim. Such an
  attempt is of a job that may start only once, or that has lost an attempt already, or that is in doubt.
- **In doubt.** Every other job is brought in with the next attempt number left out, so that no number is used twice.
  That number counts as a lost attempt. So a job is in doubt once at the most, and starts no more often than its losses
  allow.
"""

from __future__ import annotations

from typing import Final

#: Allowed losses below which a doubt would be the last loss but one: then each attempt is known before it starts.
FEWEST_LOSSES: Final = 3


def is_known_before_start(losses: int, most_losses: int, rerun: bool) -> bool:
    """Return True if the next attempt of a job starts only when Postgres has its claim."""
    return not rerun or losses > 0 or most_losses < FEWEST_LOSSES


def losses_in_doubt(losses: int, most_losses: int, rerun: bool) -> int:
    """Return the losses of a job in doubt: an attempt of it may have started and may have been lost."""
    return losses if is_known_before_start(losses, most_losses, rerun) else losses + 1
