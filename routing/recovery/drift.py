"""Result of a reconcile: the drift that it found, and how much of it was repaired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, text

#: Jobs that the ledger has by Postgres; the index of each state counts them.
_IN_LEDGER: Final = text(
    "SELECT count(*) FROM jobs WHERE state IN ('waiting', 'admitted', 'running') AND behind IS NULL"
)


@dataclass
class Reconciled:
    """Counts of a reconcile.

    `applied`: entries of the stream. `checked`: jobs compared. `found` and `repaired`: differences by kind. `observer`:
    called with `checked` after each chunk of jobs.
    """

    applied: int = 0
    checked: int = 0
    found: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    observer: Callable[[int], object] | None = field(default=None, compare=False, repr=False)

    @property
    def drift(self) -> int:
        return self.found.total()

    @property
    def all_repaired(self) -> bool:
        return self.found == self.repaired

    def count(self, jobs: int) -> None:
        """Count jobs that are compared."""
        self.checked += jobs
        if self.observer is not None:
            self.observer(self.checked)

    def note(self, kind: str, repaired: bool = True) -> None:
        self.found[kind] += 1
        if repaired:
            self.repaired[kind] += 1

    def counts(self) -> dict[str, int]:
        return {"applied": self.applied, "drift": self.drift, "repaired": self.repaired.total()}

    def to_json(self) -> dict[str, Any]:
        return {
            "applied": self.applied,
            "checked": self.checked,
            "drift": self.drift,
            "repaired": self.repaired.total(),
            "kinds": dict(sorted(self.found.items())),
        }


def jobs_to_compare(connection: Connection) -> int:
    """Return the number of jobs that a reconcile compares, as of now."""
    return int(connection.execute(_IN_LEDGER).scalar_one())
