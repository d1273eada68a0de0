"""List jobs, newest first: those of some states, and of these the ones that a filter selects.

The index of each state has its jobs in order, so without other conditions only the listed rows are read. A filter by
task, worker, queue or group has no index of its own: one more index would cost every submission and every transition.
So the newest rows of a state are examined page by page until enough match, and no further back than `since`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, func, or_, select, true

from celery_capacity.routing.database import schema
from celery_capacity.routing.database.job_conditions import in_group, like_pattern, matches
from celery_capacity.routing.model.states import State
from celery_capacity.routing.store.queries import SHOWN, JobLine, columns

#: Rows that one statement examines: some 10 ms, and far below the time-out of a statement.
PAGE: Final = 5000
#: Seconds by which an earlier submission may have a later time: its transaction began before, and was slower.
DISORDER: Final = 60.0

_jobs = schema.jobs.c


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Conditions that all must hold; None is no condition.

    `task`, `worker` and `queue` may have `*` for any characters. `group`: the id of a group, of a chord's header, or of
    the first task of a workflow. `since` and `until`: seconds since the submission, at most and at least. `text`: part
    of the id, of the task's name or of the error, in letters of either case.
    """

    states: tuple[State, ...] = tuple(State)
    task: str | None = None
    worker: str | None = None
    queue: str | None = None
    group: str | None = None
    since: float | None = None
    until: float | None = None
    text: str | None = None

    @property
    def examines_rows(self) -> bool:
        """Return whether rows must be looked at one by one."""
        conditions = (self.task, self.worker, self.queue, self.group, self.since, self.until, self.text)
        return conditions != (None,) * len(conditions)


@dataclass(frozen=True, slots=True)
class JobList:
    """Jobs, the newest first. `now`: Postgres's clock when they were read.

    `next_before`: the place in the order of submissions before which the next page begins; None on the last page.
    """

    lines: Sequence[JobLine]
    now: datetime
    next_before: int | None = None


def snapshot(engine: Engine) -> Connection:
    """Return a connection whose statements all see the jobs of one moment.

    The states are searched one after the other. A job that changes its state meanwhile would be found in both.
    """
    return engine.connect().execution_options(isolation_level="REPEATABLE READ")


def newest(connection: Connection, wanted: JobFilter, limit: int, before: int | None = None) -> JobList:
    """Return at most `limit` jobs that the filter selects, the last submitted first.

    `before`: only jobs before this place in the order of submissions, the `next_before` of the page before.
    """
    search = _Search(connection, wanted)
    rows = [row for state in wanted.states for row in search.newest(state, limit, before)]
    rows.sort(key=lambda row: -int(row["seq"]))
    rest = int(rows[limit - 1]["seq"]) if len(rows) >= limit else None
    return JobList([JobLine({name: row[name] for name in SHOWN}) for row in rows[:limit]], search.now, rest)


def count(connection: Connection, wanted: JobFilter) -> int:
    """Return the number of jobs that the filter selects."""
    if wanted.examines_rows:
        search = _Search(connection, wanted)
        return sum(search.count(state) for state in wanted.states)
    query = select(func.count()).select_from(schema.jobs)
    if set(wanted.states) != set(State):
        query = query.where(_jobs.state.in_(wanted.states))
    return int(connection.execute(query).scalar_one())


class _Search:
    """Search for the jobs of a filter, one state at a time."""

    def __init__(self, connection: Connection, wanted: JobFilter) -> None:
        self._connection = connection
        self._wanted = wanted
        asked = select(func.clock_timestamp(), func.has_column_privilege("jobs", "message", "SELECT"))
        #: Only messages name groups, and not every role may read them.
        self.now, self._readable = connection.execute(asked).one()

    def newest(self, state: State, limit: int, before: int | None = None) -> list[Mapping[str, Any]]:
        """Return the newest jobs of a state that the filter selects, at most `limit`, below a place in the order."""
        rows: list[Mapping[str, Any]] = []
        # Without conditions each examined row is selected, so no more are read than are listed.
        size = PAGE if self._wanted.examines_rows else limit
        while len(rows) < limit:
            page = self._page(state, before, size).cte("page").prefix_with("MATERIALIZED")
            selected = self._condition(page.c).label("selected")
            last = page.c.seq == select(func.min(page.c.seq)).scalar_subquery()
            shown = (page.c[name] for name in ("seq", *SHOWN))
            query = select(*shown, selected).where(or_(selected, last)).order_by(page.c.seq.desc())
            answer = self._connection.execute(query).mappings().all()
            rows += [dict(row) for row in answer if row["selected"]]
            if not answer or not self._wanted.examines_rows or self._is_over(answer[-1]["submitted_at"]):
                break
            before = int(answer[-1]["seq"])
        return rows[:limit]

    def count(self, state: State) -> int:
        """Count the jobs of a state that the filter selects."""
        total, before = 0, None
        while True:
            page = self._page(state, before, PAGE).cte("page").prefix_with("MATERIALIZED")
            query = select(
                func.count().label("examined"),
                func.count().filter(self._condition(page.c)).label("selected"),
                func.min(page.c.seq).label("last"),
                func.min(page.c.submitted_at).label("oldest"),
            ).select_from(page)
            answer = self._connection.execute(query).one()
            total += int(answer.selected)
            if answer.examined < PAGE or self._is_over(answer.oldest):
                return total
            before = int(answer.last)

    def _page(self, state: State, before: int | None, size: int) -> Select[Any]:
        """Return a query for the newest rows of a state, below a place in the order of submission."""
        names = ("seq", "root_id", *SHOWN, *(("message",) if self._searches_messages else ()))
        query = select(*columns(schema.jobs, names)).where(_jobs.state == state)
        if before is not None:
            query = query.where(_jobs.seq < before)
        return query.order_by(_jobs.seq.desc()).limit(size)

    def _condition(self, page: Any) -> ColumnElement[bool]:
        wanted = self._wanted
        patterns = ((page.name, wanted.task), (page.worker, wanted.worker), (page.queue, wanted.queue))
        conditions = [matches(column, pattern) for column, pattern in patterns if pattern is not None]
        if wanted.group is not None:
            conditions.append(in_group(page, wanted.group, readable=self._readable))
        if wanted.since is not None:
            conditions.append(page.submitted_at >= self.now - timedelta(seconds=wanted.since))
        if wanted.until is not None:
            conditions.append(page.submitted_at <= self.now - timedelta(seconds=wanted.until))
        if wanted.text is not None:
            part = like_pattern(f"*{wanted.text.replace('*', '')}*")
            conditions.append(or_(*(column.ilike(part, escape="\\") for column in (page.id, page.name, page.error))))
        return and_(true(), *conditions)

    @property
    def _searches_messages(self) -> bool:
        return self._wanted.group is not None and self._readable

    def _is_over(self, oldest: datetime) -> bool:
        """Return whether all earlier rows were submitted before the time that the filter names."""
        since = self._wanted.since
        return since is not None and (self.now - oldest).total_seconds() > since + DISORDER
