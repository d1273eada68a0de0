"""Parameters of a list of jobs, checked before a store is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import click
from fastapi import Query

from celery_capacity.platform.console.durations import Since
from celery_capacity.platform.web.http.problems import wrong_parameter
from celery_capacity.platform.web.sources import MAX_PAGE
from celery_capacity.routing.inspect.job_list import JobFilter
from celery_capacity.routing.model.states import State

#: Characters of a parameter.
MAX_TEXT: Final = 300

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
        if word is not None and "\0" in word:
            raise wrong_parameter(name, word, "Leave the character NUL out.")
    since, until = (_seconds(name, time) for name, time in zip(("since", "until"), times, strict=True))
    chosen = tuple(dict.fromkeys(states)) or tuple(State)
    return JobFilter(chosen, since=since, until=until, **{name: word or None for name, word in words.items()})


def _seconds(name: str, time: str | None) -> float | None:
    """Return the seconds from a time until now. `time`: a duration such as 1h, or ISO 8601."""
    if not time:
        return None
    try:
        return Since().convert(time.replace(" ", "+"), None, None)
    except click.UsageError:
        raise wrong_parameter(name, time, Since.advice) from None
