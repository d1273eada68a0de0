"""Celery's result backends, in which the results of an attempt travel with its outcome.

Within an attempt (`workers.process.attempts`) a final result or a chord part is not stored but collected. It is
delivered once the ledger has taken the end from the holder of the lease. This has four consequences:

- The result of a stale attempt never reaches the backend.
- A chord part is counted once.
- Nothing waits for a backend that is down.
- A body that succeeded is never reported as failed because its result could not be stored.

Where results are kept in the ledger's own Redis, the release stores them.

A state on the way (STARTED, the user's own states) is stored at once. A failure to store it raises no error.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

from celery import Celery, current_app, states
from celery._state import _task_stack
from celery.app.task import Context
from celery.backends.redis import RedisBackend, SentinelBackend
from celery.backends.rpc import RPCBackend
from celery.result import result_from_tuple
from kombu.exceptions import EncodeError
from redis.exceptions import WatchError

from celery_capacity.routing.config import redis_urls, timeouts
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.ledger import sentinels
from celery_capacity.routing.ledger.replies import Kept
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.waiting_for_stores import may_pass
from celery_capacity.workers.results.chord_rows import RowChords
from celery_capacity.workers.results.row_results import payload
from celery_capacity.workers.traces import worker as traces

logger = logging.getLogger(__name__)

#: Celery's names of backends, and the paths of the platform's own, for `loader.override_backends`.
BACKENDS: Final = {
    "redis": "celery_capacity.workers.results.backends:PlatformRedisBackend",
    "rediss": "celery_capacity.workers.results.backends:PlatformRedisBackend",
    "sentinel": "celery_capacity.workers.results.backends:PlatformSentinelBackend",
}
#: States that end an attempt.
ENDS: Final = frozenset({*states.READY_STATES, states.RETRY})
#: Most seconds for which a result is kept: a century. Redis refuses times that its milliseconds cannot hold.
MAX_EXPIRES: Final = 100 * 366 * 86_400
#: Errors of a backend for a result that it will never take. After any other error, a later try may succeed.
HOPELESS: Final = (EncodeError, TypeError, ValueError, AttributeError, LookupError)
#: Attributes of a request that are kept with a chord part.
_CHORD: Final = ("id", "task", "group", "group_index", "chord", "root_id", "parent_id", "errbacks", "chain", "reply_to")


class CarriedResults:
    """Mixin for the app's backend class (`backend_class`): it collects the results of an attempt instead of storing."""

    app: Any
    #: The backend class to which this mixin was added.
    plain_class: type

    def exception_to_python(self, exc: Any) -> Any:
        """Return the exception that a result holds.

        A worker of the version before names the platform's errors by their file.
        """
        if isinstance(exc, dict) and exc.get("exc_module") == "routing.errors":
            exc = {**exc, "exc_module": PlatformError.__module__}
        return super().exception_to_python(exc)  # type: ignore[misc]

    def __reduce__(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        plain: Any = super().__reduce__(args, kwargs)  # type: ignore[call-arg]
        return unpickle_backend, (self.plain_class, *plain[1][1:])

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **options: Any
    ) -> Any:
        attempt = attempts.current()
        if attempt is None or attempt.patient is not None:
            return super().store_result(task_id, result, state, traceback=traceback, request=request, **options)  # type: ignore[misc]
        encoded = self.encode_result(result, state)  # type: ignore[attr-defined]
        if state not in ENDS:
            self._store_passing(task_id, encoded, state, traceback, request)
            return encoded
        meta = self._get_result_meta(encoded, state, traceback, request)  # type: ignore[attr-defined]
        meta["task_id"] = task_id
        attempt.outbox.results.append(
            {
                "result": task_id,
                "state": state,
                "reply_to": getattr(request, "reply_to", None),
                "correlation_id": getattr(request, "correlation_id", None),
                **self._packed(meta),
            }
        )
        return encoded

    def _store_passing(self, task_id: str, encoded: Any, state: str, traceback: Any, request: Any) -> None:
        """Store a state on the way, unless the job has ended. One try only: such a state is not worth a wait."""
        try:
            if self._get_task_meta_for(task_id)["status"] not in states.READY_STATES:  # type: ignore[attr-defined]
                self._store_result(task_id, encoded, state, traceback, request=request)  # type: ignore[attr-defined]
        except Exception as error:
            logger.warning("the state %s of job %s could not be stored: %s", state, task_id, error)

    def on_chord_part_return(self, request: Any, state: str, result: Any, **options: Any) -> Any:
        attempt = attempts.current()
        if attempt is None or attempt.patient is not None:
            return super().on_chord_part_return(request, state, result, **options)  # type: ignore[misc]
        kept = {name: getattr(request, name, None) for name in _CHORD}
        kept["delivery_info"] = {"priority": (request.delivery_info or {}).get("priority")}
        encoded = self.encode_result(result, state)  # type: ignore[attr-defined]
        context = {"trace": carrier} if (carrier := traces.injected()) else {}
        attempt.outbox.results.append(
            {
                "chord": request.id,
                "group": kept["group"],
                "state": state,
                **self._packed({"request": kept, "result": encoded, **context}),
            }
        )
        return None

    def _call_task_errbacks(self, request: Any, exc: Any, traceback: Any) -> None:
        """Have the errbacks of an attempt published with its end: they find its result stored, as with Celery.

        An eager task within the body has errbacks of its own. They do not wait for the end of the body.
        """
        attempt = attempts.current()
        if attempt is not None and attempt.patient is None and request.id == attempt.tag.job:
            with attempts.held(replace(attempt, deferred=True)):
                super()._call_task_errbacks(request, exc, traceback)  # type: ignore[misc]
        else:
            super()._call_task_errbacks(request, exc, traceback)  # type: ignore[misc]

    # -- delivering ----------------------------------------------------------------------------------------------

    def kept_in(self, ledger_url: str | None, outbox: Outbox) -> tuple[tuple[Kept, ...], Outbox]:
        """Return the results that the ledger's release can store, and an outbox with all else."""
        return (), outbox

    def deliver_results(self, notes: Sequence[dict[str, Any]]) -> None:
        """Store results as they were collected. The call is idempotent."""
        for note in notes:
            meta = self._unpacked(note)
            context = Context(
                id=note["result"],
                task=meta.get("name"),
                args=meta.get("args"),
                kwargs=meta.get("kwargs"),
                hostname=meta.get("worker"),
                retries=meta.get("retries") or 0,
                delivery_info={"routing_key": meta.get("queue")},
                group=meta.get("group_id"),
                parent_id=meta.get("parent_id"),
                children=[result_from_tuple(child, self.app) for child in meta.get("children") or ()],
                stamped_headers=meta.get("stamped_headers"),
                stamps={name: meta.get(name) for name in meta.get("stamped_headers") or ()},
                reply_to=note["reply_to"],
                correlation_id=note["correlation_id"],
            )
            # Not by `store_result`, which would encode the result once more and wait while the backend is down.
            self._store_result(note["result"], meta["result"], note["state"], meta["traceback"], request=context)  # type: ignore[attr-defined]

    def deliver_chord(self, note: dict[str, Any]) -> None:
        """Count a chord part. The caller is patient (`attempts.Attempt`), since the last part publishes the body."""
        kept = self._unpacked(note)
        request = Context(kept["request"], called_directly=False)
        with _current(self.app, request), traces.continuing(kept.get("trace")):
            self.on_chord_part_return(request, note["state"], kept["result"])

    def _packed(self, data: Any) -> dict[str, str]:
        """Encode data with the serialiser of results, in a form that fits into JSON."""
        text = self.encode(data)  # type: ignore[attr-defined]
        if isinstance(text, str):
            return {"text": text}
        return {"base64": base64.b64encode(text).decode("ascii")}

    def _unpacked(self, note: dict[str, Any]) -> Any:
        return self.decode(payload(note))  # type: ignore[attr-defined]


