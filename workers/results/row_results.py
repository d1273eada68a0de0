"""Results read from the rows of their jobs, while the Redis that keeps results is away.

A result that could not be delivered stands in the row's outbox, as its backend would have stored it. So a read returns
the very text that Redis would return, and all of Celery above it works: states, values, exceptions with their types,
groups. A result that was delivered before is in Redis alone: a read of it raises the error of Redis.

A thread that delivers results asks Redis alone: a row that says how its job ended must not pass for a delivered result.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from celery import states
from celery.backends.redis import RedisBackend, ResultConsumer
from celery.exceptions import TaskRevokedError, WorkerLostError
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.model import outbox
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.workers.dispatch.circuit import Circuit
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.process.waiting_for_stores import may_pass

logger = logging.getLogger(__name__)

#: Seconds between the first two looks at the rows of awaited results. The pause doubles with each look.
LOOK_AFTER: Final = 0.05
#: Most seconds between two such looks.
LOOK_AT_MOST: Final = 0.5

_ROWS: Final = text("SELECT id, state, error, outbox FROM jobs WHERE id = ANY(CAST(:ids AS text[]))")


#: `once` is True in a thread that does not retry.
_of_thread: Final = threading.local()


class Unknown(Exception):
    """Raised where the rows do not say what a result is."""


def payload(note: dict[str, Any]) -> Any:
    """Return the text or bytes that the backend stores for a result of an outbox."""
    return note["text"] if "text" in note else base64.b64decode(note["base64"])


class RowConsumer(ResultConsumer):
    """Consumer that waits for results by a subscription, and by looks at the rows while Redis is away."""

    backend: Any
    subscribed_to: set[Any]
    _pubsub: Any = None
    _pause = LOOK_AFTER

    @contextmanager
    def reconnect_on_error(self) -> Iterator[None]:
        """Give the subscription up where Redis does not answer. Celery would retry for some 20 s, and then raise."""
        try:
            yield
        except self._connection_errors as error:
            self.backend.reach.trip(str(error))
            with self._locked():
                lost, self._pubsub = self._pubsub, None
            if lost is not None:
                with suppress(*self._connection_errors):
                    lost.close()

    def consume_from(self, task_id: str) -> None:
        self._pause = LOOK_AFTER
        with self._locked():
            if self._pubsub is not None or (self.backend.reach.closed and not self.subscribed_to):
                super().consume_from(task_id)
            else:
                self.subscribed_to.add(self._get_key_for_task(task_id))

    def drain_events(self, timeout: float | None = None) -> None:
        if self._pubsub is not None or not self.subscribed_to:
            super().drain_events(timeout)
        elif self.backend.reach.closed:
            # The new subscription also reads once the results of jobs that ended meanwhile.
            with self._locked(), self.reconnect_on_error():
                self._reconnect_pubsub()
        else:
            self._look_at_rows()
            time.sleep(self._pause if timeout is None else min(self._pause, timeout))
            self._pause = min(2 * self._pause, LOOK_AT_MOST)

    def _look_at_rows(self) -> None:
        try:
            results = self.backend.rows(list(self.subscribed_to), tolerant=True)
        except SQLAlchemyError as error:
            logger.info("the awaited results cannot be read from Postgres: %s", error)
            return
        for stored in results:
            if stored is not None:
                self.on_state_change(self._decode_result(stored), None)


class RowResults(RedisBackend):
    """Mixin for a Redis backend that reads results from rows while Redis is away. Thread-safe as the backend is."""

    app: Any
    ResultConsumer = RowConsumer

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing: `AsyncResult.get` and groups subscribe before they read.

        Celery subscribes to a result's channel when the task is sent. It subscribes again when a client waits for the
        result, before it reads the state. The second subscription is enough. The first would cost each `delay()` two
        commands.
        """

    @property
    def reach(self) -> Circuit:
        """Return the circuit that says whether this backend's Redis is asked. It is made at the first use."""
        circuit: Circuit | None = self.__dict__.get("_reach")
        if circuit is None:
            circuit = self.__dict__["_reach"] = Circuit(
                self._ping,
                "the result backend is left alone until it answers quickly (results are read from Postgres meanwhile)",
                "the result backend answers again",
            )
        return circuit

    def ask(self, question: Callable[[], Any]) -> Any:
        """Return the answer of Redis; raise at once while Redis is left alone."""
        if not self.reach.closed:
            raise RedisConnectionError("the result backend is left alone until it answers")
        try:
            return question()
        except self.connection_errors as error:
            if may_pass(error):
                self.reach.trip(str(error))
            raise

    def _ping(self) -> None:
        """Ping Redis on a connection of its own with a short time-out; in the circuit's thread."""
        timeout = self.app.platform.settings.store_timeout if self.is_on_platform else timeouts.STORE_TIMEOUT
        names = {"socket_timeout", "socket_connect_timeout"} & self.connparams.keys()
        times = dict.fromkeys(names, timeouts.QUICK_ANSWER * timeout)
        client = self._create_client(**{**self.connparams, **times})
        try:
            client.ping()
        finally:
            # The client does not close a pool that its caller made.
            client.connection_pool.disconnect()

    def get(self, key: Any) -> Any:
        return self._answer([key], lambda: [super(RowResults, self).get(key)])[0]

    def mget(self, keys: Any) -> Any:
        keys = list(keys)
        return self._answer(keys, lambda: super(RowResults, self).mget(keys))

    def _answer(self, keys: Sequence[Any], question: Callable[[], Any]) -> Any:
        if not self._may_read_rows():
            return self.ask(question)
        problem: BaseException | None = None
        if self.reach.closed:
            try:
                return question()
            except self.connection_errors as error:
                if not may_pass(error):
                    raise
                self.reach.trip(str(error))
                problem = error
        try:
            return self.rows(keys)
        except (Unknown, SQLAlchemyError) as unknown:
            if problem is not None:
                raise problem from unknown
            # Ask Redis after all: it has the result, or raises the reason why it does not answer.
            return question()

    @property
    def is_on_platform(self) -> bool:
        return isinstance(getattr(self.app, "platform", None), Stores)

    def _may_read_rows(self) -> bool:
        """Return whether this thread may read results from rows. A thread that delivers results may not."""
        attempt = attempts.current()
        return self.is_on_platform and (attempt is None or attempt.patient is None)

    def ensure(self, fun: Callable[..., Any], args: Sequence[Any], **policy: Any) -> Any:
        """Try once within `asking_once`, and in a thread that delivers results. Else retry as Celery, for some 20 s."""
        if self._may_read_rows() and not getattr(_of_thread, "once", False):
            return super().ensure(fun, args, **policy)
        return self.ask(lambda: fun(*args))

    @contextmanager
    def asking_once(self) -> Iterator[None]:
        """Have this thread try once, within the context, what Celery would retry for some 20 s."""
        _of_thread.once = True
        try:
            yield
        finally:
            _of_thread.once = False

    def exception_safe_to_retry(self, exc: Exception) -> bool:
        return self._may_read_rows() and bool(super().exception_safe_to_retry(exc))

    def rows(self, keys: Sequence[Any], tolerant: bool = False) -> list[Any]:
        """Return the values that Redis would have under these keys of jobs; None for a job that has not ended.

        Raises `Unknown` where a row does not say the result. A `tolerant` caller gets None for such a row.
        """
        prefix = self.key_t(self.task_keyprefix)
        names = [self.key_t(key) for key in keys]
        if not all(name.startswith(prefix) for name in names):
            raise Unknown("not the keys of jobs")
        ids = [name[len(prefix) :].decode() for name in names]
        with self.app.platform.engine.connect() as connection:
            rows_by_id = {row.id: row for row in connection.execute(_ROWS, {"ids": ids})}
        return [self._text_of(job, rows_by_id.get(job), tolerant) for job in ids]

    def _text_of(self, job: str, row: Any, tolerant: bool) -> Any:
        if row is None or row.state not in FINAL:
            # A job without a row has not ended either: a chord's body has none before all its parts have come.
            return None
        for note in outbox.parse(row.outbox or "").results:
            if note.get("result") == job:
                return payload(note)
        state, error = _end_of(State(row.state), row.error)
        if error is None:
            if tolerant:
                return None
            raise Unknown(f"the result of job {job} was delivered")
        meta = self._get_result_meta(self.encode_result(error, state), state, None, None)
        return self.encode({**meta, "task_id": job})


def _end_of(state: State, error: str | None) -> tuple[str, Exception | None]:
    """Return Celery's state and exception of a job that ended while no worker held it, as a delivery would store them.

    The exception is None for a job that ended in any other way.
    """
    if state is State.LOST:
        return states.FAILURE, WorkerLostError(error or "the job was lost with its workers")
    if state in (State.CANCELLED, State.EXPIRED):
        return states.REVOKED, TaskRevokedError(error or state.value)
    return "", None
