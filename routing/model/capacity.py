"""Capacity that a worker publishes: amounts of resources and the queues that it serves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from celery_capacity.routing.model import amounts as _amounts
from celery_capacity.routing.model.amounts import Amounts


@dataclass(frozen=True, slots=True)
class Capacity:
    """A worker's capacity. `amounts`: (name, millicores | bytes | count) sorted by name, without zeros; see `of`."""

    amounts: Amounts

    @classmethod
    def of(cls, amounts: Mapping[str, int]) -> Capacity:
        """Make a capacity from amounts in internal units."""
        return cls(_amounts.canonical(amounts))

    @classmethod
    def from_people(cls, mapping: Mapping[str, Any]) -> Capacity:
        """Make a capacity from the JSON that `to_people` makes."""
        return cls.of(_amounts.from_people(mapping))

    def get(self, name: str) -> int:
        """Return the amount of one resource; 0 where the worker has none."""
        return dict(self.amounts).get(name, 0)

    @property
    def shape(self) -> str:
        """Return the text of the ledger: "cpus=72000,memory=68719476736,slots=72"."""
        return ",".join(f"{name}={amount}" for name, amount in self.amounts)

    def to_people(self) -> dict[str, Any]:
        """Return the capacity as Postgres, JSON and pages show it.

        Example: {"cpus": 72, "memory": 68719476736, "slots": 72}. A worker that serves other queues than the default
        one has "queues": [...] too.
        """
        people: dict[str, Any] = _amounts.to_people(self.amounts)
        if any(map(_amounts.is_label, dict(self.amounts))):
            people[_amounts.QUEUES] = self.queues
        return people

    @property
    def queues(self) -> list[str]:
        """Return the queues that a worker with this capacity serves, by name."""
        return _amounts.queues_of(dict(self.amounts))

    def serving(self, queues: Iterable[str]) -> Capacity:
        """Return this capacity for a worker that serves these queues."""
        resources = {name: amount for name, amount in self.amounts if not _amounts.is_label(name)}
        return Capacity.of({**resources, **_amounts.labels(queues)})