@contextmanager
def _current(app: Any, request: Context) -> Iterator[None]:
    """Make the request's task the current one, as Celery does while it counts a chord part.

    A message that is published within has this request as its parent and its root. Where the app says so, it has the
    request's priority too.
    """
    task = app.tasks.get(getattr(request, "task", None))
    if task is None:
        # The task is in a module of another process, or an older version left the note without a task.
        yield
        return
    _task_stack.push(task)
    task.request_stack.push(request)
    try:
        yield
    finally:
        task.request_stack.pop()
        _task_stack.pop()


class PlatformRedisBackend(RowChords):
    """Redis backend that reads results from rows, and counts chords in Postgres, while its Redis is away."""

    def _params_from_url(self, url: str, defaults: Any) -> Any:
        params = super()._params_from_url(url, defaults)
        if "path" in params:
            # A Unix socket has no such option, but Celery passes it on all the same.
            params.pop("socket_keepalive", None)
        return params


class PlatformSentinelBackend(PlatformRedisBackend, SentinelBackend):
    """The platform's Redis backend behind Sentinels.

    `master_name` may stand in the URL, where Celery has an option. A Sentinel that does not answer is passed over at
    once.
    """

    def __init__(self, *args: Any, url: str | None = None, **options: Any) -> None:
        address = redis_urls.read(str(url))
        self._master_name = address.master
        super().__init__(*args, url=replace(address, master="").url, **options)

    @property
    def _transport_options(self) -> dict[str, Any]:
        options = self.app.conf.get("result_backend_transport_options") or {}
        timeout = self.app.platform.settings.store_timeout if self.is_on_platform else timeouts.STORE_TIMEOUT
        return {redis_urls.MASTER: self._master_name, "sentinel_kwargs": sentinels.asking(timeout), **options}

    def _get_sentinel_instance(self, **options: Any) -> Any:
        return super()._get_sentinel_instance(**options, connection_class=sentinels.PrimaryConnection)


