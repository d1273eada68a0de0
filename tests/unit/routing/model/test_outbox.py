"""The text of an outbox, which workers of other versions read and write."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import pytest

from celery_capacity.routing.model.expected import RunTime, expected_class
from celery_capacity.routing.model.job import Constraints, NewJob, Rate
from celery_capacity.routing.model.outbox import Outbox, parse
from celery_capacity.routing.model.request import timed

#: Fields of a job in the text. They are a format: an older worker fails on another name.
FIELDS: Final = {
    *("id", "name", "shape", "message", "priority", "declared", "queue", "retries", "nesting", "publisher", "rerun"),
    *("root_id", "parent_id", "replaces", "due_at", "expires_at", "gates", "stamps"),
}
RATED: Final = Constraints(key="k", after=("first",), rate=Rate(0.5, "30/m"), burst=2.0)


@pytest.mark.parametrize("constraints", [None, RATED], ids=["free", "constrained"])
def test_outbox_text_gives_the_same_jobs(constraints: Constraints | None) -> None:
    job = NewJob("a", "task", "cpus=1000,slots=1", b"\0message", due_at=datetime(2100, 1, 1, tzinfo=UTC))
    job = replace(job, constraints=constraints)
    text = Outbox([job]).to_text()
    # Nobody hears a refusal any more, so a constraint is tolerant from here on.
    expected = replace(job, constraints=replace(constraints, tolerant=True)) if constraints else job
    assert parse(text).publishes == [expected]
    assert json.loads(text)["publishes"][0].keys() == FIELDS


def test_job_of_an_outbox_keeps_the_class_of_its_run_time() -> None:
    shape = timed("cpus=1000,slots=1", RunTime(600_000, 600_000))
    job = NewJob("a", "task", shape, b"message", expected_ms=600_000)
    assert parse(Outbox([job]).to_text()).publishes == [replace(job, expected_ms=expected_class(600_000))]


def test_job_of_an_outbox_keeps_that_its_priority_was_given() -> None:
    job = NewJob("a", "task", "cpus=1000,slots=1", b"message", priority=2, priority_given=True)
    assert parse(Outbox([job]).to_text()).publishes == [job]
