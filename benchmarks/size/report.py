"""Reports of the values: results.json, the table of the docs, and the same table on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.report import filled, machine, number, significant
from benchmarks.size.figures import PARTS, Figure

RESULTS: Final = Path(__file__).with_name("results.json")
PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "reference" / "size.md"
#: Place of the table in the page.
PLACE: Final = "size"
HEADINGS: Final = ("figure", "unit", "worst", "each round", "target", "reached", "what it is")


@dataclass(frozen=True)
class Report:
    """The values of each figure, one per round, and the machine and versions on which they were measured."""

    about: str
    values: dict[str, list[float]]

    @classmethod
    def of(cls, values: Mapping[str, Iterable[float]], versions: Mapping[str, str]) -> Report:
        about = ", ".join(f"{name} {version}" for name, version in machine(versions).items())
        kept = {name: [significant(value) for value in of] for name, of in values.items()}
        return cls(f"Measured on {datetime.now(UTC).date().isoformat()}: {about}.", kept)

    @classmethod
    def read(cls, path: Path = RESULTS) -> Report:
        """Return the report of an earlier run, or an empty one if there is none."""
        fields: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"about": "", "values": {}}
        return cls(fields["about"], fields["values"])

    def over(self, earlier: Report) -> Report:
        """Return this report, with the figures that only the earlier one measured."""
        return Report(self.about, {**earlier.values, **self.values})

    def as_json(self) -> str:
        return json.dumps({"about": self.about, "values": self.values}, indent=2) + "\n"

    def lines(self) -> list[tuple[str, ...]]:
        """Return the table without its headings, in the order of the figures."""
        return [_line(figure, self.values[figure.name]) for figure in figures() if figure.name in self.values]

    def missed(self) -> list[Figure]:
        """Return the figures that do not reach their targets."""
        measured = [figure for figure in figures() if figure.name in self.values]
        return [figure for figure in measured if figure.reached(figure.worst(self.values[figure.name])) is False]

    def markdown(self) -> str:
        rule = tuple("---:" if heading in ("worst", "each round") else "---" for heading in HEADINGS)
        table = "\n".join("| " + " | ".join(row) + " |" for row in (HEADINGS, rule, *self.lines()))
        missed = [filled(f"`{figure.name}` does not reach {figure.target()}. {figure.why}") for figure in self.missed()]
        return "\n\n".join([table, filled(self.about), *missed])


def figures() -> Iterable[Figure]:
    return (figure for part in PARTS.values() for figure in part.figures)


def _line(figure: Figure, values: list[float]) -> tuple[str, ...]:
    worst = figure.worst(values)
    reached = {True: "yes", False: "no", None: "–"}[figure.reached(worst)]
    each = ", ".join(number(value) for value in values)
    return f"`{figure.name}`", figure.unit, number(worst), each, figure.target(), reached, figure.says