class CarriedRedisResults(CarriedResults):
    """Mixin like `CarriedResults` for a backend in Redis, with fewer round trips."""

    def _store_passing(self, task_id: str, encoded: Any, state: str, traceback: Any, request: Any) -> None:
        meta = self._get_result_meta(encoded, state, traceback, request)  # type: ignore[attr-defined]
        meta["task_id"] = task_id
        key = self.get_key_for_task(task_id)  # type: ignore[attr-defined]
        text = self.encode(meta)  # type: ignore[attr-defined]
        if not is_asked(self):
            return
        try:
            with self.client.pipeline() as pipe:  # type: ignore[attr-defined]
                pipe.watch(key)
                stored = pipe.get(key)
                if stored and self.decode_result(stored)["status"] in states.READY_STATES:  # type: ignore[attr-defined]
                    return
                pipe.multi()
                self._set_in(pipe, key, self._seconds(state), text)
                pipe.execute()
        except WatchError:
            # Another process stored a newer state just now.
            return
        except Exception as error:
            if may_pass(error) and hasattr(self, "reach"):
                self.reach.trip(str(error))
            logger.warning("the state %s of job %s could not be stored: %s", state, task_id, error)

    def kept_in(self, ledger_url: str | None, outbox: Outbox) -> tuple[tuple[Kept, ...], Outbox]:
        if not outbox.results or ledger_url is None or str(self.app.conf.result_backend) != ledger_url:
            return (), outbox
        kept = tuple(self._kept(note) for note in outbox.results if "result" in note)
        return kept, Outbox(outbox.publishes, [note for note in outbox.results if "result" not in note])

    def deliver_results(self, notes: Sequence[dict[str, Any]]) -> None:
        # `ask` raises at once while Redis is away, so that nothing waits for it.
        deliver, ask = partial(self._deliver_all, notes), getattr(self, "ask", None)
        deliver() if ask is None else ask(deliver)

    def _deliver_all(self, notes: Sequence[dict[str, Any]]) -> None:
        with self.client.pipeline(transaction=False) as pipe:  # type: ignore[attr-defined]
            for note in notes:
                self._set_in(pipe, *self._kept(note))
            pipe.execute()

    def _kept(self, note: dict[str, Any]) -> Kept:
        key = self.get_key_for_task(note["result"])  # type: ignore[attr-defined]
        return key.decode() if isinstance(key, bytes) else key, self._seconds(note["state"]), payload(note)

    def _seconds(self, state: str) -> int:
        expires = self.failure_expires if state == states.FAILURE else self.expires  # type: ignore[attr-defined]
        # A key cannot have a negative time, and a result that expires at once would reach nobody.
        return min(MAX_EXPIRES, max(1, int(expires))) if expires else 0

    @staticmethod
    def _set_in(pipe: Any, key: str, seconds: int, text: bytes | str) -> None:
        pipe.set(key, text, ex=seconds or None)
        pipe.publish(key, text)


