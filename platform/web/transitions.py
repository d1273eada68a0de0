"""Transitions of all jobs as they come, for the page's stream of events and for `tail`.

The scripts of the ledger publish each transition on the channel of its job (`routing/inspect/job_events.py`). Where
Redis does not answer, or Postgres decides, Postgres is looked at each second, and compared.

A change has a kind and data:

| kind | data |
| --- | --- |
| `job` | the job and its new state, as in the model `JobChanged` |
| `cluster` | empty: something changed that is not a transition of one job |
| `source` | the store that the changes come from now, None while none answers; some may be missing before it |
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from redis.exceptions import RedisError
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.inspect import job_events
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.states import Store

#: Seconds to wait for a message before looking whether anybody still listens.
PATIENCE: Final = 0.5
#: Seconds between two looks at Postgres, and rows of each state in a look.
LOOK: Final = 1.0
MAX_ROWS: Final = 500
#: States of a job that has not ended, and those among them in which it waits.
OPEN: Final = ["accepted", "waiting", "admitted", "running"]
WAITING: Final = ("accepted", "waiting")

_ROWS: Final = text("""
SELECT newest.* FROM unnest(CAST(:open AS text[])) AS s (state) CROSS JOIN LATERAL (
  SELECT id, seq, jobs.state, attempt, epoch, step, worker, coalesce(started_at, admitted_at, submitted_at) AS at
  FROM jobs WHERE jobs.state = s.state ORDER BY seq DESC LIMIT :most
) AS newest
UNION ALL
(SELECT id, seq, state, attempt, epoch, step, worker, finished_at
 FROM jobs WHERE finished_at > clock_timestamp() - interval '10 s' ORDER BY finished_at DESC LIMIT :most)
""")


class Transitions:
    """Listener that hands each change to `say`, in the thread that calls `hear`.

    `client` makes a client of Redis. `wanted` tells whether anybody listens. `pause` waits so many seconds.
    """

    def __init__(
        self,
        client: Callable[[], Any],
        engine: Callable[[], Engine],
        say: Callable[[str, dict[str, Any]], None],
        wanted: Callable[[], bool],
        pause: Callable[[float], object],
    ) -> None:
        self._client = client
        self._engine = engine
        self._say = say
        self._wanted = wanted
        self._pause = pause
        self._seen: dict[str, tuple[int, int, int]] = {}
        #: greatest number of a job so far
        self._newest = 0
        #: the store that the changes come from; None while none answers
        self.source: Store | None = None

    def hear(self) -> None:
        """Hear the ledger until nobody listens or it is gone, then look at Postgres once."""
        with suppress(RedisError, PlatformError):
            if not self._postgres_decides():
                self._hear_ledger()
        if self._wanted():
            self._look_at_postgres()

    def _postgres_decides(self) -> bool:
        try:
            with self._engine().connect() as connection:
                return read_authority(connection).authority == Store.POSTGRES
        except (DBAPIError, PoolTimeout, PlatformError):
            return False

    def _hear_ledger(self) -> None:
        """Hand on the messages of the scripts, until nobody listens or Postgres decides. Raises `RedisError`."""
        client = self._client()
        try:
            channels = client.pubsub()
            channels.psubscribe(f"{keys.KEYS['job']}*")
            channels.subscribe(job_events.EPOCH_CHANNEL)
            while self._wanted():
                message = channels.get_message(timeout=PATIENCE)
                kind = None if message is None else message["type"]
                if kind == "subscribe":
                    # From here on nothing is missed.
                    self._come_from(Store.LEDGER)
                elif kind == "pmessage":
                    self._hand_on(message["channel"].decode("utf-8", "replace"), message["data"])
                elif kind == "message":
                    self._say("cluster", {})
                    if self._postgres_decides():
                        return
        finally:
            client.connection_pool.disconnect()

    def _hand_on(self, channel: str, message: bytes) -> None:
        job = channel.removeprefix(keys.KEYS["job"])
        try:
            event = job_events.parse(job, message)
        except ValueError:
            return
        if event is None:
            self._say("cluster", {})
        else:
            at = None if event.at is None else event.at.isoformat(timespec="milliseconds")
            self._say("job", _data(job, event.state, event.attempt, event.worker, at))

    def _come_from(self, source: Store | None) -> None:
        if source != self.source:
            self.source = source
            self._seen.clear()
            self._say("source", {"source": None if source is None else source.value})

    def _look_at_postgres(self) -> None:
        """Compare the rows with those of the look before, once."""
        try:
            with self._engine().connect() as connection:
                rows = connection.execute(_ROWS, {"most": MAX_ROWS, "open": OPEN}).all()
        except (DBAPIError, PoolTimeout, PlatformError):
            self._come_from(None)
        else:
            self._come_from(Store.POSTGRES)
            ranks = {row.id: (row.epoch, row.attempt, row.step) for row in rows}
            if self._seen:
                for row in rows:
                    if self._is_news(row):
                        at = None if row.at is None else row.at.isoformat(timespec="milliseconds")
                        self._say("job", _data(row.id, row.state, row.attempt, row.worker, at))
            self._seen = ranks or {"": (0, 0, 0)}
            self._newest = max((self._newest, *(row.seq for row in rows)))
        self._pause(LOOK)

    def _is_news(self, row: Any) -> bool:
        """Return True if the look before did not have this state of a job.

        A job that waited beyond its rows comes in sight when others start. Its number tells that it is not new.
        """
        seen = self._seen.get(row.id)
        if seen is None:
            return row.state not in WAITING or row.seq > self._newest
        return seen < (row.epoch, row.attempt, row.step)


def _data(job: str, state: str, attempt: int, worker: str | None, at: str | None) -> dict[str, Any]:
    return {"job": job, "state": str(state), "attempt": attempt, "worker": worker, "at": at}
