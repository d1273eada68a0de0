"""A job as a program sees it by its id: where it is, its end and result, and what can be done with it.

`job(id)` waits in the caller's thread; its `aio` does the same in asyncio programs. Both share their code.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any, Final

from celery import Celery, current_app
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult
from sqlalchemy import Connection

from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import InvalidRequest, PlatformError, show
from celery_capacity.routing.forecast.starts import rules_of
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.inspect.explanation import Explanation
from celery_capacity.routing.inspect.job_events import JobEvent
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.store import queries
from celery_capacity.workers.client import following
from celery_capacity.workers.client.cancel import Cancellation, cancel
from celery_capacity.workers.client.job_info import JobInfo, reported
from celery_capacity.workers.client.retry import retry
from celery_capacity.workers.display import tables
from celery_capacity.workers.process.stores import Stores, platform_of

#: Seconds after the end of a job within which its result is there, if one is kept.
KEPT_WITHIN: Final = 2.0


class Job:
    """Handle of a job, by its id. It asks the stores only when a method is called."""

    def __init__(self, id: str, app: Celery, stores: Stores) -> None:  # noqa: A002
        self.id = check_job_id(id)
        self._app = app
        self._stores = stores

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    def _repr_html_(self) -> str:
        """Return the job as a table, for a notebook; an error of a store as a sentence."""
        try:
            return self.info()._repr_html_()
        except PlatformError as error:
            return tables.sentence(self.id, str(error))

    @property
    def aio(self) -> AsyncJob:
        """Return the same job for asyncio programs, as an `AsyncJob`."""
        return AsyncJob(self)

    def now(self) -> JobEvent:
        """Return the current state, as a `JobEvent`. Raises `InvalidRequest` for an unknown job, `StoreUnavailable`."""
        return following.look(self._stores, self.id).event

    def info(self) -> JobInfo:
        """Return all that both stores know of the job, as a `JobInfo`: why it waits and at which place, its progress.

        Raises as `now` does.
        """
        with translated(), self._stores.engine.connect() as connection:
            file = queries.find(connection, self.id)
            why = self._explain(connection)
        if file is None:
            raise self._unknown()
        row, waits = file.job, why is not None and why.waits
        return JobInfo(
            id=self.id,
            task=row["name"],
            state=State(row["state"]),
            attempt=row["attempt"],
            worker=None if waits else row["worker"],
            **{name: row[name] for name in ("queue", "priority", "request", "error", "retry_of")},
            **{name: row[name] for name in ("submitted_at", "admitted_at", "started_at", "finished_at")},
            reason=why.why.value if why is not None and waits else None,
            place=why.place if why is not None and waits else None,
            before=why.before if why is not None and waits else None,
            progress=reported(row["progress"]),
            retried_as=tuple(row["retried_as"]),
        )

    def explain(self) -> Explanation:
        """Return why the job is where it is, as an `Explanation`.

        It has the reason, the position, what is missing on each worker, and the estimated start. Raises as `now` does.
        """
        with translated(), self._stores.engine.connect() as connection:
            why = self._explain(connection, rules_of(self._stores.settings))
        if why is None:
            raise self._unknown()
        return why

    def _explain(self, connection: Connection, rules: Rules | None = None) -> Explanation | None:
        client, settings = quick_client(self._stores.redis), self._stores.settings
        ttl, halves_in = settings.worker_ttl, settings.share_halves_in
        return explain(client, connection, self.id, settings.most_losses, rules, ttl, halves_in)

    def _unknown(self) -> InvalidRequest:
        advice = "Its transaction may not be over."
        return InvalidRequest(f"there is no job {self.id}", value=self.id, advice=advice)

    def wait(self, *states: str, timeout: float | None = None) -> JobEvent:
        """Wait until the job is in one of the states or has ended, and return the event that says so.

        Without a state, wait for its end. Returns at once if the job is there already. Raises `TimeoutError` after
        `timeout` seconds, and raises as `now` does.
        """
        wanted = _wanted(states)
        with closing(self.events(timeout)) as events:
            for event in events:
                if event.state in wanted:
                    return event
        raise AssertionError("the events of a job end with its end")

    def events(self, timeout: float | None = None) -> Generator[JobEvent]:
        """Yield the current state, then each state that the job comes into, until its end. Raises as `wait` does.

        After a gap, it may miss a state that lasts for less than a moment.
        """
        with closing(following.follow(self._stores, [self.id], timeout)) as events:
            for event in events:
                assert event is not None, "without a tick each item is an event"
                yield event

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end and return the value; raise the error of a job that failed, as Celery's `get` does.

        Returns None where no value is kept. Raises `TimeoutError` after `timeout` seconds, `PlatformError` for a job
        that did not succeed and whose error is not kept, and raises as `now` does.
        """
        state = self.wait(timeout=timeout).state
        try:
            return self._app.AsyncResult(self.id).get(timeout=KEPT_WITHIN)
        except CeleryTimeout as error:
            if state == State.SUCCEEDED:
                return None
            reason = self.info().error
            text = f"job {self.id} has ended as {state}: {reason}" if reason else f"job {self.id} has ended as {state}"
            raise PlatformError(text, advice="Its result is not kept.") from error

    def cancel(self, *, terminate: bool = False) -> Cancellation:
        """Cancel the job for good, and return a `Cancellation`.

        A job that a worker holds runs to its end, and no other attempt follows it; `terminate` ends its process. Raises
        as `now` does.
        """
        return next(iter(cancel(self._app, self._stores, [self.id], terminate=terminate)))

    def retry(self, *, again: bool = False) -> Job:
        """Repeat the ended job, and return the new job.

        `again`: also where the job succeeded, or has a retry already. Raises `NotRetried` with the reason,
        `InvalidRequest` for an unknown job, `BacklogFull`, `NotAccepted`, `OutcomeUnknown`.
        """
        return Job(retry(self._app, self._stores, self.id, again=again), self._app, self._stores)