class CarriedReplies(CarriedResults):
    """Mixin like `CarriedResults` for `rpc://`, where a result is a message to the waiting client.

    No store keeps such a result, so it cannot be looked up.
    """

    def _store_passing(self, task_id: str, encoded: Any, state: str, traceback: Any, request: Any) -> None:
        meta = self._get_result_meta(encoded, state, traceback, request)  # type: ignore[attr-defined]
        meta["task_id"] = task_id
        try:
            self._reply([(*self.destination_for(task_id, request), meta)])  # type: ignore[attr-defined]
        except Exception as error:
            logger.warning("the state %s of job %s could not be told: %s", state, task_id, error)

    def deliver_results(self, notes: Sequence[dict[str, Any]]) -> None:
        self._reply([(note["reply_to"], note["correlation_id"], self._unpacked(note)) for note in notes])

    def _reply(self, replies: Sequence[tuple[str | None, str | None, dict[str, Any]]]) -> None:
        with self.app.amqp.producer_pool.acquire(block=True) as producer:
            for reply_to, correlation_id, meta in replies:
                # Old producers, and programs that wait for nothing, name no queue.
                if reply_to:
                    producer.publish(
                        meta,
                        exchange=self.exchange,  # type: ignore[attr-defined]
                        routing_key=reply_to,
                        correlation_id=correlation_id or meta["task_id"],
                        serializer=self.serializer,  # type: ignore[attr-defined]
                        # A single retry replaces a connection that was lost meanwhile. More is left to the duties.
                        retry=True,
                        retry_policy={"max_retries": 1, "interval_start": 0},
                        delivery_mode=self.delivery_mode,  # type: ignore[attr-defined]
                    )


def is_asked(backend: Any) -> bool:
    """Return False for a backend in Redis that is left alone, because it does not answer."""
    reach = getattr(backend, "reach", None)
    return reach is None or bool(reach.closed)


def kept_of(app: Celery, request: Context) -> tuple[bool, bool]:
    """Return whether the value of a job is kept, and whether its error is, by the rules of Celery's worker."""
    fields = vars(request)
    # The request of an unreadable message has neither of these fields.
    task = app.tasks.get(fields.get("task"))
    ignored = fields.get("ignore_result")
    if ignored is None:
        ignored = getattr(task, "ignore_result", False)
    return not ignored, not ignored or bool(getattr(task, "store_errors_even_if_ignored", False))


def backend_class(base: type) -> type:
    """Return a backend class with the platform's mixin in front of it."""
    if issubclass(base, CarriedResults):
        return base
    mixin = next((mixin for kind, mixin in _MIXINS if issubclass(base, kind)), CarriedResults)
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "plain_class": base})


_MIXINS: Final[Sequence[tuple[type, type]]] = ((RedisBackend, CarriedRedisResults), (RPCBackend, CarriedReplies))


def unpickle_backend(base: type, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return a backend that was pickled with an `AsyncResult`, like Celery's own function of this name."""
    return backend_class(base)(*args, app=current_app._get_current_object(), **options)
