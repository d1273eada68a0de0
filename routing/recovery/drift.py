"""Result of a reconcile: the drift that it found, and how much of it was repaired."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reconciled:
    """Counts of a reconcile.

    `applied`: entries of the stream. `checked`: jobs compared. `found` and `repaired`: differences by kind.
    """

    applied: int = 0
    checked: int = 0
    found: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)

    @property
    def drift(self) -> int:
        return self.found.total()

    @property
    def all_repaired(self) -> bool:
        return self.found == self.repaired

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