class AsyncJob:
    """Handle of a job for asyncio programs: the methods of `Job`, to be awaited."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.id = job.id

    def __repr__(self) -> str:
        return f"<AsyncJob {self.id}>"

    async def now(self) -> JobEvent:
        return await asyncio.to_thread(self._job.now)

    async def info(self) -> JobInfo:
        return await asyncio.to_thread(self._job.info)

    async def explain(self) -> Explanation:
        return await asyncio.to_thread(self._job.explain)

    async def wait(self, *states: str, timeout: float | None = None) -> JobEvent:
        """Wait as `Job.wait` does."""
        wanted = _wanted(states)
        async with asyncio.timeout(timeout), aclosing(self.events()) as events:
            async for event in events:
                if event.state in wanted:
                    return event
        raise AssertionError("the events of a job end with its end")

    async def events(self) -> AsyncGenerator[JobEvent, None]:
        """Yield the current state, then each state that the job comes into, until its end."""
        async with aclosing(following.follow_async(self._job._stores, self.id)) as events:
            async for event in events:
                yield event

    async def result(self, timeout: float | None = None) -> Any:
        """Wait for the end and return the value, as `Job.result` does. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout):
            await self.wait()
            return await asyncio.to_thread(self._job.result)

    async def cancel(self, *, terminate: bool = False) -> Cancellation:
        return await asyncio.to_thread(lambda: self._job.cancel(terminate=terminate))

    async def retry(self, *, again: bool = False) -> AsyncJob:
        return AsyncJob(await asyncio.to_thread(lambda: self._job.retry(again=again)))


def _wanted(states: Sequence[str]) -> frozenset[State]:
    return frozenset(map(_state, states)) | FINAL


def _state(value: Any) -> State:
    try:
        return State(value)
    except ValueError as error:
        names = ", ".join(state.value for state in State)
        advice = (
            f"It is one of {names}. Seconds are given as timeout=30."
            if _is_number(value)
            else (f"It is one of {names}.")
        )
        raise InvalidRequest(f"state {show(value)} is not valid", value=value, advice=advice) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def job(id: str | AsyncResult[Any], app: Celery | None = None) -> Job:  # noqa: A002
    """Return a handle of a job, by its id or its result. `app`: the current one, unless it is given."""
    result = id if isinstance(id, AsyncResult) else None
    app = app or (result.app if result is not None else current_app._get_current_object())
    return Job(result.id if result is not None else str(id), app, platform_of(app))
