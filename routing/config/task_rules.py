"""Requests for tasks whose code nobody here changes: the file that `PLATFORM_REQUESTS` names.

The file is TOML, with a table for each pattern of task names (`*`, `?` and `[...]` as in file names). The first pattern
that fits counts, in the order of the file. Its amounts replace those that the task declares, one by one::

    ["reports.nightly"]
    cpus = 2

    ["reports.*"]
    cpus = 0.5
    memory = "512MiB"
    resources = { licence = 1 }
    expected = "10m"
    where = { arch = "aarch64" }
    rerun = false
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from celery_capacity.routing.errors import InvalidRequest, SettingsError, show
from celery_capacity.routing.model.expected import EXPECTED, parse_duration
from celery_capacity.routing.model.request import (
    CALL_OPTIONS,
    PLACE_OPTIONS,
    REQUEST_OPTIONS,
    REQUESTS,
    Request,
    alternatives_from,
)
from celery_capacity.routing.policy.labels import ANYWHERE, Place, place_of_options

#: Setting that names the file.
ENV: Final = "PLATFORM_REQUESTS"
#: Key that is false where the first lost attempt ends the job, as in what workers publish of a task: {"rerun": false}.
RERUN: Final = "rerun"
#: Task names whose rule is remembered at once; bounded, since anybody may send by any name.
MAX_NAMES: Final = 4096
#: Keys that a table may have.
KEYS: Final = (*CALL_OPTIONS, RERUN)


@dataclass(frozen=True, slots=True)
class Rule:
    """Rule of the file for tasks whose names fit `pattern`.

    `rerun` is None where the table does not say. So is `expected_ms`, the time that such a job is expected to run.
    `location`: where the job may run, as far as the table says.
    """

    pattern: str
    options: Mapping[str, Any]
    rerun: bool | None = None
    expected_ms: int | None = None
    location: Place = ANYWHERE


@dataclass(frozen=True, slots=True)
class RequestRules:
    """Rules of a file, in its order; false where there are none."""

    rules: tuple[Rule, ...] = ()
    _found: dict[str, Rule | None] = field(default_factory=dict, compare=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self.rules)

    def of(self, name: str) -> Rule | None:
        """Return the first rule that fits the name of a task; None for none."""
        if name not in self._found:
            if len(self._found) >= MAX_NAMES:
                self._found.clear()
            self._found[name] = next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)
        return self._found[name]

    def over(self, name: str, declared: Request) -> Request:
        """Return the request of a task: the declared amounts, and those of the file over them."""
        rule = self.of(name)
        return declared if rule is None else declared.merged(rule.options)

    def alternatives(self, name: str, before: Sequence[Request], declared: Request) -> tuple[Request, ...]:
        """Return the alternatives of a task: those that it declares, with the options of the file over them."""
        rule = self.of(name)
        return tuple(before) if rule is None else alternatives_from(rule.options, before, declared)


#: Rules where no file is named.
NO_RULES: Final = RequestRules()


def read(path: Path | None) -> RequestRules:
    """Return the rules of the file; none without a file.

    Raises one `SettingsError` with all that is wrong in the file.
    """
    if path is None:
        return NO_RULES
    where = f"{ENV}={path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{where} cannot be read: {error}. Name a TOML file that this user may read."]) from error
    try:
        # The error says line and column.
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([f"{where} is not TOML: {error}"]) from error
    wrong: list[str] = []
    rules = tuple(_rule(name, table, f"{where}, [{show(name)}]", wrong) for name, table in tables.items())
    if wrong:
        raise SettingsError(wrong)
    return RequestRules(rules)


def _rule(pattern: str, table: Any, where: str, wrong: list[str]) -> Rule:
    """Return a rule; each mistake in it adds a sentence to the list `wrong`."""
    if not isinstance(table, dict):
        wrong.append(f'{where}: it must be a table: ["{pattern}"], and below it cpus = {table!r}.')
        return Rule(pattern, {})
    if any(isinstance(value, dict) and key not in KEYS for key, value in table.items()):
        wrong.append(f'{where}: a name with dots is written between quotes: ["{pattern}.{next(iter(table))}"].')
        return Rule(pattern, {})
    strange = table.keys() - set(KEYS)
    wrong.extend(f"{where}: {show(key)} is not known; there are {', '.join(KEYS)}." for key in sorted(strange))
    options = {key: table[key] for key in REQUEST_OPTIONS if key in table}
    for key, value in options.items():
        try:
            Request.from_options({key: value}, 0)
        except InvalidRequest as error:
            wrong.append(f"{where}: {key}: {error}")
    if REQUESTS in table:
        options[REQUESTS] = table[REQUESTS]
        try:
            alternatives_from({REQUESTS: table[REQUESTS]}, (), Request.of({}))
        except InvalidRequest as error:
            wrong.append(f"{where}: {error}")
    expected_ms = None
    if EXPECTED in table:
        try:
            expected_ms = parse_duration(table[EXPECTED])
        except InvalidRequest as error:
            wrong.append(f"{where}: {error}")
    location = ANYWHERE
    for key in PLACE_OPTIONS:
        try:
            location = location.over(place_of_options({key: table.get(key)}))
        except InvalidRequest as error:
            wrong.append(f"{where}: {error}")
    rerun = table.get(RERUN)
    if rerun is not None and not isinstance(rerun, bool):
        wrong.append(f"{where}: {RERUN} = {show(rerun)} must be true or false.")
    return Rule(pattern, options, rerun, expected_ms, location)
