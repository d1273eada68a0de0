"""The table of the costs, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from benchmarks.costs.contender import PerJob
from benchmarks.report import number, significant

#: Costs of a job by contender, figure and name of the cost.
Costs = Mapping[str, Mapping[str, PerJob]]

#: Label of each cost in the table, in its order. Costs by process are indented under their sum.
LABELS = {
    "cpu_us": "CPU, µs",
    "cpu_us.submitter": "  submitter",
    "cpu_us.worker": "  worker",
    "cpu_us.Redis": "  Redis",
    "cpu_us.Postgres": "  Postgres",
    "commands": "Redis commands",
    "scripts": "Redis scripts",
    "script_us": "time in scripts, µs",
    "round_trips": "Redis round trips",
    "transactions": "Postgres transactions",
    "wal_bytes": "Postgres log, bytes",
    "switches.submitter": "thread switches: submitter",
    "switches.worker": "  worker",
    "switches.Redis": "  Redis",
    "switches.Postgres": "  Postgres",
    "system_calls.submitter": "system calls: submitter",
    "system_calls.worker": "  worker",
    "system_calls.Redis": "  Redis",
    "system_calls.Postgres": "  Postgres",
}

#: A cost of less than this a job, in its unit, is not compared: it is a matter of chance.
LEAST = 0.05


def as_json(costs: Costs) -> str:
    """Return the costs as JSON, with four significant digits."""
    rounded = {
        name: {figure: {cost: significant(value) for cost, value in each.items()} for figure, each in of.items()}
        for name, of in costs.items()
    }
    return json.dumps(rounded, indent=2) + "\n"


def read(path: Path) -> dict[str, dict[str, PerJob]]:
    """Return the costs of a file that `as_json` wrote."""
    costs: dict[str, dict[str, PerJob]] = json.loads(path.read_text())
    return costs


def print_table(costs: Costs, figures: Sequence[str], stream: TextIO) -> None:
    """Print a table for each figure: the costs of a job of each contender, and ours divided by each of the others."""
    others = [name for name in costs if name != "ours"]
    headings = ["ours", *(heading for name in others for heading in (name, f"ours/{name}"))]
    width = max(map(len, LABELS.values()))
    for figure in figures:
        ours = costs["ours"].get(figure)
        if ours is None:
            continue
        stream.write(f"\n{figure + ', per job':{width}}" + "".join(f"{heading:>14}" for heading in headings) + "\n")
        for cost, label in LABELS.items():
            if cost not in ours:
                continue
            cells = [number(ours[cost])]
            for name in others:
                value = costs[name].get(figure, {}).get(cost)
                cells += [number(value), number(ratio(ours[cost], value))]
            stream.write(f"{label:{width}}" + "".join(f"{cell:>14}" for cell in cells) + "\n")


def ratio(value: float, other: float | None) -> float | None:
    """Return the value divided by the other, or None where the other is next to nothing."""
    return None if other is None or other < LEAST else value / other
