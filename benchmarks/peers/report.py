"""The table of ours beside the peers, and its JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.figures import BY_NAME
from benchmarks.report import machine, number, significant

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "benchmarks.md"

#: Place of the table in the page.
PLACE = "peers"

#: Targets: figure and peer, and what ours is at least times the peer.
AT_LEAST = {("bulk", "procrastinate"): 1.0}

HEADINGS = ("figure", "unit", "better", "ours", "peer", "its value", "ours / peer", "target")


@dataclass(frozen=True)
class Report:
    """The median of each figure, by ours or the peer, and the machine and versions."""

    about: str
    values: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, rounds: Mapping[str, Sequence[Mapping[str, float]]], versions: Mapping[str, str]) -> Report:
        """Make a report of the medians of the rounds."""
        about = ", ".join(f"{name} {version}" for name, version in machine(versions).items())
        medians = {
            name: {figure: significant(statistics.median(each[figure] for each in of)) for figure in of[0]}
            for name, of in rounds.items()
        }
        return cls(f"Measured on {datetime.now(UTC).date().isoformat()}: {about}.", medians)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report of an earlier run."""
        fields = json.loads(text)
        return cls(fields["about"], fields["values"])

    def as_json(self) -> str:
        return json.dumps({"about": self.about, "values": self.values}, indent=2) + "\n"

    def lines(self) -> list[tuple[str, ...]]:
        """Return the table without headings: a line for each figure and peer."""
        lines: list[tuple[str, ...]] = []
        for figure, value in self.values["ours"].items():
            for peer, values in self.values.items():
                if peer == "ours" or figure not in values:
                    continue
                least = AT_LEAST.get((figure, peer))
                target = "–" if least is None else f"≥ {least:g}: {'yes' if self._is_reached(figure, peer) else 'no'}"
                ratio = number(value / values[figure])
                about = (BY_NAME[figure].unit, BY_NAME[figure].better)
                lines.append((figure, *about, number(value), peer, number(values[figure]), ratio, target))
        return lines

    def reached(self) -> bool:
        """Return True if all targets are reached."""
        return all(self._is_reached(figure, peer) for figure, peer in AT_LEAST)

    def markdown(self) -> str:
        """Return the table of the docs."""
        rule = tuple("---:" if heading in ("ours", "its value", "ours / peer") else "---" for heading in HEADINGS)
        table = "\n".join("| " + " | ".join(row) + " |" for row in (HEADINGS, rule, *self.lines()))
        return f"{table}\n\n{self.about}"

    def text(self) -> str:
        """Return the table for a terminal."""
        rows = (HEADINGS, *self.lines())
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = (tuple(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "".join("  ".join(row).rstrip() + "\n" for row in padded)

    def _is_reached(self, figure: str, peer: str) -> bool:
        return self.values["ours"][figure] >= AT_LEAST[figure, peer] * self.values[peer][figure]
