"""Parameters of a list of jobs, checked before a store is asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import click
from fastapi import Query
from starlette.datastructures import QueryParams

from celery_capacity.platform.console.durations import Since
from celery_capacity.platform.web.http.problems import wrong_parameter
from celery_capacity.platform.web.sources import MAX_PAGE
from celery_capacity.routing.database.job_lines import Position
from celery_capacity.routing.inspect.job_list import JobFilter
from celery_capacity.routing.model.states import State

#: Characters of a parameter.
MAX_TEXT: Final = 300

#: Length of a stretch whose beginning is not said.
LAST: Final = timedelta(hours=1)

Text = Annotated[str | None, Query(max_length=MAX_TEXT)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
Cursor = Annotated[int | None, Query(ge=0, lt=2**63, description="the `next_cursor` of the page before")]


def filter_of(
    states: Sequence[State],
    *,
    task: str | None,
    queue: str | None,
    worker: str | None,
    group: str | None,
    text: str | None,
    times: tuple[str | None, str | None],
) -> JobFilter:
    """Return the filter of a request; an empty text is no condition. `times`: since and until. Raises `InvalidRequest`.

    Postgres has no text with the character NUL, so no job has one.
    """
    words = {"task": task, "worker": worker, "queue": queue, "group": group, "text": text}
    for name, word in words.items():
        if word is not None:
            text_of(name, word)
    since, until = (_seconds(name, time) for name, time in zip(("since", "until"), times, strict=True))
    chosen = tuple(dict.fromkeys(states)) or tuple(State)
    return JobFilter(chosen, since=since, until=until, **{name: word or None for name, word in words.items()})


def filter_of_query(query: QueryParams) -> JobFilter:
    """Return the filter in the query of a page; an empty value is no condition. Raises `InvalidRequest`."""
    words = {name: query.get(name) or None for name in ("task", "queue", "worker", "group", "text")}
    states = [state for state in query.getlist("state") if state]
    for state in states:
        if state not in list(State):
            raise wrong_parameter("state", state, f"Write one of {', '.join(State)}.")
    return filter_of(list(map(State, states)), **words, times=(query.get("since"), query.get("until")))


def text_of(name: str, word: str) -> str:
    """Return a text that Postgres can have. Raises `InvalidRequest`."""
    if "\0" in word:
        raise wrong_parameter(name, word, "Leave the character NUL out.")
    return word


def stretch_of(since: str | None, until: str | None) -> tuple[datetime, datetime]:
    """Return the beginning and the end of a stretch: the last hour until now, where nothing is said.

    Raises `InvalidRequest` for a stretch that ends before it begins.
    """
    end = moment_of("until", until) if until else datetime.now(UTC)
    begin = moment_of("since", since) if since else end - LAST
    if begin > end:
        raise wrong_parameter("since", since, "Write a time before that of until.")
    return begin, end


def position_of(after: str | None) -> Position | None:
    """Return the position of a line in a job's log, as a cursor says it. Raises `InvalidRequest`."""
    if not after:
        return None
    if not re.fullmatch(r"[0-9]{1,18}\.[0-9]{1,9}\.[0-9]{1,18}", after, re.ASCII):
        raise wrong_parameter("after", after, "Write the cursor of an earlier answer.")
    return Position(*map(int, after.split(".")))


def moment_of(name: str, time: str) -> datetime:
    """Return a time that is over. `time`: a duration such as 1h, which counts back from now, or ISO 8601."""
    return datetime.now(UTC) - timedelta(seconds=_seconds(name, time) or 0.0)


def _seconds(name: str, time: str | None) -> float | None:
    """Return the seconds from a time until now. `time`: a duration such as 1h, or ISO 8601."""
    if not time:
        return None
    try:
        return Since().convert(time.replace(" ", "+"), None, None)
    except click.UsageError:
        raise wrong_parameter(name, time, Since.advice) from None
