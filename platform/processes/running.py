"""The processes of `up` and their places, as it prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery_capacity.platform.embedded import servers
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.inspect import worker_lines
from celery_capacity.routing.model.amounts import (
    CPUS,
    MEMORY,
    SLOTS,
    cpus_number,
    format_amount,
    format_memory,
    is_named,
)


@dataclass(frozen=True)
class Running:
    """The running processes and their places, for people and for programs. URLs have no passwords.

    `embedded` is the pair of servers if no URLs were given.
    """

    redis_url: str
    database_url: str
    embedded: Pair | None
    workers: tuple[worker_lines.WorkerLine, ...]
    beat: int | None
    dashboard: int | None
    dashboard_url: str

    def to_json(self) -> dict[str, Any]:
        return {
            "redis_url": self.redis_url,
            "database_url": self.database_url,
            "embedded": self.embedded is not None,
            "workers": [
                {
                    "name": worker.name,
                    "cpus": cpus_number(worker.capacity.get(CPUS, 0)),
                    "memory": worker.capacity.get(MEMORY, 0),
                    "slots": worker.capacity.get(SLOTS, 0),
                    "pid": worker.pid,
                }
                for worker in self.workers
            ],
            "beat": None if self.beat is None else {"pid": self.beat},
            "dashboard": None if self.dashboard is None else {"url": self.dashboard_url, "pid": self.dashboard},
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """Return a line for each process: name, process id, place. The place may be long, so it comes last."""
        rows = [("Redis", "", self.redis_url), ("Postgres", "", servers.shown_url(self.database_url))]
        if self.embedded is not None:
            # The URL of its socket is longer than most screens are wide. `--json` has it.
            rows = [
                ("Redis", str(self.embedded.redis_pid), f"{self.redis_url} (embedded)"),
                ("Postgres", str(self.embedded.postgres_pid), f"embedded, in {self.embedded.data}"),
            ]
        rows += [(worker.name, str(worker.pid), _holds(worker.capacity)) for worker in self.workers]
        rows.append(("beat", *_or_not(self.beat, "the schedule")))
        rows.append(("JSON API", *_or_not(self.dashboard, self.dashboard_url)))
        return rows


def _holds(capacity: Mapping[str, int]) -> str:
    """Return a worker's capacity in words, as in "1 CPU, 7.8 GiB, 1 slot, 2 gpus"."""
    amounts = [format_amount(CPUS, capacity.get(CPUS, 0)), format_memory(capacity.get(MEMORY, 0))]
    amounts.append(format_amount(SLOTS, capacity.get(SLOTS, 0)))
    amounts += [format_amount(name, capacity[name]) for name in sorted(capacity) if is_named(name)]
    return ", ".join(amounts)


def _or_not(pid: int | None, address: str) -> tuple[str, str]:
    return (str(pid), address) if pid is not None else ("", "does not run here")
