"""A job as asyncio programs see it: `await job(id).wait("running")`, `async for event in job(id).events()`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from celery import Celery, current_app
from celery.result import AsyncResult
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database.postgres_errors import translate
from celery_capacity.routing.errors import InvalidRequest, PlatformError, StoreUnavailable, show
from celery_capacity.routing.inspect import job_events
from celery_capacity.routing.inspect.job_events import JobEvent
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.workers.process.stores import Stores

#: Seconds after which a job is looked at again, where a store did not answer.
LOOK_AGAIN: Final = 1.0


class Job:
    """Handle of a job, by its id. It asks nothing before it is awaited, and Postgres only at first and after a gap."""

    def __init__(self, id: str, stores: Stores) -> None:  # noqa: A002
        self.id = check_job_id(id)
        self._stores = stores

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    async def now(self) -> JobEvent:
        """Return the current state as an event. Raises `InvalidRequest` for an unknown job, `StoreUnavailable`."""
        return await asyncio.to_thread(self._look)

    async def wait(self, *states: str, timeout: float | None = None) -> JobEvent:
        """Wait until the job is in one of the states or has ended, and return the event that says so.

        Without a state, wait for its end. Returns at once if the job is there already. Raises `TimeoutError` after
        `timeout` seconds, and raises as `now` does.
        """
        wanted = {_state(name) for name in states} | FINAL
        async with asyncio.timeout(timeout), aclosing(self.events()) as events:
            async for event in events:
                if event.state in wanted:
                    return event
        raise AssertionError("the events of a job end with its end")

    async def events(self) -> AsyncGenerator[JobEvent, None]:
        """Yield the current state, then each state that the job comes into, until its end. Raises as `now` does."""
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[JobEvent | None]()

        def tell(event: JobEvent | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(heard.put_nowait, event)

        watcher, last = self._stores.watcher, None
        watcher.watch(self.id, tell)
        try:
            while last is None or not last.final:
                event = await heard.get()
                if event is None:
                    try:
                        event = await self.now()
                    except StoreUnavailable:
                        if last is None:
                            raise
                        loop.call_later(LOOK_AGAIN, tell, None)
                        continue
                elif last is None:
                    # The first look is on its way, and sees the state of this event.
                    continue
                if event.follows(last):
                    last = event
                    yield event
        finally:
            watcher.unwatch(self.id, tell)

    def _look(self) -> JobEvent:
        # The ledger comes first: jobs that it forgets meanwhile are in Postgres.
        ledger_event = self._stores.sending.ask(lambda ledger: job_events.in_ledger(ledger.client, self.id))
        try:
            with self._stores.engine.connect() as connection:
                row = job_events.in_postgres(connection, self.id)
        except DBAPIError as error:
            raise translate(error) from error
        except PoolTimeout as error:
            raise StoreUnavailable("no connection to Postgres was free") from error
        if row is None:
            raise InvalidRequest(f"there is no job {self.id}", value=self.id, advice="Its transaction may not be over.")
        return ledger_event if ledger_event is not None and ledger_event.rank > row.rank else row


def _state(value: Any) -> State:
    try:
        return State(value)
    except ValueError as error:
        names = ", ".join(state.value for state in State)
        raise InvalidRequest(
            f"state {show(value)} is not valid", value=value, advice=f"It is one of {names}."
        ) from error


def job(id: str | AsyncResult[Any], app: Celery | None = None) -> Job:  # noqa: A002
    """Return a handle of a job, by its id or its result. `app`: the current one, unless it is given."""
    result = id if isinstance(id, AsyncResult) else None
    app = app or (result.app if result is not None else current_app._get_current_object())
    stores = getattr(app, "platform", None)
    if not isinstance(stores, Stores):
        raise PlatformError(
            f"the app {app.main!r} is not on the platform", advice="Pass app=, or call celery_capacity.install(app)."
        )
    return Job(result.id if result is not None else str(id), stores)
