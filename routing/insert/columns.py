"""Columns of a submitted job, in one list. Every way into the table of jobs derives its columns from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final

from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import State


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name and type in Postgres, and its value for a new job, as the driver takes it."""

    name: str
    type: str
    value: Callable[[NewJob], Any]


@lru_cache(maxsize=4096)
def request_json(shape: str) -> str:
    """Return the column `request`: the shape in people's units, as JSON."""
    return json.dumps(Request.from_shape(shape).to_people())


def _same(name: str, type_: str) -> Column:
    return Column(name, type_, attrgetter(name))


def _state(job: NewJob) -> str:
    return (State.ACCEPTED if job.starts else State.SCHEDULED).value


def _due_at(job: NewJob) -> Any:
    # A job with limits by key gets its time from these.
    return job.due_at if job.key_limits is None else None


def _not_before(job: NewJob) -> Any:
    return None if job.key_limits is None else job.due_at


COLUMNS: Final = (
    _same("id", "text"),
    _same("name", "text"),
    Column("state", "text", _state),
    _same("shape", "text"),
    Column("request", "jsonb", lambda job: request_json(job.shape)),
    _same("message", "bytea"),
    _same("priority", "smallint"),
    _same("declared", "bool"),
    _same("queue", "text"),
    _same("retries", "int"),
    _same("nesting", "int"),
    _same("root_id", "text"),
    _same("parent_id", "text"),
    Column("due_at", "timestamptz", _due_at),
    _same("expires_at", "timestamptz"),
    _same("rerun", "bool"),
    _same("replaces", "text"),
    _same("stamps", "jsonb"),
    _same("expected_ms", "bigint"),
    _same("key_limits", "jsonb"),
    Column("not_before", "timestamptz", _not_before),
)
NAMES: Final = ", ".join(column.name for column in COLUMNS)
TYPES: Final = ", ".join(column.type for column in COLUMNS)
_INDEXES: Final = {column.name: index for index, column in enumerate(COLUMNS)}


def values(job: NewJob, **others: Any) -> tuple[Any, ...]:
    """Return the values of a job in the order of `COLUMNS`. `others`: columns with another value than the job's."""
    row = [column.value(job) for column in COLUMNS]
    for name, value in others.items():
        row[_INDEXES[name]] = value
    return tuple(row)


def row(job: NewJob) -> dict[str, Any]:
    """Return the values of a job by the names of the columns."""
    return {column.name: column.value(job) for column in COLUMNS}
