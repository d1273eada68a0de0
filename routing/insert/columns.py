"""Columns of a submitted job, in one list. Every way into the table of jobs derives its columns from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final

from celery_capacity.routing.model.amounts import ALONE, LABEL
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.request import Request, number_held
from celery_capacity.routing.model.states import State
from celery_capacity.routing.policy.placement import asked_shape


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


def held_columns(shape: str) -> dict[str, str]:
    """Return the shape and the request of a row whose job holds an alternative; none for a shape without one.

    `shape`: as the ledger has it. A row has neither its task nor that a last attempt runs alone.
    """
    if not number_held(shape):
        return {}
    asked = asked_shape(shape)
    return {"shape": asked, "request": request_json(asked)}


_LISTED: Final = r"regexp_replace(substring(jobs.shape FROM ',\|([^,]*)'), '^[0-9]\|', '')"
_FIRST: Final = f"translate(split_part({_LISTED}, '|', 1), '!;', '=,')"
#: True for a row with alternatives, and the shape and the request under which its job waits.
HAS_ALTERNATIVES: Final = "strpos(jobs.shape, ',|') > 0"
WAITING_SHAPE: Final = f"{_FIRST} || ',|' || {_LISTED} || coalesce({{}}, '')".format(
    r"substring(jobs.shape FROM ',\|[^,]*(,.*)$')"
)
WAITING_REQUEST: Final = f"""(
  SELECT jsonb_build_object('cpus', 0) || jsonb_object_agg(split_part(pair, '=', 1),
    CASE WHEN pair LIKE 'cpus=%' THEN to_jsonb(trim_scale(split_part(pair, '=', 2)::numeric / 1000))
         ELSE to_jsonb(split_part(pair, '=', 2)::bigint) END)
  FROM unnest(string_to_array({_FIRST}, ',')) AS pair WHERE pair NOT LIKE '{ALONE}=%' AND pair NOT LIKE '{LABEL}%')"""


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
