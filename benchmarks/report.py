"""Reports of the results: a table, `results.json`, and the table in the docs."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.explanations import reason
from benchmarks.rounds import Sides

#: Markers on a page: the table between them is replaced; the rest of the page is written by hand.
BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"

#: Significant digits that are kept of a measured number.
DIGITS = 4


@dataclass(frozen=True)
class Result:
    """A line of results.json. `plain` and `ratio` (ours / plain) are None where there is no peer."""

    figure: str
    unit: str
    ours: float
    plain: float | None
    ratio: float | None
    rounds: int

    @classmethod
    def of(cls, figure: str, unit: str, sides: Sides) -> Result:
        """Make a result of the medians of both sides and their ratio."""
        ours, plain = sides.medians()
        ratio = significant(ours / plain) if plain else None
        return cls(figure, unit, significant(ours), plain and significant(plain), ratio, sides.rounds)


@dataclass(frozen=True)
class Line:
    """A result beside its target. Without a target, `reached` is None; `better` is `more` or `less`."""

    result: Result
    better: str
    target: str
    reached: bool | None

    def cells(self) -> tuple[str, ...]:
        """Return the line's texts, in the order of `HEADINGS`."""
        result = self.result
        return (
            result.figure,
            result.unit,
            self.better,
            number(result.ours),
            number(result.plain),
            number(result.ratio),
            self.target,
            {True: "yes", False: "no", None: "–"}[self.reached],
            str(result.rounds),
        )


HEADINGS = ("figure", "unit", "better", "ours", "plain", "ratio", "target", "reached", "rounds")

#: Columns whose cells are numbers.
NUMBERS = frozenset({"ours", "plain", "ratio", "rounds"})


def significant(value: float) -> float:
    """Round the value to `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def number(value: float | None) -> str:
    """Format a number for people: whole from 100 on, else three digits; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_table(lines: Sequence[Line], stream: TextIO) -> None:
    """Print a table with rules and colours on a terminal, and aligned columns elsewhere."""
    if stream.isatty():
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in HEADINGS:
            # On a narrow terminal, names and targets are broken and nothing is shortened.
            justify: Literal["right", "left"] = "right" if heading in NUMBERS else "left"
            table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading in NUMBERS)
        for line in lines:
            *cells, reached, rounds = line.cells()
            colour = {True: "green", False: "red", None: "default"}[line.reached]
            table.add_row(*cells, f"[{colour}]{reached}[/]", rounds)
        Console(file=stream).print(table)
        return
    rows = [HEADINGS, *(line.cells() for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if heading in NUMBERS else cell.ljust(width)
            for cell, width, heading in zip(row, widths, HEADINGS, strict=True)
        ]
        stream.write("  ".join(cells).rstrip() + "\n")


def as_json(results: Sequence[Result]) -> str:
    """Return the text of results.json."""
    return json.dumps([asdict(result) for result in results], indent=2) + "\n"


def read_results(path: Path) -> dict[str, Result]:
    """Return the results of an earlier run, by figure; none if the file does not exist."""
    if not path.exists():
        return {}
    return {line["figure"]: Result(**line) for line in json.loads(path.read_text())}


def read_profiles(path: Path) -> dict[str, list[str]]:
    """Return the profiles of an earlier run, by figure; none if the file does not exist."""
    profiles: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    return profiles


def measured_on(versions: Mapping[str, str]) -> str:
    """Return the line under the table: the day, the machine and the versions."""
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Measured on {datetime.now(UTC).date().isoformat()}: {about}."


def markdown(lines: Sequence[Line], about: str, profiles: Mapping[str, list[str]]) -> str:
    """Return the table of the docs, the measured machine, and why each missed figure missed its target."""
    rule = ["---:" if heading in NUMBERS else "---" for heading in HEADINGS]
    rows = [HEADINGS, rule, *(line.cells() for line in lines)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    text = [table, filled(about)]
    for explains, profile in explained([line for line in lines if line.reached is False], profiles):
        why = reason([line.result.figure for line in explains], profile)
        text.append(filled(f"{', '.join(map(headline, explains))}. {why}"))
        if profile:
            text.append("\n".join(["```text", *profile, "```"]))
    return "\n\n".join(text)


def filled(paragraph: str) -> str:
    """Return a paragraph in lines as long as those of the docs."""
    return textwrap.fill(paragraph.strip(), 118, break_long_words=False, break_on_hyphens=False)


def explained(lines: Sequence[Line], profiles: Mapping[str, list[str]]) -> list[tuple[list[Line], list[str]]]:
    """Return each profile once, with all lines that it explains. A line without a profile stands by itself."""
    explains: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        profile = profiles.get(line.result.figure) or []
        explains.setdefault(tuple(profile or [line.result.figure]), []).append(line)
    return [(about, profiles.get(about[0].result.figure) or []) for about in explains.values()]


def headline(line: Line) -> str:
    """Return the figure's name for people, and the target if it was missed."""
    missed = f" does not reach {line.target}" if line.reached is False else ""
    return f"`{line.result.figure}`{missed}"


#: Measured values that the page on sizing builds on: figure, and what it means there.
SIZING = {
    "submit": "jobs that one process submits, one by one",
    "submit_4": "jobs that four processes submit together",
    "bulk": "jobs that one process submits with `submit_many`",
    "end_to_end": "jobs from submission to result, one worker",
    "drain": "waiting jobs that one worker runs, tasks that do nothing",
    "admit_vs_evalsha_3": "one admission, round trip included, beside 3 workers",
    "admit_vs_evalsha_10000": "the same beside 10,000 workers",
    "admit_vs_evalsha_10000_waiting_100000": "the same beside 10,000 workers and 100,000 waiting jobs",
    "packing": "200 jobs of 1 to 16 CPUs on workers of 16, 16 and 32",
}


def sizing(results: Mapping[str, Result]) -> str:
    """Return the table of the page on sizing."""
    rows = [f"| {means} | {number(results[figure].ours)} {results[figure].unit} |" for figure, means in SIZING.items()]
    return "\n".join(["| what | measured |", "| --- | --- |", *rows])


def machine(versions: Mapping[str, str]) -> dict[str, str]:
    """Return the conditions of the numbers: this machine, its Python, and the given versions.

    The given versions are those of servers and libraries.
    """
    system = os.uname()
    return {
        f"{system.sysname} {system.machine}": f"with {os.cpu_count()} CPUs",
        "Python": sys.version.split()[0],
        **versions,
    }


def about_on(path: Path, place: str = "benchmarks") -> str:
    """Return the line of the page that says when and where its table was measured."""
    _, _, rest = path.read_text().partition(BEGIN.format(place))
    return next((" ".join(part.split()) for part in rest.split("\n\n") if part.startswith("Measured on")), "")


def update_page(path: Path, text: str, place: str = "benchmarks") -> bool:
    """Replace the text between the markers of a place. Return False if the page or its markers do not exist."""
    page = path.read_text() if path.exists() else ""
    before, begin, rest = page.partition(BEGIN.format(place))
    _, end, after = rest.partition(END.format(place))
    if not (begin and end):
        return False
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    return True
