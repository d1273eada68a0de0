"""Comparison of two runs of Celery's suite: with plain Celery, and with apps of the platform."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

#: The differences that are there on purpose, each with its reason.
ON_PURPOSE: Final = Path(__file__).with_name("on_purpose.toml")
PASSED: Final = ("passed", "skipped")


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a test: `outcome` is passed, failed or skipped. `error`: the end of its report."""

    test: str
    outcome: str
    error: str = ""

    @property
    def file(self) -> str:
        return self.test.partition("::")[0]


@dataclass(frozen=True, slots=True)
class Purpose:
    """Tests that fail on the platform on purpose. The name of a test is that of all its parameters."""

    tests: tuple[str, ...]
    reason: str

    def covers(self, test: str) -> bool:
        return any(test == name or test.startswith(f"{name}[") for name in self.tests)


@dataclass
class Table:
    """Numbers of tests of a file, or of all files."""

    passed: int = 0
    skipped: int = 0
    #: Tests that fail with plain Celery too.
    plain: int = 0
    on_purpose: int = 0
    #: Tests that differ, and are not listed.
    differing: list[Result] = field(default_factory=list)
    #: Listed tests that passed.
    not_needed: list[str] = field(default_factory=list)

    def add(self, other: Table) -> None:
        self.passed += other.passed
        self.skipped += other.skipped
        self.plain += other.plain
        self.on_purpose += other.on_purpose
        self.differing += other.differing
        self.not_needed += other.not_needed


def read_purposes(path: Path = ON_PURPOSE) -> list[Purpose]:
    """Return the listed differences. Raises `ValueError` for one without tests or a reason."""
    listed = [
        Purpose(tuple(entry["tests"]), entry["reason"]) for entry in tomllib.loads(path.read_text())["difference"]
    ]
    for purpose in listed:
        if not purpose.tests or not purpose.reason.strip():
            raise ValueError(f"{path.name}: a difference names its tests and a reason: {purpose}")
    return listed


def compare(
    platform: Iterable[Result], plain: Sequence[Result] | None, purposes: Sequence[Purpose]
) -> Mapping[str, Table]:
    """Return a table for each file, in the order of the files. `plain`: None where plain Celery was not run."""
    results = {result.test: result for result in platform}
    beside = {result.test: result for result in plain or ()}
    tables: dict[str, Table] = {}
    for test in sorted({*results, *beside}):
        result = results.get(test, Result(test, "missing", "it did not run"))
        table = tables.setdefault(result.file, Table())
        is_listed = any(purpose.covers(test) for purpose in purposes)
        if result.outcome == "passed":
            table.passed += 1
            table.not_needed += [test] if is_listed else []
        elif result.outcome == "skipped" and (test not in beside or beside[test].outcome == "skipped"):
            table.skipped += 1
        elif test in beside and beside[test].outcome not in PASSED:
            table.plain += 1
        elif is_listed:
            table.on_purpose += 1
        else:
            table.differing.append(result)
    return tables
