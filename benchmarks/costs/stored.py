"""The stored costs, `stored.json`, which a change may not exceed by more than a tenth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.report import number, significant

#: Costs by kind and name: `commands` of a job's life, `cpu_ratio` to plain Celery, `calls` of a job on a real worker.
Kinds = Mapping[str, Mapping[str, float]]

STORED = Path(__file__).with_name("stored.json")

#: Greatest growth of a cost that passes.
GROWTH = 1.1


def read(path: Path = STORED) -> dict[str, dict[str, float]]:
    """Return the stored costs; none if there is no file."""
    kinds: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return kinds


def write(costs: Kinds, path: Path = STORED) -> None:
    """Replace the stored costs of these kinds."""
    kinds = read(path)
    for kind, values in costs.items():
        kinds[kind] = {name: significant(value) for name, value in values.items()}
    path.write_text(json.dumps(kinds, indent=2, sort_keys=True) + "\n")


def grown(kind: str, now: Mapping[str, float], stored: Mapping[str, float]) -> list[str]:
    """Return a line for each cost that grew by more than a tenth, or that is not stored.

    >>> grown("commands", {"alone": 56.0, "together": 24.0}, {"alone": 50.0, "together": 25.0})
    ['commands of alone: 56, stored 50: 1.12 times']
    """
    lines = []
    for name, value in now.items():
        before = stored.get(name)
        if before is None:
            lines.append(f"{kind} of {name}: {number(value)}, not stored")
        elif value > before * GROWTH:
            lines.append(f"{kind} of {name}: {number(value)}, stored {number(before)}: {number(value / before)} times")
    return lines
